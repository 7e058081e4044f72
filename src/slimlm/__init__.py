"""slimlm makes language models smaller without retraining them: 4-bit weights, 2:4 sparsity, low-rank adapters.

import slimlm

result = slimlm.compress("path-or-hub-name", "out", data="text.txt")
model = slimlm.load("out")
"""

from importlib.metadata import version

from slimlm.core.errors import SlimlmError
from slimlm.events import Event, Notify, Observer
from slimlm.inference.load import load
from slimlm.pipeline import Result, compress, estimate, plan
from slimlm.planner.plan import Plan
from slimlm.preflight.estimate import Estimate
from slimlm.recipe import Recipe, open_recipe
from slimlm.record import Record
from slimlm.runtime.whole_model import use_kernels
from slimlm.verification.folder import Verified, verify

__version__ = version("slimlm")
__all__ = [
    "Estimate",
    "Event",
    "Notify",
    "Observer",
    "Plan",
    "Recipe",
    "Record",
    "Result",
    "SlimlmError",
    "Verified",
    "compress",
    "estimate",
    "load",
    "open_recipe",
    "plan",
    "use_kernels",
    "verify",
]
