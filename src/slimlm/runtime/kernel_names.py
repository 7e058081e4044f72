"""The names by which users ask for kernels; apart from the code that runs them, so that naming them imports no torch."""

from typing import Literal

Kernels = Literal["auto", "precise", "fast", "gpu", "reference"]
"""Which arithmetic multiplies compressed layers.

- "precise": CPU kernels, activations rounded to 16-bit integers;
- "fast": CPU kernels, activations rounded to 8-bit integers;
- "gpu": GPU kernels;
- "reference": dense matrices, multiplied by torch;
- "auto": "precise" on the CPU and "gpu" on a GPU for every layer that these kernels support, "reference" for the others. For
  a whole model on a GPU (`slimlm.use_kernels`) it is also "reference" where activations are float32 and there is room for it.
"""
