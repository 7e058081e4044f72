"""slimlm makes language models smaller without retraining them: 4-bit weights, 2:4 sparsity, low-rank adapters.

import slimlm

result = slimlm.compress("path-or-hub-name", "out", data="text.txt")
model = slimlm.load("out")

Public names are imported when they are first used, so that the command line's help does not wait for torch. Where torch is not
imported yet, this lets its threads sleep while they wait (slimlm.runtime.waiting).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from slimlm.core.errors import SlimlmError
from slimlm.inference import registration
from slimlm.runtime import waiting

if TYPE_CHECKING:
    from slimlm.evaluation.evaluate import Evaluation, evaluate
    from slimlm.events import Event, Notify, Observer
    from slimlm.inference.load import load
    from slimlm.pipeline import Result, compress, estimate, plan
    from slimlm.planner.plan import Plan
    from slimlm.preflight.estimate import Estimate
    from slimlm.recipe import Recipe, open_recipe
    from slimlm.record import Record
    from slimlm.run.tune import Tuned, tune
    from slimlm.runtime.whole_model import prepare, use_kernels
    from slimlm.verification.folder import Verified, verify

    __version__: str

__all__ = [
    "Estimate",
    "Evaluation",
    "Event",
    "Notify",
    "Observer",
    "Plan",
    "Recipe",
    "Record",
    "Result",
    "SlimlmError",
    "Tuned",
    "Verified",
    "compress",
    "estimate",
    "evaluate",
    "load",
    "open_recipe",
    "plan",
    "prepare",
    "tune",
    "use_kernels",
    "verify",
]

_HOMES = {
    "Estimate": "slimlm.preflight.estimate",
    "Evaluation": "slimlm.evaluation.evaluate",
    "Event": "slimlm.events",
    "Notify": "slimlm.events",
    "Observer": "slimlm.events",
    "Plan": "slimlm.planner.plan",
    "Recipe": "slimlm.recipe",
    "Record": "slimlm.record",
    "Result": "slimlm.pipeline",
    "Tuned": "slimlm.run.tune",
    "Verified": "slimlm.verification.folder",
    "compress": "slimlm.pipeline",
    "estimate": "slimlm.pipeline",
    "evaluate": "slimlm.evaluation.evaluate",
    "load": "slimlm.inference.load",
    "open_recipe": "slimlm.recipe",
    "plan": "slimlm.pipeline",
    "prepare": "slimlm.runtime.whole_model",
    "tune": "slimlm.run.tune",
    "use_kernels": "slimlm.runtime.whole_model",
    "verify": "slimlm.verification.folder",
}
"""The modules that define the public names."""

waiting.wait_briefly()
registration.register()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("slimlm")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
