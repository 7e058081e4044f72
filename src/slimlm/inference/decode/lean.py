"""Prompts and single tokens through a Llama-like model, in as few operations as that takes.

At batch 1 a small model spends more time between its products than in them: transformers' forward of one block is several
dozen operations and as many Python calls. `stepper` gives what does the same arithmetic with the model's own linear layers,
embedding and rotary angles:

- `PackedDecoder` (decoder.py) where the CPU kernels multiply every layer: all blocks in one call, prompts too;
- `StaticStep` on a GPU: as below, each token replayed from a CUDA graph, which asks the CPU for next to nothing;
- `LeanStep` elsewhere: the prompt by the model's own forward, then each token with about thirty torch operations per block.
  Keys and values lie in one tensor each, allocated once; cosines and sines are taken from the model's rotary module once,
  for all positions; the attention's scale is folded into the queries' share of them, and the sign of the rotation into the
  sines; a single query sees every position there is, so no mask is made; x / sqrt(mean(x^2) + eps) w is computed as
  (x w sqrt(n)) / hypot(|x|, sqrt(n eps)) with n the width, in four operations.

Only what is understood is run: `refuses` looks at the structure, `disagrees` compares the logits with those of the model's
own forward. Each answers in words, and the caller takes the model's forward then.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from slimlm.inference.decode import native_decoder as packed
from slimlm.inference.decode.grouped import direct, joint
from slimlm.runtime.dense import WideEmbedding
from slimlm.runtime.dispatch import Choice
from slimlm.runtime.embedding import CompressedEmbedding
from slimlm.runtime.linear import CompressedLinear, Multiplier, Source
from slimlm.runtime.whole_model import multipliers, precisely

_MODEL = {"model", "lm_head"}
_DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
_BLOCK = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Rotary embeddings whose angles do not change with the length of the text.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")
# Settings under which a model of this structure computes something else; none of them may be set.
_UNKNOWN_SETTINGS = ("attn_logit_softcapping", "final_logit_softcapping", "attention_chunk_size", "no_rope_layers")
_PROBE = 8
_STEPS = 3
"""Tokens of the probe that are stepped over: the first may be captured, so that two others are replayed."""
# Logits, relative to the largest: float32 differs by the order of addition, about 1e-5 in deep models; the others by their
# rounding, 2^-11 and 2^-8 per operation, which the blocks add up.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

Map = Callable[[Tensor], Tensor]


def refuses(model: nn.Module, length: int) -> str | None:
    """Why this model cannot be stepped through leanly for `length` positions, in words; None: it can."""
    for check in (_structure, _settings, _arithmetic):
        if (reason := check(model)) is not None:
            return reason
    return _window(model, length)


def disagrees(model: PreTrainedModel) -> str | None:
    """Where the lean step's logits part from those of the model's own forward on a probe, in words; None: they agree.

    The probe is a prompt of 5 different tokens and three tokens after it, or of as many as the model sees at once; the logits
    after each are compared. The first of the three is captured where a card replays steps; one that replays nothing shows at
    the others. Fast kernels give way to precise ones meanwhile: where activations have 255 levels, an order of addition can
    move one by a level, and that grows from block to block. A model is asked once for each way through it, on each device.
    """
    kind = _kind(model)
    key = kind.__name__, _activations(model), _device(model)
    verdicts = _VERDICTS.setdefault(model, {})
    if key not in verdicts:
        verdicts[key] = _disagrees(model, kind)
    return verdicts[key]


_VERDICTS: WeakKeyDictionary[PreTrainedModel, dict[tuple[str, torch.dtype, torch.device], str | None]] = WeakKeyDictionary()
"""what `disagrees` found"""


def _disagrees(model: PreTrainedModel, kind: "type[packed.PackedDecoder | LeanStep]") -> str | None:
    device = _device(model)
    # However long the text is to be: one token turns no key and mixes no values, so that on it wrong ways agree, too.
    count = min(_PROBE, _sees(model) or _PROBE, getattr(model.config, "max_position_embeddings", None) or _PROBE)
    ids = (17 + 7 * torch.arange(count, device=device)).remainder(model.config.vocab_size)[None]
    before = max(1, count - _STEPS)
    with torch.no_grad(), precisely(model):
        cache = DynamicCache()
        theirs = [model(ids[:, :before], past_key_values=cache, use_cache=True).logits[:, -1]]
        # The kind is settled: among layers that are all precise now, `stepper` could choose another.
        step = _build(kind, model, batch=1, length=count)
        ours = [step.read(ids[:, :before])]
        for column in ids[:, before:].unbind(1):
            # Both multiply one token here, so that both use the same products.
            theirs.append(model(column[:, None], past_key_values=cache, use_cache=True).logits[:, -1])
            ours.append(step(column))
    expected, found = torch.cat(theirs).float(), torch.cat(ours).float()
    largest = float(expected.abs().max())
    difference = float((found - expected).abs().max())
    allowed = _TOLERANCE[_coarsest(model)] * largest
    if difference <= allowed:
        return None
    return f"its logits differ by {difference:.2g} from those of the model's own forward, where {allowed:.2g} is allowed"


def stepper(model: PreTrainedModel, *, batch: int, length: int) -> "packed.PackedDecoder | LeanStep":
    """The quickest way through a model that `refuses` accepts, with room for `length` positions of `batch` texts.

    One that was kept (`keep`) is taken again where it has the room and the model is as it was.
    """
    kind = _kind(model)
    if not issubclass(kind, StaticStep):
        return _build(kind, model, batch=batch, length=length)
    return _taken(model, batch, length) or _build(kind, model, batch=batch, length=_room(model, length))


def keep(model: PreTrainedModel, step: object) -> None:
    """Let the model's next text take this stepper again, with its memory and the graphs that were captured.

    Of steps that are not captured nothing is kept. One is kept for each model, as long as that lives, its layers go on being
    multiplied as they are and no other shape is asked for; whoever takes it has it alone.
    """
    if isinstance(step, StaticStep):
        _KEPT[model] = _Kept(step, [ref(layer.choice(), partial(_drop, ref(model))) for layer in multipliers(model).values()])


@dataclass(frozen=True)
class _Kept:
    step: "StaticStep"
    choices: "list[ref[Choice]]"
    """of the layers, which let go of them when they are moved or others are to multiply: then this is dropped"""


_KEPT: WeakKeyDictionary[PreTrainedModel, _Kept] = WeakKeyDictionary()


def _drop(model: "ref[PreTrainedModel]", choice: "ref[Choice]") -> None:
    del choice
    if (own := model()) is not None:
        _KEPT.pop(own, None)


def _taken(model: PreTrainedModel, batch: int, length: int) -> "StaticStep | None":
    """What was kept and serves as many texts of this length; what does not is let go."""
    kept = _KEPT.pop(model, None)
    if kept is None or (step := kept.step).batch != batch or step.length < length:
        return None
    return step if step.made_of is not None and step.made_of.is_still(model) else None


def _room(model: PreTrainedModel, length: int) -> int:
    """As many positions or more, so that longer texts are written with the same graphs: a quarter more, or up to 256."""
    grain = max(_LEAST_SEEN, (1 << (length - 1).bit_length()) // 8)
    context = getattr(model.config, "max_position_embeddings", None) or length
    return max(length, min(context, -(-length // grain) * grain))


@dataclass(frozen=True)
class _State:
    """The tensors of a model as they were when its steps were captured."""

    tensors: tuple[Source, ...]
    small: Tensor | None
    """what norms and biases held, of which steps may have copies: `.data` can be written to without a trace"""
    preparations: tuple[int, ...]
    """of each layer; 0: nothing is prepared"""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "_State":
        return cls(tuple(Source.of(tensor) for tensor in _tensors(model)), _small(model), _preparations(model))

    def is_still(self, model: PreTrainedModel) -> bool:
        """Whether it is so now, too."""
        now = _tensors(model)
        if len(now) != len(self.tensors) or not all(old.is_still(t) for old, t in zip(self.tensors, now, strict=True)):
            return False
        small = _small(model)
        same = small is self.small if small is None or self.small is None else torch.equal(small, self.small)
        return same and self.preparations == _preparations(model)


def _tensors(model: PreTrainedModel) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _small(model: PreTrainedModel) -> Tensor | None:
    """The vectors among the parameters in one tensor; None where there are none."""
    with torch.no_grad():
        found = [p.float() for p in model.parameters() if p.ndim == 1]
        return torch.cat(found) if found else None


def _preparations(model: PreTrainedModel) -> tuple[int, ...]:
    return tuple(0 if layer.prepared() is None else layer.preparations for layer in multipliers(model).values())


def _kind(model: PreTrainedModel) -> "type[packed.PackedDecoder | LeanStep]":
    if _device(model).type == "cuda":
        return StaticStep
    return packed.PackedDecoder if _packed_refuses(model) is None else LeanStep


def _build(
    kind: "type[packed.PackedDecoder | LeanStep]", model: PreTrainedModel, *, batch: int, length: int
) -> "packed.PackedDecoder | LeanStep":
    if issubclass(kind, packed.PackedDecoder):
        return kind(_parts(model), batch=batch, length=length)
    return kind(model, batch=batch, length=length)


@dataclass(frozen=True)
class _Block:
    """One block as functions of `[rows, width]`."""

    attention_norm: Map
    queries_keys_values: Callable[[Tensor], Sequence[Tensor]]
    query_norm: Map | None
    key_norm: Map | None
    attention_out: Map
    mlp_norm: Map
    gate_up: Callable[[Tensor], Sequence[Tensor]]
    down: Map


@dataclass(frozen=True)
class _Place:
    """Where a step is in its texts."""

    key_slots: Sequence[Tensor]
    """of each block, where the position's keys go, `[batch x key heads, head_dim]`"""
    value_slots: Sequence[Tensor]
    """as above"""
    query_turn: tuple[Tensor, ...]
    """the position's cosines and signed sines, times the attention's scale"""
    key_turn: tuple[Tensor, ...]
    """the position's cosines and signed sines"""
    mix: Callable[[int, Tensor], Tensor]
    """what a block's queries `[heads, group, head_dim]` find, once its slots are filled"""


class LeanStep:
    """A model with room for `length` positions of `batch` texts of equal length, a token of each at a time, with torch.

    Build it for a model that `refuses` accepts. It holds the model's weights as they are now; it does not follow the model
    to another device or dtype. The model itself, whose forward reads prompts, is not kept alive.
    """

    way = "the lean step"

    def __init__(self, model: PreTrainedModel, *, batch: int, length: int) -> None:
        decoder = model.model
        blocks = list(decoder.layers)
        attention = blocks[0].self_attn
        self.head_dim: int = attention.head_dim
        self.groups: int = attention.num_key_value_groups
        self.key_heads: int = attention.k_proj.out_features // self.head_dim
        self.batch, self.length, self.position = batch, length, 0
        self._model = ref(model)
        self.dtype = _activations(model)
        self.embed = _embed(model)
        """tokens `[batch]` to their rows `[batch, width]`"""
        self.blocks = [_block(block, self.dtype) for block in blocks]
        self.last_norm = _norm(decoder.norm, self.dtype)
        self.head = head_of(model)
        device = _device(model)
        shape = (len(blocks), batch * self.key_heads, length, self.head_dim)
        self.keys = torch.zeros(shape, dtype=self.dtype, device=device)
        """[blocks, batch x key heads, length, head_dim]"""
        self.values = torch.zeros(shape, dtype=self.dtype, device=device)
        """as the keys"""
        cos, sin = decoder.rotary_emb(self.keys, torch.arange(length, device=device)[None])
        half = self.head_dim // 2
        signed = torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)
        self.key_turn = (cos[0], signed)
        """cosines and signed sines of every position, [length, head_dim] each"""
        self.query_turn = (cos[0] * attention.scaling, signed * attention.scaling)
        """the same times the attention's scale"""
        self.other_half = torch.arange(self.head_dim, device=device).roll(half)
        """[head_dim], the partner of each coordinate in the rotation"""

    def read(self, prompt: Tensor) -> Tensor:
        """Begin anew with prompts `[batch, tokens]`, by the model's own forward; gives the logits `[batch, vocabulary]`."""
        model, cache = self._model(), DynamicCache()
        assert model is not None
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        with torch.no_grad():
            logits = model(prompt, past_key_values=cache, use_cache=True, **last).logits[:, -1]
        self.fill(cache)
        return logits

    def fill(self, cache: DynamicCache) -> None:
        """Begin after the positions of this cache, which must hold every one from the first."""
        self.position = 0
        for i, layer in enumerate(cache.layers):
            self.position = layer.keys.shape[2]
            self.keys[i, :, : self.position] = layer.keys.flatten(0, 1)
            self.values[i, :, : self.position] = layer.values.flatten(0, 1)

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits `[batch, vocabulary]` after one more token `[batch]` of each text."""
        here = self.position
        seen_keys, seen_values = self.keys[:, :, : here + 1].unbind(), self.values[:, :, : here + 1].unbind()
        place = _Place(
            self.keys[:, :, here].unbind(),
            self.values[:, :, here].unbind(),
            (self.query_turn[0][here], self.query_turn[1][here]),
            (self.key_turn[0][here], self.key_turn[1][here]),
            lambda i, queries: attend(queries, seen_keys[i], seen_values[i]),
        )
        self.position += 1
        return self._logits(tokens, place)

    def _logits(self, tokens: Tensor, place: _Place) -> Tensor:
        x, width = self.embed(tokens), self.head_dim
        (query_cos, query_sin), (key_cos, key_sin) = place.query_turn, place.key_turn
        other, heads = self.other_half, (self.batch * self.key_heads, self.groups, width)
        for i, block in enumerate(self.blocks):
            queries, keys, values = block.queries_keys_values(block.attention_norm(x))
            queries, keys = queries.reshape(-1, width), keys.reshape(-1, width)
            if block.query_norm is not None and block.key_norm is not None:
                queries, keys = block.query_norm(queries), block.key_norm(keys)
            slot = torch.mul(keys, key_cos, out=place.key_slots[i])
            slot.addcmul_(keys.index_select(1, other), key_sin)
            place.value_slots[i].copy_(values.reshape(-1, width))
            turned = (queries * query_cos).addcmul_(queries.index_select(1, other), query_sin)
            mixed = place.mix(i, turned.view(heads))
            x.add_(block.attention_out(mixed.reshape(self.batch, -1)))
            gate, up = block.gate_up(block.mlp_norm(x))
            x.add_(block.down(F.silu(gate, inplace=True).mul_(up)))
        return self.head(self.last_norm(x))


_LEAST_SEEN = 256
"""Positions that attention goes over at least; further ones are added as powers of two."""


class StaticStep(LeanStep):
    """The same, with the position in a tensor: a step is the same operations on the same memory every time.

    So on a card it is captured in a CUDA graph and replayed. Attention goes over the first 256, 512, 1024 ... positions, of
    which those to come are masked; each has a graph.
    """

    way = "the lean step, replayed from a CUDA graph"

    made_of: _State | None = None
    """the model, once a prompt was read"""

    def __init__(self, model: PreTrainedModel, *, batch: int, length: int) -> None:
        # It may be kept, and what is made in inference mode could not be written to outside.
        with torch.inference_mode(False), torch.no_grad():
            super().__init__(model, batch=batch, length=length)
            device = self.keys.device
            self.here = torch.zeros(1, dtype=torch.long, device=device)
            self.tokens = torch.zeros(batch, dtype=torch.long, device=device)
            self.numbers = torch.arange(length, device=device)
            self.slots = (torch.zeros_like(self.keys[0, :, 0]), torch.zeros_like(self.keys[0, :, 0]))
            """where a position's keys and values are made, [batch x key heads, head_dim]"""
        self.replays: dict[int, Callable[[], Tensor]] = {}
        """by positions seen"""

    def read(self, prompt: Tensor) -> Tensor:
        """Begin anew with prompts `[batch, tokens]`, by the model's own forward; gives the logits `[batch, vocabulary]`."""
        logits, model = super().read(prompt), self._model()
        if self.made_of is None and model is not None:
            self.made_of = _State.of(model)
        return logits

    def fill(self, cache: DynamicCache) -> None:
        """Begin after the positions of this cache, which must hold every one from the first."""
        super().fill(cache)
        # A share of nothing in what is masked is nothing, unless that is not finite.
        self.keys[:, :, self.position :] = 0
        self.values[:, :, self.position :] = 0

    def warm_up(self) -> None:
        """Capture the next step now, if that was not done yet; there must be room for it."""
        self.here.fill_(self.position)
        with torch.no_grad():
            self._ready()

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits `[batch, vocabulary]` after one more token `[batch]` of each text."""
        self.here.fill_(self.position)
        self.tokens.copy_(tokens)
        replay = self._ready()
        self.position += 1
        return replay()

    def _ready(self) -> Callable[[], Tensor]:
        """What makes the step at the position `here`."""
        seen = min(self.length, max(_LEAST_SEEN, 1 << self.position.bit_length()))
        if seen not in self.replays:
            self.replays[seen] = captured(partial(self._step, seen), self.keys.device)
        return self.replays[seen]

    def _step(self, seen: int) -> Tensor:
        """The logits after `tokens` at the position `here`; changes nothing else but that position's keys and values."""
        count = len(self.blocks)
        mask = torch.zeros(seen, dtype=self.dtype, device=self.here.device)
        mask = mask.masked_fill_(self.numbers[:seen] > self.here, float("-inf"))[None, None]

        def mix(i: int, queries: Tensor) -> Tensor:
            for kept, slot in zip((self.keys[i], self.values[i]), self.slots, strict=True):
                kept.index_copy_(1, self.here, slot[:, None])
            return attend(queries, self.keys[i, :, :seen], self.values[i, :, :seen], mask)

        query, key = (tuple([part.index_select(0, self.here) for part in turn]) for turn in (self.query_turn, self.key_turn))
        return self._logits(self.tokens, _Place([self.slots[0]] * count, [self.slots[1]] * count, query, key, mix))


def captured(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """On a card a CUDA graph of this call, which must do the same each time; elsewhere the call itself."""
    if device.type != "cuda":
        return call
    graph = torch.cuda.CUDAGraph()
    # A stream of another card than the call's would capture nothing, and say so by a warning at most.
    with torch.cuda.device(device):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        # What compiles or allocates once does so before the capture.
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream(device).wait_stream(side)
        with torch.cuda.graph(graph, stream=side):
            made = call()

    def replay() -> Tensor:
        graph.replay()
        return made.clone()

    return replay


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(queries keys^T + mask) values for scaled queries `[heads, group, width]`; keys, values `[heads, seen, width]`."""
    if queries.dtype == torch.float32:
        scores = torch.bmm(queries, keys.transpose(1, 2))
        return torch.bmm(torch.softmax(scores if mask is None else scores + mask, dim=-1), values)
    # Half precision keeps its scores in float32 inside the fused operation only.
    return F.scaled_dot_product_attention(queries[None], keys[None], values[None], attn_mask=mask, scale=1.0)[0]


def head_of(model: PreTrainedModel) -> Map:
    """What gives the logits `[rows, vocabulary]` of the last hidden states `[rows, width]`."""
    return direct(model.lm_head)


def _embed(model: Any) -> Map:
    """From tokens to their rows `[..., width]` in the dtype of the activations, in a tensor of their own."""
    module, dtype = model.model.embed_tokens, _activations(model)
    if isinstance(module, CompressedEmbedding):
        return lambda tokens: module.forward(tokens).to(dtype)
    weight: Tensor = module.weight
    return lambda tokens: F.embedding(tokens, weight).to(dtype)


def _device(model: Any) -> torch.device:
    return model.model.norm.weight.device


def _packed_refuses(model: Any) -> str | None:
    """Why the blocks cannot go through the kernels in one call, in words; None: they can."""
    if _activations(model) != torch.float32 or _device(model).type != "cpu":
        return "its activations are not float32 on the CPU"
    norms = [model.model.norm]
    for block in model.model.layers:
        norms += [block.input_layernorm, block.post_attention_layernorm]
        norms += [getattr(block.self_attn, name) for name in _HEAD_NORMS if hasattr(block.self_attn, name)]
    if len({float(norm.variance_epsilon) for norm in norms}) > 1:
        return "its norms differ in their epsilon"
    sizes = {tuple((layer.in_features, layer.out_features) for layer in _linears(block)) for block in model.model.layers}
    if len(sizes) > 1:
        return "its blocks differ in the sizes of their layers"
    return packed.refuses([*(layer for block in model.model.layers for layer in _linears(block)), model.lm_head])


def _linears(block: Any) -> tuple[Any, ...]:
    """In the order of `decoder.PRODUCTS`."""
    attention, mlp = block.self_attn, block.mlp
    products = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    return *products, mlp.gate_proj, mlp.up_proj, mlp.down_proj


def _parts(model: Any) -> packed.Parts:
    """What a model that `_packed_refuses` accepts is made of."""
    llama = model.model
    first = llama.layers[0].self_attn

    def turn(length: int) -> tuple[Tensor, Tensor]:
        cos, sin = llama.rotary_emb(llama.norm.weight, torch.arange(length)[None])
        return cos[0], sin[0]

    def weight(owner: Any, name: str) -> Tensor | None:
        return getattr(owner, name).weight if hasattr(owner, name) else None

    return packed.Parts(
        embed=_embed(model),
        norms=[
            packed.Norms(
                block.input_layernorm.weight,
                block.post_attention_layernorm.weight,
                weight(block.self_attn, "q_norm"),
                weight(block.self_attn, "k_norm"),
            )
            for block in llama.layers
        ],
        products=[_linears(block) for block in llama.layers],
        last_norm=llama.norm.weight,
        head=model.lm_head,
        epsilon=float(llama.norm.variance_epsilon),
        head_dim=first.head_dim,
        scaling=first.scaling,
        turn=turn,
    )


def _block(block: nn.Module, dtype: torch.dtype) -> _Block:
    attention: Any = block.self_attn
    mlp: Any = block.mlp
    normed = hasattr(attention, "q_norm")
    return _Block(
        attention_norm=_norm(block.input_layernorm, dtype),
        queries_keys_values=joint((attention.q_proj, attention.k_proj, attention.v_proj)),
        query_norm=_norm(attention.q_norm, dtype) if normed else None,
        key_norm=_norm(attention.k_norm, dtype) if normed else None,
        attention_out=direct(attention.o_proj),
        mlp_norm=_norm(block.post_attention_layernorm, dtype),
        gate_up=joint((mlp.gate_proj, mlp.up_proj)),
        down=direct(mlp.down_proj),
    )


def _norm(module: Any, dtype: torch.dtype) -> Map:
    """RMS norm over the last dimension, of activations of this dtype, with the module's weight and epsilon."""
    weight, epsilon = module.weight.detach().to(dtype), float(module.variance_epsilon)
    width = weight.shape[0]
    if dtype != torch.float32:
        return lambda x: F.rms_norm(x, (width,), weight, epsilon)
    scaled = weight * math.sqrt(width)
    floor = torch.tensor(math.sqrt(width * epsilon), device=weight.device)
    return lambda x: torch.mul(x, scaled).div_(torch.linalg.vector_norm(x, 2, -1, True).hypot_(floor))


def _activations(model: Any) -> torch.dtype:
    """The dtype of the hidden states: that of embeddings and norms added up."""
    embedding = model.model.embed_tokens
    widens = isinstance(embedding, WideEmbedding | CompressedEmbedding)
    own = embedding.activations if widens else embedding.weight.dtype
    return torch.promote_types(own, model.model.norm.weight.dtype)


def _coarsest(model: nn.Module) -> torch.dtype:
    """Of the dtypes that the model computes in, the one that rounds most."""
    own = [m for m in model.modules() if not isinstance(m, Multiplier | WideEmbedding)]
    found = {_activations(model), *(p.dtype for m in own for p in m.parameters(recurse=False))}
    return max(found & _TOLERANCE.keys(), key=lambda dtype: _TOLERANCE[dtype])


def _structure(model: nn.Module) -> str | None:
    """What of the tree of modules is not as expected."""
    if (reason := _children(model, "the model", _MODEL)) is not None:
        return reason
    decoder: Any = model.get_submodule("model")
    if (reason := _children(decoder, "the decoder", _DECODER)) is not None:
        return reason
    for i, block in enumerate(decoder.layers):
        if (reason := _children(block, f"block {i}", _BLOCK)) is not None:
            return reason
        own = {name for name, _ in block.self_attn.named_children()} & _HEAD_NORMS
        expected = _ATTENTION | (_HEAD_NORMS if own else set())
        if (reason := _children(block.self_attn, f"the attention of block {i}", expected)) is not None:
            return reason
        if (reason := _children(block.mlp, f"the mlp of block {i}", _MLP)) is not None:
            return reason
        for name, module in (*block.self_attn.named_children(), *block.mlp.named_children()):
            if name.endswith("_proj") and not isinstance(module, nn.Linear | CompressedLinear):
                return f"{name} of block {i} is a {type(module).__name__}"
    return None


def _children(module: nn.Module, name: str, expected: set[str]) -> str | None:
    found = {child for child, _ in module.named_children()}
    if found == expected:
        own = [own for own, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
        return f"{name} has tensors of its own, which Llama's has not: {', '.join(own)}" if own else None
    return f"it is not built like Llama: {name} holds {', '.join(sorted(found))} in place of {', '.join(sorted(expected))}"


def _settings(model: nn.Module) -> str | None:
    """What of the config or the modules' own settings asks for more than the lean step does."""
    config: Any = model.config
    decoder: Any = model.get_submodule("model")
    for name in _UNKNOWN_SETTINGS:
        if getattr(config, name, None):
            return f"its config sets {name}"
    if decoder.rotary_emb.rope_type not in _FIXED_ROPE:
        return f"its rotary angles (rope type {decoder.rotary_emb.rope_type}) change with the length of the text"
    if model.training:
        return "the model is in training mode"
    if type(decoder.embed_tokens) not in (nn.Embedding, WideEmbedding, CompressedEmbedding):
        return f"its embedding is a {type(decoder.embed_tokens).__name__}"
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return "hooks are set on its modules, which the lean step would not run"
    if len({(p.device.type, p.device.index) for p in model.parameters()}) > 1:
        return "its weights lie on several devices"
    return None


def _arithmetic(model: nn.Module) -> str | None:
    """Where a norm, an activation or a shape is another than the lean step computes."""
    decoder: Any = model.get_submodule("model")
    norms = [("the last norm", decoder.norm)]
    for i, block in enumerate(decoder.layers):
        attention, shared = block.self_attn, decoder.layers[0].self_attn
        norms += [(f"{name} of block {i}", getattr(block, name)) for name in ("input_layernorm", "post_attention_layernorm")]
        norms += [(f"{name} of block {i}", getattr(attention, name)) for name in _HEAD_NORMS if hasattr(attention, name)]
        if any(hasattr(attention, n) and getattr(attention, n).weight.numel() != attention.head_dim for n in _HEAD_NORMS):
            return f"block {i} norms its queries across heads"
        probe = torch.linspace(-4, 4, 9)
        if not torch.allclose(block.mlp.act_fn(probe), F.silu(probe), atol=1e-6):
            return f"the activation of block {i} is {type(block.mlp.act_fn).__name__}, not SiLU"
        sizes = [(a.head_dim, a.num_key_value_groups, a.k_proj.out_features, a.scaling) for a in (attention, shared)]
        if sizes[0] != sizes[1]:
            return f"the attention of block {i} has other sizes than that of block 0"
    for name, norm in norms:
        if not _is_rms_norm(norm):
            return f"{name} ({type(norm).__name__}) is not x w / sqrt(mean(x^2) + eps)"
    if _activations(model) not in _TOLERANCE:
        return f"its activations are {str(_activations(model)).removeprefix('torch.')}"
    with torch.no_grad():
        weight = decoder.norm.weight
        angles = decoder.rotary_emb(weight[None, None], torch.zeros(1, 1, dtype=torch.long, device=weight.device))[0]
    if angles.shape[-1] != decoder.layers[0].self_attn.head_dim:
        return f"only {angles.shape[-1]} of a head's {decoder.layers[0].self_attn.head_dim} coordinates are rotated"
    return None


def _is_rms_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    if weight is None or getattr(module, "bias", None) is not None or not hasattr(module, "variance_epsilon"):
        return False
    x = torch.linspace(-1, 2, weight.shape[0], dtype=weight.dtype, device=weight.device)[None]
    with torch.no_grad():
        expected = F.rms_norm(x.float(), weight.shape, weight.float(), module.variance_epsilon)
        found = module(x).float()
    # Two roundings of the weight's dtype; a weight of 1 + w (Gemma) is off by the whole output.
    return torch.allclose(found, expected, rtol=4 * torch.finfo(weight.dtype).eps, atol=1e-5)


def _window(model: nn.Module, length: int) -> str | None:
    """Whether some block sees fewer than all the positions."""
    if unknown := _attention_types(model) - {"full_attention", "sliding_attention"}:
        return f"its config names layers of type {', '.join(sorted(unknown))}"
    if (window := _sees(model)) is not None and length > window:
        return f"its attention sees a window of {window} positions, and {length} are needed"
    return None


def _sees(model: nn.Module) -> int | None:
    """The positions that the blocks with the narrowest view see; None: all of them see every position."""
    window: int | None = getattr(model.config, "sliding_window", None)
    return window if window and "sliding_attention" in _attention_types(model) else None


def _attention_types(model: nn.Module) -> set[str]:
    config: Any = model.config
    window = getattr(config, "sliding_window", None)
    return set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
