"""slimlm makes language models smaller without retraining them: 4-bit weights, 2:4 sparsity, low-rank repair.

import slimlm

result = slimlm.compress("path-or-hub-name", "out", data="text.txt")
model = slimlm.load("out")
"""

from importlib.metadata import version

from slimlm.core.errors import SlimlmError
from slimlm.inference.load import load
from slimlm.pipeline import Result, compress, estimate
from slimlm.recipe import Recipe, open_recipe
from slimlm.runtime.whole_model import use_kernels
from slimlm.verification.folder import Verified, verify

__version__ = version("slimlm")
__all__ = [
    "Recipe",
    "Result",
    "SlimlmError",
    "Verified",
    "compress",
    "estimate",
    "load",
    "open_recipe",
    "use_kernels",
    "verify",
]
