"""The names of kernels that users give, in a module of their own that does not import torch."""

from typing import Literal

Kernels = Literal["auto", "precise", "fast", "gpu", "reference"]
"""The kernels of compressed layers:

- "precise": CPU kernels, activations rounded to 16-bit integers;
- "fast": CPU kernels, activations rounded to 8-bit integers;
- "gpu": GPU kernels;
- "reference": dense matrices, multiplied by torch;
- "auto": "precise" on the CPU and "gpu" on a GPU for every layer that these kernels support, "reference" for the others. For
  a whole model on a GPU (`slimlm.use_kernels`) it is also "reference" where activations are float32 and there is room for it.
"""
