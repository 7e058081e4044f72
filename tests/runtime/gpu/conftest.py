"""Where the GPU kernels are tested: on the card, or where there is none in Triton's interpreter."""

import os

import torch

from slimlm.runtime.gpu import device

if device.lacks_triton() is None and not torch.cuda.is_available():
    # Read when slimlm imports its kernels, at the first launch.
    os.environ.setdefault("TRITON_INTERPRET", "1")
