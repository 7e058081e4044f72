"""What every statistic owes, whoever wrote it. A statistic joins this suite by existing."""

import inspect
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from slimlm.calibration.measurement import LayerTotals
from slimlm.core import registry
from slimlm.core.errors import StatisticError
from slimlm.core.statistics.base import Batch, Sizes, Source, Statistic, Stats, in_order
from slimlm.core.statistics.covariance import Covariance
from slimlm.core.statistics.mean_square import MeanSquare
from slimlm.core.statistics.peak_abs import PeakAbs
from slimlm.distributed.group import Group

SIZES = Sizes(outputs=5, inputs=7, length=6)
SAMPLES = 8
CPU = torch.device("cpu")

every_statistic = pytest.mark.parametrize("statistic", registry.statistics(), ids=lambda statistic: statistic.__name__)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TOKENS = SAMPLES * SIZES.length
X, Z, D = draw(TOKENS, SIZES.inputs, seed=0), draw(TOKENS, SIZES.inputs, seed=1), draw(TOKENS, SIZES.outputs, seed=2)
G = draw(TOKENS, SIZES.outputs, seed=3)


def batches(*ends: int) -> list[Batch]:
    """The samples cut after these numbers of them."""
    cuts = [end * SIZES.length for end in (0, *ends, SAMPLES)]
    return [whole_batch(X[low:high], Z[low:high], D[low:high], G[low:high]) for low, high in pairwise(cuts)]


def whole_batch(x: Tensor, z: Tensor, d: Tensor, g: Tensor) -> Batch:
    """A batch of whole samples that has everything."""
    return Batch(x, SIZES.length, z, d, g, len(x) // SIZES.length)


def measured(statistic: type[Statistic], *ends: int) -> Statistic:
    found = statistic()
    for batch in batches(*ends):
        found.add(batch)
    return found


def result(found: Statistic) -> Tensor:
    finished = found.result(TOKENS, SIZES.length)
    assert finished is not None
    return finished


@every_statistic
@pytest.mark.parametrize("ends", [(3,), (1, 2, 5), (1, 2, 3, 4, 5, 6, 7)], ids=str)
def test_batches_in_any_split_give_the_same(statistic: type[Statistic], ends: tuple[int, ...]) -> None:  # law 20
    # Products of a batch are float32, and a batch of another size sums in another order.
    torch.testing.assert_close(result(measured(statistic, *ends)), result(measured(statistic)), rtol=1e-4, atol=1e-6)


@every_statistic
def test_the_bytes_counted_are_the_bytes_held(statistic: type[Statistic]) -> None:
    found = measured(statistic, 3)
    assert found.total is not None
    assert found.total.dtype == statistic.total_dtype and found.total.shape == statistic.shape(SIZES)
    assert found.total.nbytes == statistic.total_bytes(SIZES)
    finished = result(found)
    assert finished.dtype == torch.float32 and finished.shape == statistic.shape(SIZES)
    assert finished.nbytes == statistic.result_bytes(SIZES)


@every_statistic
def test_merging_is_measuring_together(statistic: type[Statistic]) -> None:
    one, other = statistic(), statistic()
    first, *others = batches(3, 5)
    one.add(first)
    for batch in others:
        other.add(batch)
    untouched = result(other).clone()
    merged = statistic()
    merged.merge(one)
    merged.merge(other)
    torch.testing.assert_close(result(merged), result(measured(statistic)), rtol=1e-4, atol=1e-6)
    assert torch.equal(result(other), untouched)


class Ranks(Group):
    """Ranks whose tensors are all at hand, in the place of real processes: the totals of the others, by the order of calls."""

    def __init__(self, others: list[LayerTotals]) -> None:
        self.waiting = [[own.total for own in each.statistics if own.total is not None] for each in others]

    def _next(self) -> list[Tensor]:
        return [totals.pop(0) for totals in self.waiting if totals]

    def all_reduce_sum(self, own: Tensor) -> Tensor:
        return own + torch.stack(self._next()).sum(dim=0)

    def all_reduce_max(self, own: Tensor) -> Tensor:
        return torch.stack([own, *self._next()]).amax(dim=0)


@every_statistic
@pytest.mark.parametrize("empty_handed", [False, True])
def test_ranks_merged_are_one_process(statistic: type[Statistic], empty_handed: bool) -> None:
    parts = [LayerTotals(frozenset({statistic}), SIZES.length, "a layer") for _ in range(3)]
    shares = [[], *[[batch] for batch in batches(3)]] if empty_handed else [[batch] for batch in batches(3, 5)]
    for part, share in zip(parts, shares, strict=True):
        for batch in share:
            part.include(batch)
    reports = [part.report() for part, share in zip(parts, shares, strict=True) if share]
    parts[0].merge_ranks(reports, Ranks(parts[1:]), CPU)
    assert parts[0].tokens == TOKENS
    torch.testing.assert_close(parts[0].stats(CPU)[statistic], result(measured(statistic)), rtol=1e-4, atol=1e-6)


@every_statistic
def test_a_batch_is_not_changed_and_not_held(statistic: type[Statistic]) -> None:
    given = [tensor.double() for tensor in (X, Z, D, G)]
    found = statistic()
    for _ in range(2):
        found.add(whole_batch(*given))
    assert all(torch.equal(tensor, before.double()) for tensor, before in zip(given, (X, Z, D, G), strict=True))
    assert found.total is not None
    assert found.total.data_ptr() not in {tensor.data_ptr() for tensor in given}


@every_statistic
def test_the_class_says_what_it_is(statistic: type[Statistic]) -> None:
    text = inspect.getdoc(statistic)
    assert text and text.startswith("`[") and text.splitlines()[0].endswith(".")
    assert statistic.__name__.lower() == statistic.__module__.rpartition(".")[2].replace("_", "")


def test_original_inputs_that_cannot_be_paired_give_the_statistic_up() -> None:
    comparing = [statistic for statistic in registry.statistics() if statistic.source is Source.ORIGINAL_INPUTS]
    assert comparing
    for statistic in comparing:
        whole, partly = measured(statistic), measured(statistic)
        partly.add(Batch(X, SIZES.length))
        assert partly.result(2 * TOKENS, SIZES.length) is None
        whole.merge(partly)
        assert whole.result(3 * TOKENS, SIZES.length) is None


# What a step is given of them


def test_a_statistic_that_was_not_declared_is_an_error_that_names_both() -> None:
    stats = Stats(4, {MeanSquare: torch.ones(3), PeakAbs: torch.ones(3)})
    for read in (stats.__getitem__, stats.get):
        with pytest.raises(StatisticError, match=r"read Covariance.*declared and measured: MeanSquare, PeakAbs"):
            read(Covariance)
    assert torch.equal(stats[MeanSquare], torch.ones(3))


def test_a_statistic_that_a_layer_does_not_have_is_none_where_it_is_asked_for_so() -> None:
    stats = Stats(4, {Covariance: None})
    assert stats.get(Covariance) is None
    with pytest.raises(StatisticError, match=r"no Covariance.*stats\.get"):
        stats[Covariance]


def test_a_step_sees_what_it_declares_and_shares_the_cache() -> None:
    stats = Stats(4, {MeanSquare: torch.ones(3), PeakAbs: torch.ones(3)}, "a note")
    seen = stats.restricted_to(frozenset({PeakAbs}))
    assert seen.values.keys() == {PeakAbs} and (seen.tokens, seen.note) == (4, "a note")
    assert seen.cache is stats.cache
    with pytest.raises(StatisticError, match="read MeanSquare"):
        seen[MeanSquare]


def test_the_order_of_statistics_does_not_depend_on_the_process() -> None:
    names = [statistic.__name__ for statistic in in_order(frozenset(registry.statistics()))]
    assert names == sorted(names)
