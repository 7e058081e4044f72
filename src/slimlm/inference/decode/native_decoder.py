"""Tokens through all blocks of a Llama-like model in one call of the CPU kernels, from the prompt to the last new token.

Every linear layer must be in the kernels' layout, in one precision, and activations are float32. csrc/decoder.h has the
arithmetic: RMS norms, rotary embedding, attention over a cache of fixed size and SwiGLU lie between the packed products, so
that a token costs one call in place of several hundred operations, and a prompt makes no tensor larger than a few of its rows.
Keys and values are kept in float32 for precise kernels. For fast ones they are kept in float16 as long as that holds them: from
the first one on that is too large, or whose head's numbers are all below 2^-16, in float32.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimlm.core.errors import KernelError
from slimlm.runtime.backends import cpu
from slimlm.runtime.cpu import native
from slimlm.runtime.cpu.kernels import BEYOND_HALF, PRECISIONS, Product, float_type, found, product
from slimlm.runtime.linear import Multiplier

PRODUCTS = ("queries", "keys", "values", "attention_out", "gate", "up", "down")
"""The linear layers of a block, in the order of csrc/kernels.h."""
_ROWS = 128
"""Prompt tokens, all texts together, that go through the blocks at once: as many as the products take at once."""


class _Block(ctypes.Structure):
    """Mirrors SlimlmBlock."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, Product) for name in PRODUCTS),
        *((name, ctypes.c_void_p) for name in ("key_cache", "value_cache")),
    )


class _Decoder(ctypes.Structure):
    """Mirrors SlimlmDecoder."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("blocks", "last_norm")),
        ("head", Product),
        *((name, ctypes.c_void_p) for name in ("query_cos", "query_sin", "key_cos", "key_sin")),
        *((n, ctypes.c_int64) for n in ("count", "batch", "width", "mlp", "key_heads", "group", "dim", "length", "vocabulary")),
        ("epsilon", ctypes.c_float),
        ("cache_type", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Norms:
    """The weights of a block's RMS norms, float32: `[width]`, and `[head_dim]` where queries and keys have their own."""

    attention: Tensor
    mlp: Tensor
    query: Tensor | None
    key: Tensor | None


@dataclass(frozen=True)
class Parts:
    """What a model is made of, for `PackedDecoder`."""

    embed: Callable[[Tensor], Tensor]
    """from tokens to float32 rows `[..., width]`"""
    norms: Sequence[Norms]
    """of each block"""
    products: Sequence[Sequence[Multiplier]]
    """the linear layers of each block, in the order of PRODUCTS"""
    last_norm: Tensor
    """float32 `[width]`"""
    head: Multiplier
    epsilon: float
    """of all norms"""
    head_dim: int
    scaling: float
    """of queries times keys"""
    turn: Callable[[int], tuple[Tensor, Tensor]]
    """from a length to cosines and sines, float32 `[length, head_dim]` each, as transformers' rotary modules give them"""


def refuses(modules: Sequence[nn.Module]) -> str | None:
    """Why these linear layers (the head among them) cannot be multiplied within one call, in words; None: they can."""
    if native.library() is None:
        return f"there are no CPU kernels: {native.status().reason}"
    precisions = set()
    for module in modules:
        choice = module.choice() if isinstance(module, Multiplier) else None
        if choice is None or not isinstance(choice.backend, cpu.Cpu):
            return f"a {type(module).__name__} among its layers is not multiplied by the CPU kernels"
        precisions.add(choice.backend.precision)
    return None if len(precisions) == 1 else "some of its layers run on fast kernels and some on precise ones"


class PackedDecoder:
    """A model with room for `length` positions of `batch` texts of equal length.

    It holds the model's weights as they are now, and takes the calls of one thread at a time.
    """

    def __init__(self, parts: Parts, *, batch: int, length: int) -> None:
        self.embed, self.batch, self.length, self.position = parts.embed, batch, length, 0
        first = parts.products[0]
        width, mlp, dim = first[0].in_features, first[4].out_features, parts.head_dim
        key_heads = first[1].out_features // dim
        self.width, self.vocabulary = width, parts.head.out_features
        backend = parts.head.choice().backend
        assert isinstance(backend, cpu.Cpu), "refuses() says so"
        self.way = "the CPU kernels, all blocks in one call"
        self._precision = PRECISIONS[backend.precision]
        kept = torch.float16 if backend.precision == "fast" else torch.float32
        self.keys = torch.zeros(len(parts.products), batch * key_heads, length, dim, dtype=kept)
        """[blocks, batch x key heads, length, head_dim]"""
        self.values = torch.zeros_like(self.keys)
        """as the keys"""
        cos, sin = (turn.float() for turn in parts.turn(length))
        signed = torch.cat((-sin[:, : dim // 2], sin[:, dim // 2 :]), dim=-1)
        # The library knows addresses only; this list keeps alive what lies there.
        self._alive: list[object] = [parts]
        blocks = (_Block * len(parts.products))()
        for block, norms, layers in zip(blocks, parts.norms, parts.products, strict=True):
            block.attention_norm, block.mlp_norm = self._at(norms.attention), self._at(norms.mlp)
            block.query_norm, block.key_norm = self._at(norms.query), self._at(norms.key)
            for name, layer in zip(PRODUCTS, layers, strict=True):
                setattr(block, name, self._product(layer))
        self._blocks = blocks
        self._decoder = _Decoder(
            blocks=ctypes.addressof(blocks),
            last_norm=self._at(parts.last_norm),
            head=self._product(parts.head),
            query_cos=self._at(cos * parts.scaling),
            query_sin=self._at(signed * parts.scaling),
            key_cos=self._at(cos),
            key_sin=self._at(signed),
            count=len(blocks),
            batch=batch,
            width=width,
            mlp=mlp,
            key_heads=key_heads,
            group=first[0].out_features // dim // key_heads,
            dim=dim,
            length=length,
            vocabulary=self.vocabulary,
            epsilon=parts.epsilon,
        )
        self._keep_in(kept)
        library = native.library()
        assert library is not None, "refuses() says whether there is one"
        self._call = library.slimlm_decode
        pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
        self._call.argtypes = [pointer, pointer, i64, i64, pointer, i32, i32]

    def read(self, prompt: Tensor) -> Tensor:
        """Begin anew with prompts `[batch, tokens]`; gives the logits `[batch, vocabulary]` after them."""
        self.position = 0
        pieces = prompt.split(max(1, _ROWS // self.batch), dim=1)
        for piece in pieces[:-1]:
            self._pass(piece, None)
        logits = torch.empty(self.batch, self.vocabulary)
        self._pass(pieces[-1], logits)
        return logits

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits `[batch, vocabulary]` after one more token `[batch]` of each text."""
        logits = torch.empty(self.batch, self.vocabulary)
        self._pass(tokens[:, None], logits)
        return logits

    def _pass(self, tokens: Tensor, logits: Tensor | None) -> None:
        """Take tokens `[batch, count]` through the blocks; the logits after them go into `logits`, if that is asked for."""
        count = tokens.shape[1]
        if count > self.length - self.position:
            raise KernelError(f"{count} tokens after position {self.position} are more than a cache of {self.length} holds")
        error = self._try(tokens, logits)
        if error == BEYOND_HALF:
            # What was kept before this pass is within float16, and stays as it is.
            self._keep_in(torch.float32)
            self.way += ", with keys and values in float32, as float16 does not hold them"
            error = self._try(tokens, logits)
        if error:
            raise KernelError(f"the CPU kernels refused to decode: {found(error)}")
        self.position += count

    def _try(self, tokens: Tensor, logits: Tensor | None) -> int:
        """One call of the kernels; gives their error code."""
        x, count = self.embed(tokens).contiguous(), tokens.shape[1]
        if x.dtype != torch.float32 or x.shape != (self.batch, count, self.width):
            raise KernelError(f"embeddings of {self.batch} x {count} tokens are {x.dtype} {list(x.shape)}")
        to = None if logits is None else logits.data_ptr()
        arguments = x.data_ptr(), count, self.position, to, self._precision, torch.get_num_threads()
        return int(self._call(ctypes.addressof(self._decoder), *arguments))

    def _keep_in(self, dtype: torch.dtype) -> None:
        """Keep keys and values in this dtype from now on, those that there are among them."""
        self.keys, self.values = self.keys.to(dtype), self.values.to(dtype)
        for block, keys, values in zip(self._blocks, self.keys, self.values, strict=True):
            block.key_cache, block.value_cache = keys.data_ptr(), values.data_ptr()
        self._decoder.cache_type = float_type(dtype)

    def _at(self, tensor: Tensor | None) -> int | None:
        """Where this tensor's float32 numbers lie, for as long as the decoder lives."""
        if tensor is None:
            return None
        kept = tensor.detach().float().contiguous()
        self._alive.append(kept)
        return kept.data_ptr()

    def _product(self, layer: Multiplier) -> Product:
        ready = layer.prepare()
        self._alive.append(ready)
        return product(ready.packed)
