"""What is computed once for layers that share an input."""

import torch

from slimlm.core.cache import Cache


def test_a_value_is_computed_once_for_a_type_and_a_key() -> None:
    cache, calls = Cache(), []

    def compute(value: object) -> object:
        calls.append(value)
        return value

    assert cache.get(int, "a", lambda: compute(1)) == 1  # type: ignore[arg-type, return-value]
    assert cache.get(int, "a", lambda: compute(2)) == 1  # type: ignore[arg-type, return-value]
    assert cache.get(int, "b", lambda: compute(3)) == 3  # type: ignore[arg-type, return-value]
    assert cache.get(str, "a", lambda: compute("other")) == "other"  # type: ignore[arg-type, return-value]
    assert calls == [1, 3, "other"] and len(cache) == 3


def test_a_tensor_is_handed_out_as_it_is() -> None:
    cache, tensor = Cache(), torch.ones(2)
    assert cache.get(torch.Tensor, (0.1, 2), lambda: tensor) is tensor
    assert cache.get(torch.Tensor, (0.1, 2), lambda: torch.zeros(2)) is tensor
