"""A tuner: what is trained, towards what, and how fast. Plain data; each file of slimlm.tuning.tuners holds one."""

import importlib
import pkgutil
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Literal

from slimlm.core.errors import RecipeError
from slimlm.core.parts.trainable import Trains


@dataclass(frozen=True)
class Loss:
    """A mixture of losses per predicted token, in nats."""

    divergence: float = 0.0
    """The weight of KL(original || model)."""
    next_token: float = 0.0
    """The weight of the negative log-likelihood of the text."""

    @property
    def needs_original(self) -> bool:
        """Whether the original model is needed."""
        return self.divergence > 0


@dataclass(frozen=True, kw_only=True)
class Tuner:
    """A method of tuning a compressed model; its name is that of its file."""

    summary: str
    """One line on what it does."""
    trains: Trains
    """The kinds of values that are trained."""
    loss: Loss
    """What is lowered."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """The optimizer: torch's AdamW, or transformers' Adafactor with rates from outside."""
    rate: float
    """The largest rate; see `relative`."""
    relative: bool = True
    """Whether rates are shares of a tensor's root mean square at the beginning, because scales, factors and norms differ by
    orders of magnitude; else all tensors have the same."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How rates fall to zero after the warm-up, as transformers names it."""
    warm_up: float = 0.0
    """The share of the steps over which rates rise from zero."""
    clip: float | None = None
    """The norm that the gradient of all tensors together is clipped to; None: it is not clipped."""
    weight_decay: float = 0.0
    """The weight decay of AdamW."""
    batch: int = 8
    """Windows per step."""
    length: int = 512
    """Tokens per window, where the model's context is not shorter."""


@cache
def tuners() -> dict[str, Tuner]:
    """All tuners by name: those of the files in slimlm.tuning.tuners."""
    package = importlib.import_module("slimlm.tuning.tuners")
    names = [file.name for file in pkgutil.iter_modules(package.__path__)]
    return {name: importlib.import_module(f"{package.__name__}.{name}").TUNER for name in names}


def tuner_of(name: str) -> Tuner:
    """The tuner of a name.

    Raises:
        RecipeError: There is none; the message names the nearest.
    """
    if name in tuners():
        return tuners()[name]
    near = get_close_matches(name, tuners(), n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    raise RecipeError(f"no method of tuning is called {name!r}{meant} There are: {', '.join(tuners())}")
