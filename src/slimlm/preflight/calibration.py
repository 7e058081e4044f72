"""How much calibration text a run takes where the user does not say."""

from dataclasses import dataclass

from slimlm.core.statistics.covariance import Covariance
from slimlm.planner.plan import judged_windows
from slimlm.recipe import Recipe

_LENGTH = 512
"""Tokens of a sample, unless the model's context is shorter."""
_LEAST_TOKENS = 8192
"""Enough for mean squares, and for a plan's checks besides."""
_TOKENS_PER_INPUT = 8
"""Tokens for each input of the widest layer where covariances are needed: four times what they need to be used unshrunk."""
_MORE = (
    "Where that was measured (docs/text.md), twice as many lowered the KL divergence by 7 %, four times as many by 28 %; "
    "`slimlm plan` says how long each further sample takes"
)
"""What another amount brings."""


@dataclass(frozen=True)
class Amount:
    """How many samples of how many tokens."""

    samples: int
    length: int
    reason: str | None
    """Why so many; None where the user said both."""


def amount_of(
    asked: tuple[int | None, int | None],
    shapes: dict[str, tuple[int, int]],
    recipe: Recipe,
    *,
    context: int | None,
    planned: bool,
) -> Amount:
    """The samples and their length: those that the user asked for, and what the model and the recipe need in place of None.

    Args:
        asked: Samples and length.
        shapes: The shape (out, in) of each layer that is compressed, by full name.
        recipe: The recipe.
        context: The model's context in tokens; None: it has no limit.
        planned: Whether a plan is made, which takes some of the text for itself.
    """
    samples, length = asked
    if samples is not None and length is not None:
        return Amount(samples, length, None)
    length = min(length or _LENGTH, context or length or _LENGTH)
    name, (_, width) = max(shapes.items(), key=lambda entry: entry[1][1])
    needs_covariances = planned or Covariance in recipe.needs
    tokens = max(_LEAST_TOKENS, _TOKENS_PER_INPUT * width if needs_covariances else 0)
    chosen = samples or -(-tokens // length)
    if samples is None and planned:
        # A plan takes whole samples for itself.
        chosen += 2 * judged_windows(chosen, length)[0]
    widest = f"{_TOKENS_PER_INPUT} tokens for each of the {width} inputs of the widest layer ({name}). {_MORE}"
    why = widest if needs_covariances and _TOKENS_PER_INPUT * width > _LEAST_TOKENS else f"{_LEAST_TOKENS} tokens"
    return Amount(chosen, length, why if samples is None else None)
