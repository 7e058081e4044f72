"""Tokens through all blocks of a Llama-like model in one call of the CPU kernels, from the prompt to the last new token.

Every linear layer must be in the kernels' layout, in one precision, and activations are float32. csrc/decoder.h has the
arithmetic: RMS norms, rotary embedding, attention over a cache of fixed size and SwiGLU lie between the packed products, so
that a token costs one call in place of several hundred operations, and a prompt makes no tensor larger than a few of its rows.
Keys and values are stored in float32 for precise kernels. For fast ones they are stored in float16 until a number comes that
float16 does not hold, because it is too large or all numbers of its head are below 2^-16; from there on in float32.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlm.core.errors import KernelError
from slimlm.inference.decode.structure import (
    activation_dtype,
    device_of,
    embedding_of,
    head_norms,
    linears_of_block,
    rms_norms,
)
from slimlm.kernels import native
from slimlm.runtime.backends import cpu
from slimlm.runtime.cpu.bindings import (
    BEYOND_HALF,
    PRECISIONS,
    Product,
    address,
    describe_error,
    float_type,
    single_product,
)
from slimlm.runtime.linear import PackedLayer

PRODUCTS = ("queries", "keys", "values", "attention_out", "gate", "up", "down")
"""The linear layers of a block, in the order of csrc/kernels.h."""
_ROWS = 128
"""Prompt tokens, of all texts together, that go through the blocks at once: as many as the products take at once."""


class BlockStruct(ctypes.Structure):
    """Mirrors SlimlmBlock."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, Product) for name in PRODUCTS),
        *((name, ctypes.c_void_p) for name in ("key_cache", "value_cache")),
    )


class DecoderStruct(ctypes.Structure):
    """Mirrors SlimlmDecoder."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("blocks", "last_norm")),
        ("head", Product),
        *((name, ctypes.c_void_p) for name in ("query_cos", "query_sin", "key_cos", "key_sin")),
        *((n, ctypes.c_int64) for n in ("count", "batch", "width", "mlp", "key_heads", "group", "dim", "length", "vocabulary")),
        ("epsilon", ctypes.c_float),
        ("cache_type", ctypes.c_int32),
    )


def refuses(model: Any) -> str | None:
    """Why the blocks of a model cannot go through the kernels in one call; None: they can.

    Args:
        model: a model that `structure.refuses` accepts.
    """
    if activation_dtype(model) != torch.float32 or device_of(model).type != "cpu":
        return "its activations are not float32 on the CPU"
    if len({float(norm.variance_epsilon) for norm in rms_norms(model).values()}) > 1:
        return "its norms differ in their epsilon"
    layers = [linears_of_block(block) for block in model.model.layers]
    if len({tuple((layer.in_features, layer.out_features) for layer in own) for own in layers}) > 1:
        return "its blocks differ in the sizes of their layers"
    return _refuses_layers([*(layer for own in layers for layer in own), model.lm_head])


def _refuses_layers(modules: Sequence[nn.Module]) -> str | None:
    """Why these linear layers cannot be multiplied within one call; None: they can."""
    if native.library() is None:
        return f"there are no CPU kernels: {native.status().reason}"
    precisions = set()
    for module in modules:
        selection = module.selection() if isinstance(module, PackedLayer) else None
        if selection is None or not isinstance(selection.backend, cpu.Cpu):
            return f"a {type(module).__name__} among its layers is not multiplied by the CPU kernels"
        precisions.add(selection.backend.precision)
    return None if len(precisions) == 1 else "some of its layers run on fast kernels and some on precise ones"


class NativeDecoder:
    """A model with room for `length` positions of `batch` texts of equal length, decoded by the CPU kernels.

    It holds the model's weights as they are now, and takes the calls of one thread at a time.

    Args:
        model: a model that `refuses` accepts.
        batch: number of texts.
        length: number of positions.
    """

    def __init__(self, model: PreTrainedModel, *, batch: int, length: int) -> None:
        llama: Any = model.model
        head: Any = model.lm_head
        layers = [linears_of_block(block) for block in llama.layers]
        attention, queries, keys, gate = llama.layers[0].self_attn, layers[0][0], layers[0][1], layers[0][4]
        dim: int = attention.head_dim
        key_heads = keys.out_features // dim
        self.path = "fast decode in the CPU kernels, all blocks in one call"
        """A description of the decoder for users."""
        self.embed, self.batch, self.length, self.position = embedding_of(model), batch, length, 0
        self.width, self.vocabulary = queries.in_features, head.out_features
        backend = head.selection().backend
        assert isinstance(backend, cpu.Cpu), "refuses() checks that"
        self._precision = PRECISIONS[backend.precision]
        cache_dtype = torch.float16 if backend.precision == "fast" else torch.float32
        self.keys = torch.zeros(len(layers), batch * key_heads, length, dim, dtype=cache_dtype, device="cpu")
        """The keys, `[blocks, batch x key heads, length, head_dim]`."""
        self.values = torch.zeros_like(self.keys)
        """The values, of the same shape."""
        # The library knows addresses only; this list keeps alive what lies there.
        self._alive: list[object] = []
        self._blocks = self._structures_of(llama.layers, layers)
        positions = torch.arange(length, device="cpu")[None]
        cos, sin = (angles[0].float() for angles in llama.rotary_emb(llama.norm.weight, positions))
        signed_sin = torch.cat((-sin[:, : dim // 2], sin[:, dim // 2 :]), dim=-1)
        self._decoder = DecoderStruct(
            blocks=ctypes.addressof(self._blocks),
            last_norm=self._at(llama.norm.weight),
            head=self._product(head),
            query_cos=self._at(cos * attention.scaling),
            query_sin=self._at(signed_sin * attention.scaling),
            key_cos=self._at(cos),
            key_sin=self._at(signed_sin),
            count=len(layers),
            batch=batch,
            width=self.width,
            mlp=gate.out_features,
            key_heads=key_heads,
            group=queries.out_features // dim // key_heads,
            dim=dim,
            length=length,
            vocabulary=self.vocabulary,
            epsilon=float(llama.norm.variance_epsilon),
        )
        self._store_in(cache_dtype)
        library = native.library()
        assert library is not None, "refuses() checks that"
        self._call = library.slimlm_decode
        pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
        self._call.argtypes = [pointer, pointer, i64, i64, pointer, i32, i32]

    def _structures_of(self, modules: Any, layers: Sequence[Sequence[PackedLayer]]) -> Any:
        """The blocks as the library takes them; caches come later."""
        blocks = (BlockStruct * len(layers))()
        for block, module, products in zip(blocks, modules, layers, strict=True):
            block.attention_norm = self._at(module.input_layernorm.weight)
            block.mlp_norm = self._at(module.post_attention_layernorm.weight)
            norms = head_norms(module.self_attn)
            block.query_norm, block.key_norm = (
                self._at(norms[name].weight) if name in norms else None for name in ("q_norm", "k_norm")
            )
            for name, layer in zip(PRODUCTS, products, strict=True):
                setattr(block, name, self._product(layer))
        return blocks

    def prefill(self, prompt: Tensor) -> Tensor:
        """Compute prompts `[batch, tokens]`; gives the logits `[batch, vocabulary]` after them.

        Raises:
            KernelError: there is no room for as many tokens, or the batch has another size.
        """
        self.position = 0
        pieces = prompt.split(max(1, _ROWS // self.batch), dim=1)
        for piece in pieces[:-1]:
            self._pass(piece, None)
        logits = self._logits()
        self._pass(pieces[-1], logits)
        return logits

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits `[batch, vocabulary]` after one more token `[batch]` of each text."""
        logits = self._logits()
        self._pass(tokens[:, None], logits)
        return logits

    def _logits(self) -> Tensor:
        """Room for logits, float32 `[batch, vocabulary]` whatever torch's defaults are."""
        return torch.empty(self.batch, self.vocabulary, dtype=torch.float32, device="cpu")

    def _pass(self, tokens: Tensor, logits: Tensor | None) -> None:
        """Tokens `[batch, count]` through the blocks; the logits after them go into `logits`, unless that is None."""
        count = tokens.shape[1]
        if count > self.length - self.position:
            raise KernelError(f"{count} tokens after position {self.position} are more than a cache of {self.length} holds")
        error = self._try(tokens, logits)
        if error == BEYOND_HALF:
            # What was stored before this pass is within float16, and keeps its values.
            self._store_in(torch.float32)
            self.path += ", with keys and values in float32, as float16 does not hold them"
            error = self._try(tokens, logits)
        if error:
            raise KernelError(f"the CPU kernels refused to decode: {describe_error(error)}")
        self.position += count

    def _try(self, tokens: Tensor, logits: Tensor | None) -> int:
        """One call of the kernels; gives their error code."""
        x, count = self.embed(tokens).contiguous(), tokens.shape[1]
        if x.dtype != torch.float32 or x.shape != (self.batch, count, self.width):
            raise KernelError(f"embeddings of {self.batch} x {count} tokens are {x.dtype} {list(x.shape)}")
        to = None if logits is None else address(logits, torch.float32, self.batch * self.vocabulary)
        arguments = address(x, torch.float32, x.numel()), count, self.position, to, self._precision, torch.get_num_threads()
        return int(self._call(ctypes.addressof(self._decoder), *arguments))

    def _store_in(self, dtype: torch.dtype) -> None:
        """Store keys and values in this dtype from now on, and convert those that are stored."""
        self.keys, self.values = self.keys.to(dtype), self.values.to(dtype)
        for block, keys, values in zip(self._blocks, self.keys, self.values, strict=True):
            block.key_cache, block.value_cache = (address(cache, dtype, keys.numel()) for cache in (keys, values))
        self._decoder.cache_type = float_type(dtype)

    def _at(self, tensor: Tensor | None) -> int | None:
        """The address of a tensor's float32 values, valid as long as the decoder lives."""
        if tensor is None:
            return None
        values = tensor.detach().float().contiguous()
        self._alive.append(values)
        return address(values, torch.float32, values.numel())

    def _product(self, layer: PackedLayer) -> Product:
        prepared = layer.prepare()
        self._alive.append(prepared)
        return single_product(prepared.packed)
