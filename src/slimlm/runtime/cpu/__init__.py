"""The functions of the CPU kernels that multiply by packed layers."""
