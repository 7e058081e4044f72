"""Between the products of one token: the kernels give what the formulas say."""

import pytest
import torch
from torch.nn import functional as F

from slimlm.core.errors import KernelError
from slimlm.runtime import native, token

pytestmark = pytest.mark.skipif(native.library() is None, reason="there are no CPU kernels")


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [1, 7, 64, 770])
def test_the_norm_is_the_formula(width: int) -> None:
    x, weight = seeded(3, width) * 5, seeded(width, seed=1)
    expected = F.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    assert torch.allclose(token.norm(weight, 1e-5)(x).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 127, 300])
def test_the_gate_is_the_formula_also_far_out(count: int) -> None:
    gate, up = seeded(2, count) * 60, seeded(2, count, seed=1)
    expected = F.silu(gate.double()) * up
    assert torch.allclose(token.swiglu(gate.clone(), up).double(), expected, rtol=1e-5, atol=1e-30)


def test_nan_in_a_gate_stays_where_it_is() -> None:
    gate = torch.tensor([[1.0, float("nan"), -2.0]])
    assert token.swiglu(gate, torch.ones(1, 3)).isnan().tolist() == [[False, True, False]]


def attention(batch: int, heads: int, group: int, dim: int, length: int) -> tuple[token.Attention, torch.Tensor, torch.Tensor]:
    """An attention over random caches, and copies of them."""
    keys, values = seeded(batch * heads, length, dim), seeded(batch * heads, length, dim, seed=1)
    angle = seeded(length, dim // 2, seed=2)
    cos = torch.cat((angle.cos(), angle.cos()), dim=1)
    sin = torch.cat((-angle.sin(), angle.sin()), dim=1)
    scale = dim**-0.5
    return token.Attention(keys, values, (cos * scale, sin * scale), (cos, sin), batch=batch, group=group), keys, values


@pytest.mark.parametrize(("batch", "heads", "group", "dim"), [(1, 1, 1, 2), (2, 3, 4, 64), (3, 2, 1, 10), (1, 4, 2, 80)])
@pytest.mark.parametrize("position", [0, 1, 140])
def test_attention_is_the_formula(batch: int, heads: int, group: int, dim: int, position: int) -> None:
    attend, keys, values = attention(batch, heads, group, dim, 150)
    kept_keys, kept_values = keys.clone(), values.clone()
    queries = seeded(batch, heads * group * dim, seed=3)
    new_keys, new_values = seeded(batch, heads * dim, seed=4), seeded(batch, heads * dim, seed=5)

    found = attend(queries, new_keys, new_values, position)

    def turned(x: torch.Tensor) -> torch.Tensor:
        cos, sin = attend.kept[2][position], attend.kept[3][position]
        return x * cos + x.roll(dim // 2, dims=-1) * sin

    kept_keys[:, position] = turned(new_keys.view(-1, dim))
    kept_values[:, position] = new_values.view(-1, dim)
    scores = turned(queries.view(batch * heads, group, dim)) @ kept_keys[:, : position + 1].mT * dim**-0.5
    expected = torch.softmax(scores.double(), dim=-1) @ kept_values[:, : position + 1].double()
    assert torch.allclose(found.view_as(expected).double(), expected, atol=1e-5)
    assert torch.allclose(keys, kept_keys, atol=1e-6)
    assert torch.equal(values, kept_values)


def test_nan_in_one_text_stays_in_it() -> None:
    attend, _, _ = attention(2, 2, 2, 16, 10)
    queries = seeded(2, 64, seed=3)
    queries[1, 3] = float("nan")
    found = attend(queries, seeded(2, 32, seed=4), seeded(2, 32, seed=5), 7)
    assert not found[0].isnan().any()
    assert found[1, :16].isnan().all()


def test_a_position_outside_the_cache_is_refused() -> None:
    attend, _, _ = attention(1, 1, 1, 8, 5)
    with pytest.raises(KernelError, match="position 5 is outside a cache of 5"):
        attend(seeded(1, 8), seeded(1, 8), seeded(1, 8), 5)
