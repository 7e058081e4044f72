"""Single tokens through a Llama-like model, in as few torch operations as that takes.

At batch 1 a small model spends more time between its products than in them: transformers' forward of one block is several
dozen operations and as many Python calls. This decoder does the same arithmetic with about thirty operations per block, with
the model's own linear layers, embedding and rotary angles. Keys and values lie in one tensor each, allocated once; cosines and
sines are taken from the model's rotary module once, for all positions; the attention's scale is folded into the queries'
cosines and sines, and the sign of the rotation into the sines; a single query sees every position, so no mask is made; a norm
x / sqrt(mean(x^2) + eps) w is computed as (x w sqrt(n)) / hypot(|x|, sqrt(n eps)) with n the width, in four operations.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from slimlm.inference.decode.grouped import Call, GroupedCall, direct_call, grouped_call
from slimlm.inference.decode.structure import activation_dtype, device_of, embedding_of


@dataclass(frozen=True)
class _Block:
    """One block as functions of `[rows, width]`."""

    attention_norm: Call
    queries_keys_values: GroupedCall
    query_norm: Call | None
    key_norm: Call | None
    attention_out: Call
    mlp_norm: Call
    gate_up: GroupedCall
    down: Call


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding: a vector x is rotated as x cos + partner(x) signed_sin."""

    cos: Tensor
    """The cosines, `[positions, head_dim]`."""
    signed_sin: Tensor
    """The sines, `[positions, head_dim]`, negated in the first half."""

    def scaled(self, factor: float) -> "Rotary":
        """A rotation that also multiplies by a factor."""
        return Rotary(self.cos * factor, self.signed_sin * factor)


@dataclass(frozen=True)
class Position:
    """What one step of all blocks needs to know of its position."""

    key_slots: Sequence[Tensor]
    """The memory of the position's keys, `[batch x key heads, head_dim]` for each block."""
    value_slots: Sequence[Tensor]
    """The memory of the position's values, of the same shapes."""
    query_rotary: Rotary
    """The rotary embedding of queries at this position, times the attention's scale."""
    key_rotary: Rotary
    """The rotary embedding of keys at this position."""
    attend: Callable[[int, Tensor], Tensor]
    """The attention of a block's queries `[heads, group, head_dim]`, called when its slots are filled."""


class TorchDecoder:
    """A model with room for `length` positions of `batch` texts of equal length, one token of each at a time, with torch.

    It holds the model's weights as they are now, and does not move with the model to another device or dtype. The model itself,
    whose forward computes prompts, is not kept alive.

    Args:
        model: a model that `structure.refuses` accepts.
        batch: number of texts.
        length: number of positions.
    """

    path = "fast decode with torch"
    """A description of the decoder for users."""

    def __init__(self, model: PreTrainedModel, *, batch: int, length: int) -> None:
        decoder = model.model
        blocks = list(decoder.layers)
        attention = blocks[0].self_attn
        self.head_dim: int = attention.head_dim
        self.groups: int = attention.num_key_value_groups
        self.key_heads: int = attention.k_proj.out_features // self.head_dim
        self.batch, self.length, self.position = batch, length, 0
        self._model = ref(model)
        self.dtype = activation_dtype(model)
        self.embed = embedding_of(model)
        self.blocks = [_block(block, self.dtype) for block in blocks]
        self.last_norm = _norm(decoder.norm, self.dtype)
        self.head = direct_call(model.lm_head)
        device = device_of(model)
        shape = (len(blocks), batch * self.key_heads, length, self.head_dim)
        self.keys = torch.zeros(shape, dtype=self.dtype, device=device)
        """The keys, `[blocks, batch x key heads, length, head_dim]`."""
        self.values = torch.zeros(shape, dtype=self.dtype, device=device)
        """The values, of the same shape."""
        cos, sin = decoder.rotary_emb(self.keys, torch.arange(length, device=device)[None])
        half = self.head_dim // 2
        self.key_rotary = Rotary(cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1))
        """The rotary embedding of keys at all positions."""
        self.query_rotary = self.key_rotary.scaled(attention.scaling)
        """The rotary embedding of queries at all positions, times the attention's scale."""
        self.partner = torch.arange(self.head_dim, device=device).roll(half)
        """The partner of each coordinate in the rotation, `[head_dim]`."""

    def prefill(self, prompt: Tensor) -> Tensor:
        """Compute prompts `[batch, tokens]` by the model's own forward; gives the logits `[batch, vocabulary]` after them."""
        model, cache = self._model(), DynamicCache()
        assert model is not None
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        with torch.no_grad():
            logits = model(prompt, past_key_values=cache, use_cache=True, **last).logits[:, -1]
        self.fill(cache)
        return logits

    def fill(self, cache: DynamicCache) -> None:
        """Start after the positions of a cache, which must hold every position from the first."""
        self.position = 0
        for i, layer in enumerate(cache.layers):
            self.position = layer.keys.shape[2]
            self.keys[i, :, : self.position] = layer.keys.flatten(0, 1)
            self.values[i, :, : self.position] = layer.values.flatten(0, 1)

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits `[batch, vocabulary]` after one more token `[batch]` of each text."""
        here = self.position
        seen_keys, seen_values = self.keys[:, :, : here + 1].unbind(), self.values[:, :, : here + 1].unbind()
        position = Position(
            self.keys[:, :, here].unbind(),
            self.values[:, :, here].unbind(),
            Rotary(self.query_rotary.cos[here], self.query_rotary.signed_sin[here]),
            Rotary(self.key_rotary.cos[here], self.key_rotary.signed_sin[here]),
            lambda i, queries: attend(queries, seen_keys[i], seen_values[i]),
        )
        self.position += 1
        return self.logits(tokens, position)

    def logits(self, tokens: Tensor, position: Position) -> Tensor:
        """One token `[batch]` of each text through all blocks, at one position; gives the logits `[batch, vocabulary]`."""
        x, width, heads = self.embed(tokens), self.head_dim, (self.batch * self.key_heads, self.groups, self.head_dim)
        query_cos, query_sin = position.query_rotary.cos, position.query_rotary.signed_sin
        key_cos, key_sin = position.key_rotary.cos, position.key_rotary.signed_sin
        partner = self.partner
        for i, block in enumerate(self.blocks):
            queries, keys, values = block.queries_keys_values(block.attention_norm(x))
            queries, keys = queries.reshape(-1, width), keys.reshape(-1, width)
            if block.query_norm is not None and block.key_norm is not None:
                queries, keys = block.query_norm(queries), block.key_norm(keys)
            slot = torch.mul(keys, key_cos, out=position.key_slots[i])
            slot.addcmul_(keys.index_select(1, partner), key_sin)
            position.value_slots[i].copy_(values.reshape(-1, width))
            rotated = (queries * query_cos).addcmul_(queries.index_select(1, partner), query_sin)
            attended = position.attend(i, rotated.view(heads))
            x.add_(block.attention_out(attended.reshape(self.batch, -1)))
            gate, up = block.gate_up(block.mlp_norm(x))
            x.add_(block.down(F.silu(gate, inplace=True).mul_(up)))
        return self.head(self.last_norm(x))


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(queries keys^T + mask) values.

    Args:
        queries: `[heads, group, width]`, times the attention's scale.
        keys: `[heads, positions, width]`.
        values: `[heads, positions, width]`.
        mask: `[..., positions]`, 0 or -inf.

    Returns:
        `[heads, group, width]`.
    """
    if queries.dtype == torch.float32:
        scores = torch.bmm(queries, keys.transpose(1, 2))
        return torch.bmm(torch.softmax(scores if mask is None else scores + mask, dim=-1), values)
    # Half precision keeps its scores in float32 inside the fused operation only.
    return F.scaled_dot_product_attention(queries[None], keys[None], values[None], attn_mask=mask, scale=1.0)[0]


def _block(block: nn.Module, dtype: torch.dtype) -> _Block:
    attention: Any = block.self_attn
    mlp: Any = block.mlp
    normed = hasattr(attention, "q_norm")
    return _Block(
        attention_norm=_norm(block.input_layernorm, dtype),
        queries_keys_values=grouped_call((attention.q_proj, attention.k_proj, attention.v_proj)),
        query_norm=_norm(attention.q_norm, dtype) if normed else None,
        key_norm=_norm(attention.k_norm, dtype) if normed else None,
        attention_out=direct_call(attention.o_proj),
        mlp_norm=_norm(block.post_attention_layernorm, dtype),
        gate_up=grouped_call((mlp.gate_proj, mlp.up_proj)),
        down=direct_call(mlp.down_proj),
    )


def _norm(module: Any, dtype: torch.dtype) -> Call:
    """RMS norm over the last dimension, of activations of this dtype, with the module's weight and epsilon."""
    weight, epsilon = module.weight.detach().to(dtype), float(module.variance_epsilon)
    width = weight.shape[0]
    if dtype != torch.float32:
        return lambda x: F.rms_norm(x, (width,), weight, epsilon)
    scaled = weight * math.sqrt(width)
    floor = torch.tensor(math.sqrt(width * epsilon), dtype=dtype, device=weight.device)
    return lambda x: torch.mul(x, scaled).div_(torch.linalg.vector_norm(x, 2, -1, True).hypot_(floor))
