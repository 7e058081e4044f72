"""Between the products of one token, by the CPU kernels: RMS norm, SwiGLU, one query against all keys seen.

Each is a few microseconds of arithmetic, which several torch operations would cost in calls alone. All tensors are
float32 on the CPU; nothing here is differentiable. csrc/token.h has the arithmetic.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from slimlm.core.errors import KernelError
from slimlm.runtime import native


class _Attention(ctypes.Structure):
    """Mirrors SlimlmAttention."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("queries", "keys", "values", "query_cos", "query_sin", "key_cos", "key_sin")),
        *((name, ctypes.c_void_p) for name in ("key_cache", "value_cache", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "key_heads", "group", "dim", "length", "position")),
    )


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether these functions can stand in for torch's on this device, in this dtype."""
    return device.type == "cpu" and dtype == torch.float32 and native.library() is not None


@cache
def _library() -> ctypes.CDLL:
    found = native.library()
    assert found is not None, "usable() says whether there is one"
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    found.slimlm_norm.argtypes = [pointer, pointer, ctypes.c_float, i64, i64, pointer]
    found.slimlm_swiglu.argtypes = [pointer, pointer, i64, pointer]
    found.slimlm_attend.argtypes = [ctypes.POINTER(_Attention), ctypes.c_int32]
    return found


def norm(weight: Tensor, epsilon: float) -> Callable[[Tensor], Tensor]:
    """x `[rows, width]` to x / sqrt(mean(x^2) + epsilon) * weight, in a tensor of its own."""
    call, width, address = _library().slimlm_norm, weight.shape[0], weight.data_ptr()

    def of(x: Tensor, weight: Tensor = weight) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        call(x.data_ptr(), address, epsilon, x.shape[0], width, y.data_ptr())
        return y

    return of


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up, written over gate where that is contiguous."""
    gate, up = gate.contiguous(), up.contiguous()
    _library().slimlm_swiglu(gate.data_ptr(), up.data_ptr(), gate.numel(), gate.data_ptr())
    return gate


class Attention:
    """Attention of one new token of each text against the cache of one block, which it extends.

    Caches are `[batch x key heads, length, dim]`; turns are (cosines, sines) `[length, dim]`, the sines with the sign of
    each coordinate's partner, the queries' times the attention's scale.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        query_turn: tuple[Tensor, Tensor],
        key_turn: tuple[Tensor, Tensor],
        *,
        batch: int,
        group: int,
    ) -> None:
        heads, length, dim = keys.shape
        self.kept = [t.contiguous() for t in (*query_turn, *key_turn)]
        self.keys, self.values = keys, values
        self.out = (batch, heads // batch * group * dim)
        self._addresses = [t.data_ptr() for t in self.kept]
        self._row = 4 * dim
        self._call = _library().slimlm_attend
        self._arguments = _Attention(
            key_cache=keys.data_ptr(),
            value_cache=values.data_ptr(),
            batch=batch,
            key_heads=heads // batch,
            group=group,
            dim=dim,
            length=length,
        )

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        """The mixed values `[batch, heads x dim]` of the token at `position`, its keys and values now in the cache."""
        queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
        arguments, offset = self._arguments, position * self._row
        out = queries.new_empty(self.out)
        arguments.queries, arguments.keys, arguments.values = queries.data_ptr(), keys.data_ptr(), values.data_ptr()
        query_cos, query_sin, key_cos, key_sin = self._addresses
        arguments.query_cos, arguments.query_sin = query_cos + offset, query_sin + offset
        arguments.key_cos, arguments.key_sin = key_cos + offset, key_sin + offset
        arguments.out, arguments.position = out.data_ptr(), position
        if self._call(arguments, torch.get_num_threads()):
            raise KernelError(f"position {position} is outside a cache of {self.keys.shape[1]}")
        return out
