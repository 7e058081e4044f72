"""Calibration text from several sources, each with a share of the samples."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from slimlm.core import arguments
from slimlm.core.errors import DataError
from slimlm.data.documents import Source, name_of

_CLOSE = 1e-6
"""How far shares may be from 1 together: thirds have an end as floating-point numbers."""


@dataclass(frozen=True)
class Portion:
    """A source and its share."""

    source: Source
    """The source."""
    share: float
    """Its share of the samples, above 0 and at most 1."""


@dataclass(frozen=True)
class Mixture:
    """Several sources, whose shares add up to 1."""

    portions: tuple[Portion, ...]
    """The sources, in the order in which they were given."""

    @classmethod
    def of(cls, shares: Mapping[str, float]) -> "Mixture":
        """The mixture of sources by name.

        Raises:
            DataError: Shares do not add up to 1 or are no shares, a source is named twice, or cannot be mixed with others.
        """
        if "self" in shares and len(shares) > 1:
            raise DataError("`data`: 'self', text that the model writes, cannot be mixed with other texts; leave it out")
        portions = tuple(Portion(name, _share(name, share)) for name, share in shares.items())
        total = sum(portion.share for portion in portions)
        if abs(total - 1) > _CLOSE:
            summed = " + ".join(f"{portion.share:g}" for portion in portions)
            raise DataError(f"`data`: the shares {summed} add up to {total:g}, not to 1")
        _refuse_same(list(shares))
        return cls(portions)


Data = Source | Mixture
"""Calibration text: one source, or several."""


def portions_of(data: Data) -> tuple[Portion, ...]:
    """The sources of calibration text; one alone has the share 1."""
    return data.portions if isinstance(data, Mixture) else (Portion(data, 1.0),)


def recorded_name(data: Data) -> str:
    """Calibration text as it is recorded, without the folders of its files."""
    if not isinstance(data, Mixture):
        return name_of(data)
    return ", ".join(f"{name_of(portion.source)} ({portion.share:g})" for portion in data.portions)


def interleaved(shares: list[float], count: int) -> list[int]:
    """For each of `count` samples the number of the source that it is drawn from.

    At every place k the samples so far of a source with share s are less than one away from s k, and at most 1 - 1 / (2 m - 2)
    for m sources. (R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32, 1980.)

    Args:
        shares: The share of each source; they are taken relative to their sum.
        count: How many samples there are.
    """
    if len(shares) == 1:
        return [0] * count
    given = [Fraction(str(share)) for share in shares]
    exact = [share / sum(given) for share in given]
    least = Fraction(1, 2 * len(shares) - 2)
    drawn, order = [0] * len(shares), []
    for k in range(1, count + 1):
        behind = [share * k - own for share, own in zip(exact, drawn, strict=True)]
        # Of those that may be drawn from, the one that would be too far behind first.
        chosen = min((i for i in range(len(shares)) if behind[i] >= least), key=lambda i: (1 - least - behind[i]) / exact[i])
        drawn[chosen] += 1
        order.append(chosen)
    return order


def each_at_least_once(shares: list[float], count: int) -> list[int]:
    """How many of `count` samples each source gives: by shares, but at least one where there are enough for all."""
    order = interleaved(shares, count)
    counts = [order.count(i) for i in range(len(shares))]
    if count >= len(shares):
        for missing in (i for i in range(len(shares)) if not counts[i]):
            counts[counts.index(max(counts))] -= 1
            counts[missing] += 1
    return counts


def most_samples(shares: list[float], available: list[int]) -> int:
    """The most samples in all for which every source has enough."""
    left = list(available)
    for count, source in enumerate(interleaved(shares, sum(available) + 1)):
        if not left[source]:
            return count
        left[source] -= 1
    raise AssertionError("one more sample than there are")


def _share(name: str, given: object) -> float:
    share = float(arguments.real_number(given, f"data: share of {name}", example=0.5, refusal=DataError))
    if not 0 < share <= 1:
        raise DataError(f"`data`: the share of {name} is {share:g}; give a part of the whole, above 0 and at most 1")
    return share


def _refuse_same(names: list[str]) -> None:
    """Raise DataError where two names are one file, or a folder and what is in it."""
    places = [Path(name).resolve() if Path(name).exists() else None for name in names]
    for i, place in enumerate(places):
        for name, other in zip(names[:i], places[:i], strict=True):
            if place is not None and other is not None and (place.is_relative_to(other) or other.is_relative_to(place)):
                raise DataError(f"`data`: {names[i]} and {name} hold the same text, which would be drawn twice; name it once")
