"""Alternation: mask, codes and low-rank adapter decided together, in turn, against one objective.

slimlm's own method; no paper describes it as a whole. SLiM (Mozaffari, Yazdanbakhsh, Mehri Dehnavi: SLiM: One-shot Quantization
and Sparsity with Low-rank Approximation for LLM Weight Compression, arXiv 2410.09615, equation 1) states the objective for the
sum of a pruned, rounded base B and an adapter L R, but decides them once, one after another. Here, with H the covariance of the
inputs that the layer has in the compressed model and G the reference,

    minimise tr((G - B - L R) H (G - B - L R)^T)

by turns: B is the sweep (SparseGPT and GPTQ in one, slimlm.core.solvers.sweep) of G - L R, mask and scales chosen again; L R
is the best product for G - B (QERA's optimum, slimlm.core.solvers.linalg). After the sweeps, coordinate descent improves the
base and the factors are rounded afresh in each round, and refitted in the best. At last base and codes of 4- and 8-bit factors
are improved together: coordinate descent on both, in turn. The result is the best iterate. Alternation of this kind for sparse
plus low-rank without rounding is HASSLE-free (Makni et al.: HASSLE-free: A unified Framework for Sparse plus Low-Rank Matrix
Decomposition for LLMs, arXiv 2502.00899) and OATS (Zhang, Papyan: OATS: Outlier-Aware Pruning Through Sparse and Low Rank
Decomposition, arXiv 2409.13652); for rounding plus low-rank CALDERA (Saha et al.: Compressing Large Language Models using Low
Rank and Low Precision Decomposition, arXiv 2405.18886).

The reference G is the original weight W, or in asymmetric calibration the weight that best gives the original model's outputs
from the inputs of the compressed model (Li et al.: GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration,
arXiv 2504.02692; departure: the correction is applied to the reference once, not column by column, so that mask and adapter
have it, too):

    G = W + M (H + a I)^-1        M = mean of d^T x over tokens, a = `asymmetric` x the mean diagonal of H

d is the residual of the layer's outputs, and a holds G near W where the inputs are small; `asymmetric` = 0 leaves G = W. For a
layer whose output is added to the block's output as it is (the last of a block, mostly) d is the residual of the block's
output, so that it also corrects the errors of the layers before; for the others d = (z - x) W^T, z being the layer's inputs in
the original model, so M = W (C - H) with the cross-covariance C, the mean of z^T x.

codebook  "none": integer codes. "fitted": 2^bits values (at most 16) fitted to the weights that are rounded (under 2:4 none of
          them is near zero). "auto": a codebook, from the second sweep on, where it saves at least 4 % of the rounding error.
zero      True: each scale comes with a zero, as in GPTQ's files, and there is no codebook.
base      "sweep", or "project": highest |w| sqrt(H_jj) stay, scales searched, no error feedback (as OATS does).
norm      "full", or "diagonal": H is replaced by its diagonal throughout, except for the reference.
bits      16 leaves the base unrounded.
rank      a share of min(out, in); "auto" is resolved by the plan before a layer is reached, at the bits of rank 0.1.
rounds    largest number of sweeps; they stop when one gains less than `tolerance`. descent_rounds: largest number of rounds of
          coordinate descent on the base, and twice as many on base and factors together; these stop likewise.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from slimlm.core import grid
from slimlm.core.cache import Cache
from slimlm.core.errors import RecipeError
from slimlm.core.grid import Grid
from slimlm.core.layer import Layer
from slimlm.core.mask import Pattern, choose
from slimlm.core.objective import Objective
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.profiling import profiled
from slimlm.core.solvers import linalg
from slimlm.core.solvers.adapter_descent import descend_adapter
from slimlm.core.solvers.affine_search import scale_and_zero
from slimlm.core.solvers.base_descent import descend_base, gradient_of
from slimlm.core.solvers.codebook_fit import fitted_codebook
from slimlm.core.solvers.distribution import distribution
from slimlm.core.solvers.inverse import Inverse, check_damp, inverse_in_order, shrunk
from slimlm.core.solvers.low_rank import AdapterBits, AdapterFormat, low_rank_part
from slimlm.core.solvers.order import check_grouping, order_of
from slimlm.core.solvers.sweep import rounded_sweep, unrounded_sweep
from slimlm.core.solvers.swept import Swept
from slimlm.core.statistics.base import Needs, Stats
from slimlm.core.statistics.covariance import Covariance
from slimlm.core.statistics.cross_covariance import CrossCovariance
from slimlm.core.statistics.output_residual_covariance import OutputResidualCovariance
from slimlm.core.step import StepDefaults, widths_around

_CODEBOOK_SAVES = 0.04
"""Share of the rounding error that a codebook must save to be used under `codebook = "auto"`."""
_FRESH_SWEEPS = 2
"""Sweeps whose scales are searched from scratch; later ones start from the scales before."""
_STALLED = 2
"""Rounds of descent in a row that gain too little before it stops; one may be due to an unfavourable fresh rounding."""
_JOINT_SHARE = 0.4
"""Share of `tolerance` below which the joint descent stops: its gains are small and steady, and no later step undoes them."""
_AUTO_RANK = 0.1
"""The rank, as a share, whose bits `rank = "auto"` may spend."""
_AUTO_RANKS = (0.0, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3)
_BRIEF_ROUNDS, _BRIEF_DESCENT = 2, 1
"""Rounds of a trial, which suffice to rank a plan's options."""


@dataclass(frozen=True)
class Alternation(StepDefaults):
    """Mask, codes and adapters decided in turn against one objective until a round gains little."""

    bits: int = 4
    group_size: grid.GroupSize = 32
    pattern: str | float = "2:4"
    rank: float | Literal["auto"] = 0.1
    adapter_bits: AdapterBits = 4
    adapter_group_size: int = 128
    codebook: Literal["auto", "none", "fitted"] = "auto"
    zero: bool = False
    rounds: int = 16
    descent_rounds: int = 8
    tolerance: float = 0.005
    asymmetric: float = 0.1
    base: Literal["sweep", "project"] = "sweep"
    norm: Literal["full", "diagonal"] = "full"
    damp: float = 0.01
    weight_copies: ClassVar[int] = 14
    covariance_copies: ClassVar[int] = 14

    def __post_init__(self) -> None:
        if self.bits != 16:
            grid.check_bits(self.bits)
        grid.check_group_size(self.group_size)
        if self.sparsity is not None:
            check_grouping(self.group_size, self.sparsity)
        _ = self.adapter  # refuses what makes no sense
        check_damp(self.damp)
        if self.rounds < 1 or self.descent_rounds < 0 or not 0 <= self.tolerance < 1:
            raise RecipeError(
                f"rounds = {self.rounds}, descent_rounds = {self.descent_rounds}, tolerance = {self.tolerance}: give at least "
                "one round, no negative number, and a share below 1"
            )
        if self.base == "project" and self.codebook == "fitted":
            raise RecipeError(
                'codebook = "fitted" needs the weights that sweeps round; use base = "sweep", or codebook = "none"'
            )
        if self.zero and (self.codebook == "fitted" or self.bits == 16):
            raise RecipeError(
                f'zero = true, codebook = "{self.codebook}", bits = {self.bits}: zeros are of the scales of integer codes; use '
                'codebook = "none" or "auto", and 2 to 8 bits'
            )
        if self.codebook == "fitted" and self.bits > grid.LARGEST_CODEBOOK_BITS:
            raise RecipeError(
                f'codebook = "fitted", bits = {self.bits}: codebooks have up to {grid.LARGEST_CODEBOOK_BITS} bits; use "none"'
            )
        if self.codebook == "fitted" and self.rounds < 2:
            raise RecipeError(
                f'codebook = "fitted", rounds = {self.rounds}: the weights that a first sweep rounds are needed; give two'
            )
        if self.asymmetric != 0 and not 1e-6 <= self.asymmetric <= 1e6:
            raise RecipeError(
                f"asymmetric = {self.asymmetric}: give a damping from 1e-6 to 1e6, or 0 for the original weight as reference"
            )

    @property
    def needs(self) -> Needs:
        """The covariance of the inputs; in asymmetric calibration also the two that compare them with the original model's."""
        needs: Needs = frozenset({Covariance})
        return needs | {CrossCovariance, OutputResidualCovariance} if self.asymmetric else needs

    @property
    def sparsity(self) -> Pattern | None:
        """The pattern of the mask; None: the base is dense."""
        return None if self.pattern == "" else Pattern.parse(self.pattern)

    @property
    def adapter(self) -> AdapterFormat:
        """The size and format of the adapter."""
        rank = _AUTO_RANK if self.rank == "auto" else self.rank
        return AdapterFormat(rank, self.adapter_bits, self.adapter_group_size, True)

    @property
    def may_fit_codebook(self) -> bool:
        """Whether the search may fit a codebook."""
        return self.codebook != "none" and not self.zero

    @property
    def needs_plan(self) -> bool:
        """Whether ranks are left to a plan."""
        return self.rank == "auto"

    def resolved(self) -> Self:
        """With the rank whose bits a plan may spend."""
        return replace(self, rank=_AUTO_RANK) if self.needs_plan else self

    def with_rank(self, rank: float) -> Self:
        """With another rank, a share of min(out, in)."""
        return replace(self, rank=rank)

    def brief(self) -> Self:
        """With few rounds, and the original weight as the reference."""
        rounds, descent = min(self.rounds, _BRIEF_ROUNDS), min(self.descent_rounds, _BRIEF_DESCENT)
        return replace(self, rounds=rounds, descent_rounds=descent, asymmetric=0.0)

    def options(self, bits: float | None, objective: Objective) -> tuple[Self, ...]:
        """For size dense codes of widths around the budget, in long and in short groups; for speed 2:4 with adapters, too.

        By bytes alone 2:4 loses to fewer bits. Without 2:4 an adapter's bytes bring about as much as those of wider codes,
        and it slows generation and takes twice as long to try and to solve. For `rank = "auto"` and no other budget: the same
        base with other ranks.
        """
        if bits is None:
            return tuple(replace(self, rank=rank) for rank in _AUTO_RANKS) if self.needs_plan else ()
        widths = widths_around(bits)
        dense: list[tuple[int, int, str, float]] = [(width, size, "", 0.0) for size in (128, 32) for width in widths]
        sparse: list[tuple[int, int, str, float]] = []
        if objective == "speed":
            sparse = [(3, 64, "2:4", 0.1), (4, 64, "2:4", 0.05), (4, 32, "2:4", 0.1), (4, 32, "2:4", 0.2)]
        return tuple(self._stored_as(*option) for option in [*dense, *sparse])

    def _stored_as(self, bits: int, group_size: int, pattern: str, rank: float) -> Self:
        """With this base and adapter; with a codebook only where its bits allow one and the recipe does not exclude it."""
        fits = self.codebook != "none" and bits <= grid.LARGEST_CODEBOOK_BITS
        codebook: Literal["auto", "none"] = "auto" if fits else "none"
        return replace(self, bits=bits, group_size=group_size, pattern=pattern, rank=rank, codebook=codebook)

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        covariance, notes = shrunk(stats[Covariance].to(layer.original), stats.tokens)
        residual = stats.get(OutputResidualCovariance) if self.asymmetric else None
        if self.asymmetric and residual is None and (cross_covariance := stats.get(CrossCovariance)) is not None:
            residual = layer.original @ (cross_covariance.to(layer.original) - covariance)
        if self.asymmetric and residual is None:
            notes = (*notes, "no asymmetric calibration: tokens are routed differently than in the original model")
        elif self.asymmetric and notes:
            notes = (*notes, "no asymmetric calibration, for the same reason")
        elif residual is not None:
            reference = _reference(layer.original, covariance, residual.to(layer.original), self.asymmetric, stats.cache)
            layer = replace(layer, reference=reference)
        if self.norm == "diagonal":
            covariance = torch.diag(covariance.diagonal())
        search = _Search(self, layer, covariance, stats.cache if self.norm == "full" else Cache())
        search.run()
        inverse = search.inverse or search.adapter_inverse
        return search.result(layer).with_notes(*notes, *(() if inverse is None else inverse.notes))


@dataclass(frozen=True)
class _ReferenceFactor:
    """The Cholesky factor of H + a I."""

    lower: Tensor
    """float64 `[in, in]`"""

    @classmethod
    def of(cls, covariance: Tensor, amount: Tensor) -> "_ReferenceFactor":
        square = covariance.double()
        square.diagonal().add_(amount)
        return cls(torch.linalg.cholesky(square))


@profiled("reference")
def _reference(weight: Tensor, covariance: Tensor, residual: Tensor, damp: float, cache: Cache) -> Tensor:
    """W + M (H + a I)^-1 for a = damp x mean diagonal of H and M `[out, in]`; W where all inputs are dead (always zero).

    The factor of H + a I is taken from the cache where an earlier layer with the same inputs put it there.
    """
    amount = damp * covariance.diagonal().double().mean()
    if float(amount) == 0:
        return weight
    factor = cache.get(_ReferenceFactor, damp, lambda: _ReferenceFactor.of(covariance, amount))
    return weight + torch.cholesky_solve(residual.T.double(), factor.lower).T.to(weight)


class _Search:
    """The state of one layer's alternation."""

    def __init__(self, options: Alternation, layer: Layer, covariance: Tensor, cache: Cache) -> None:
        assert options.rank != "auto", "the plan gives every layer its rank before the layer is reached"
        self.options, self.covariance = options, covariance
        self.second_moment = covariance if options.norm == "full" else covariance.diagonal()
        self.reference = layer.reference if layer.outliers is None else layer.reference - layer.outliers.dense()
        self.given_mask = layer.mask
        self.pattern = options.sparsity
        self.grid = None if options.bits == 16 else Grid.of_bits(options.bits, zeros=options.zero)
        self.order = order_of(covariance.diagonal(), group_size=options.group_size, pattern=self.pattern)
        self.inverse = self._inverse(self.order.inputs, cache) if options.base == "sweep" else None
        rank = float(options.rank)
        self.unrounded_format = AdapterFormat(rank, 16, options.adapter_group_size, True)
        self.adapter_format = AdapterFormat(rank, options.adapter_bits, options.adapter_group_size, True)
        self.unrefitted_format = replace(self.adapter_format, refit=False)
        swept = options.norm == "full" and self.adapter_format.rank_of(layer.shape) > 0 and self.adapter_format.bits != 16
        self.adapter_inverse = self._inverse(torch.arange(len(covariance), device=covariance.device), cache) if swept else None
        self.base: Swept | None = None
        self.adapter: LowRank | None = None
        self.best: tuple[float, Swept, LowRank | None] | None = None
        self.measured: tuple[Swept, LowRank | None, Tensor] | None = None
        """base and adapter measured last, with what descent on the base starts from"""

    def _inverse(self, inputs: Tensor, cache: Cache) -> Inverse:
        return inverse_in_order(self.covariance, inputs, damp=self.options.damp, cache=cache)

    def run(self) -> None:
        """Sweeps against an unrounded adapter; descent from the best one against the adapter as stored; joint descent."""
        tolerance = self.options.tolerance
        best: tuple[float, Swept, LowRank | None] | None = None
        for number in range(self.options.rounds):
            self.base = self._sweep(number)
            error = self._refit_adapter(self.unrounded_format)
            gain = 1.0 if best is None else 1 - error / max(best[0], 1e-30)
            if gain > 0:
                best = error, self.base, self.adapter
            if gain <= tolerance:
                break
        assert best is not None
        _, self.base, self.adapter = best
        last = self._refit_adapter(self.unrefitted_format, count=True)
        stalled = 0
        for _ in range(self.options.descent_rounds if self.grid is not None else 0):
            self.base = self._descend()
            error = self._refit_adapter(self.unrefitted_format, count=True)
            stalled = stalled + 1 if last - error <= tolerance * last else 0
            if stalled == _STALLED:
                break
            last = min(error, last)
        assert self.best is not None
        self.base = self.best[1]
        self._refit_adapter(self.adapter_format, count=True)
        _, self.base, self.adapter = self.best
        if self.adapter is not None and self.adapter_format.bits != 16 and self.grid is not None:
            self._descend_jointly()

    def _descend_jointly(self) -> None:
        """Descent on the base and the adapter's codes in turn, from where they are; nothing raises the objective any more."""
        assert self.best is not None
        for _ in range(2 * self.options.descent_rounds):
            last = self.best[0]
            self.base = self._descend()
            assert self.adapter is not None
            residual = self.reference - self.base.value
            self.adapter = descend_adapter(residual, self.covariance, self.adapter)
            error = self._measured(residual - self.adapter.dense())
            if last - error <= _JOINT_SHARE * self.options.tolerance * last:
                break

    def result(self, layer: Layer) -> Layer:
        """The layer with the best iterate."""
        assert self.best is not None
        _, base, adapter = self.best
        if base.mask is not None and self.given_mask is None:
            layer = layer.with_mask(base.mask, str(self.options.pattern))
        layer = replace(layer, adapter=adapter)
        if base.grid is None:
            return layer.with_updated_weight(base.value)
        return layer.with_base(base.part(self.options.group_size))

    def _base_reference(self) -> Tensor:
        """What the base should stand for, `[out, in]`, given the present adapter."""
        return self.reference if self.adapter is None else self.reference - self.adapter.dense()

    def _sweep(self, number: int) -> Swept:
        reference, options = self._base_reference(), self.options
        pattern = None if self.given_mask is not None else self.pattern
        if options.base == "project":
            return _projected(reference, self.covariance.diagonal(), self.grid, options.group_size, pattern, self.given_mask)
        assert self.inverse is not None
        if self.grid is None:
            return unrounded_sweep(reference, self.inverse, self.order, pattern=pattern, mask=self.given_mask)
        start = None if number < _FRESH_SWEEPS else self.base
        swept = rounded_sweep(
            reference,
            self.inverse,
            self.order,
            grid=self.grid,
            pattern=pattern,
            mask=self.given_mask,
            start=start,
        )
        if options.may_fit_codebook and options.bits <= grid.LARGEST_CODEBOOK_BITS:
            self._fit_codebook(swept)
        return swept

    def _fit_codebook(self, swept: Swept) -> None:
        """Fit a codebook for the next sweep to the weights that this one rounded, where it is asked for or errs less."""
        assert swept.scale is not None and self.grid is not None and self.inverse is not None
        scale = grid.spread(swept.scale, swept.value.shape[1], self.options.group_size).expand_as(swept.value)
        counted = scale.square() if swept.mask is None else scale.square() * swept.mask
        # A scale of zero, and what is dropped, have no weight.
        sets = (swept.updated * grid.reciprocal(scale)).view(1, -1)
        weights = (self.inverse.conditional_variance[self.order.positions] * counted).view(1, -1)
        if not bool(weights.any()):
            return
        (ratio,), (weights,) = distribution(sets, weights)
        codebook = fitted_codebook(ratio, weights, self.grid)

        def error(candidate: Grid) -> float:
            return float(((candidate.nearest(ratio) - ratio).square() * weights).sum())

        pays = error(codebook) < (1 - _CODEBOOK_SAVES) * error(Grid.of_bits(self.options.bits))
        if self.options.codebook == "fitted" or pays:
            self.grid = codebook

    def _descend(self) -> Swept:
        assert self.base is not None
        gradient = None
        if self.measured is not None and self.measured[0] is self.base and self.measured[1] is self.adapter:
            gradient, self.measured = self.measured[2], None
        return descend_base(
            self._base_reference(),
            self.covariance,
            self.base,
            group_size=self.options.group_size,
            pattern=None if self.given_mask is not None else self.pattern,
            gradient=gradient,
        )

    def _refit_adapter(self, form: AdapterFormat, *, count: bool = False) -> float:
        """Refit the adapter to the base; the objective then. `count`: whether the iterate may become the best."""
        assert self.base is not None
        residual = self.reference - self.base.value
        start = None if self.adapter is None else torch.linalg.qr(self.adapter.left.dense().T).Q
        self.adapter = low_rank_part(residual, self.second_moment, form, start=start, inverse=self.adapter_inverse)
        remaining = residual if self.adapter is None else residual - self.adapter.dense()
        return self._measured(remaining, count=count)

    def _measured(self, remaining: Tensor, *, count: bool = True) -> float:
        """The objective of the present base and adapter, of which `remaining` `[out, in]` is the error."""
        assert self.base is not None
        if self.options.norm == "full":
            gradient, error = gradient_of(remaining, self.covariance)
            self.measured = self.base, self.adapter, gradient
        else:
            error = linalg.weighted_square(remaining, self.second_moment)
        if count and (self.best is None or error < self.best[0]):
            self.best = error, self.base, self.adapter
        return error


def _projected(
    reference: Tensor,
    second_moment: Tensor,
    base_grid: Grid | None,
    group_size: grid.GroupSize,
    pattern: Pattern | None,
    given_mask: Tensor | None,
) -> Swept:
    """The base without error feedback: the mask of highest |w| sqrt(H_jj), scales of least squared error under H_jj."""
    mask = given_mask if pattern is None else choose(reference.abs() * second_moment.clamp_min(0).sqrt(), pattern)
    masked = reference if mask is None else reference * mask
    if base_grid is None:
        return Swept(masked, reference, mask)
    sets = grid.scale_sets(masked, group_size)
    weights = (
        torch.ones_like(sets) if group_size == "per-tensor" else grid.scale_sets(second_moment.expand_as(masked), group_size)
    )
    if group_size == "per-tensor":
        sets, weights = distribution(sets)
    found, zeros = scale_and_zero(sets, weights, base_grid)
    shape, width = grid.scale_shape((len(masked), masked.shape[1]), group_size), masked.shape[1]
    scale, zero = grid.storable(found.view(shape)).float(), None if zeros is None else zeros.view(shape)
    wide = None if zero is None else grid.spread(zero, width, group_size)
    index, value = base_grid.round(masked, grid.spread(scale, width, group_size).expand_as(masked), wide)
    return Swept(value if mask is None else value * mask, reference, mask, index.to(torch.uint8), scale, base_grid, zero)
