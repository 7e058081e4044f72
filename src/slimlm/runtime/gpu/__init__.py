"""Products of packed layers on NVIDIA GPUs: the layout, the Triton kernels, how they are launched, and what they need."""
