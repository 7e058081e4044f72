"""Which decoder generates with a model: one of three for models that are built like Llama, or the model's own forward.

- `NativeDecoder` where the CPU kernels multiply every layer: all blocks in one call, prompts too;
- `CudaGraphDecoder` on a GPU: each token is replayed from a CUDA graph;
- `TorchDecoder` elsewhere: the prompt by the model's own forward, then each token with about thirty torch operations per block.

A decoder is used only for models of which everything is known (structure.py), and only once its logits agreed with those of the
model's own forward. Where it is not, `refuses` gives the reason, and the caller uses the model's forward.
"""

from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from slimlm.inference.decode import structure
from slimlm.inference.decode.cuda_graph import LEAST_ATTENDED, CudaGraphDecoder
from slimlm.inference.decode.native_decoder import NativeDecoder
from slimlm.inference.decode.native_decoder import refuses as native_refuses
from slimlm.inference.decode.torch_decoder import TorchDecoder
from slimlm.runtime.dense import WideEmbedding
from slimlm.runtime.dispatch import Selection
from slimlm.runtime.linear import PackedLayer
from slimlm.runtime.whole_model import packed_layers, precise_kernels

Decoder = NativeDecoder | TorchDecoder
_PROBE = 8
_STEPS = 3
"""Tokens of the probe that are decoded one by one: the first step may be captured, so that two others are replayed."""
# Logits, relative to the largest: float32 differs by the order of addition, about 1e-5 in deep models; the others by their
# rounding, 2^-11 and 2^-8 per operation, which the blocks add up.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def refuses(model: PreTrainedModel, length: int) -> str | None:
    """Why a model cannot be decoded fast; None: it can.

    Args:
        model: a causal language model.
        length: the number of positions that are needed.
    """
    return structure.refuses(model, length) or disagrees(model)


def disagrees(model: PreTrainedModel) -> str | None:
    """Where a decoder's logits differ from those of the model's own forward on a probe; None: they agree.

    The probe is a prompt of 5 different tokens and three tokens after it, or of as many as the model sees at once; the logits
    after each are compared. The first of the three is captured where a GPU replays steps; a graph that replays nothing shows at
    the others. Precise kernels stand in for fast ones meanwhile: where activations are integers of 8 bits, an order of addition
    can move one by a step, and that grows from block to block. Each model is probed once for each decoder, dtype and device.

    Args:
        model: a model that `structure.refuses` accepts.
    """
    kind = decoder_class(model)
    key = kind.__name__, structure.activation_dtype(model), structure.device_of(model)
    verdicts = _VERDICTS.setdefault(model, {})
    if key not in verdicts:
        verdicts[key] = _compare(model, kind)
    return verdicts[key]


_VERDICTS: WeakKeyDictionary[PreTrainedModel, dict[tuple[str, torch.dtype, torch.device], str | None]] = WeakKeyDictionary()
"""the results of `disagrees`"""


def decoder_for(model: PreTrainedModel, *, batch: int, length: int) -> Decoder:
    """The fastest decoder of a model, a kept one where it fits and the model is as it was.

    Args:
        model: a model that `refuses` accepts.
        batch: number of texts.
        length: number of positions that are needed.
    """
    kind = decoder_class(model)
    if not issubclass(kind, CudaGraphDecoder):
        return kind(model, batch=batch, length=length)
    return KEPT.take(model, batch, length) or kind(model, batch=batch, length=positions_to_allocate(model, length))


def decoder_class(model: PreTrainedModel) -> type[Decoder]:
    """The fastest kind of decoder for a model that `structure.refuses` accepts."""
    if structure.device_of(model).type == "cuda":
        return CudaGraphDecoder
    return NativeDecoder if native_refuses(model) is None else TorchDecoder


def positions_to_allocate(model: PreTrainedModel, length: int) -> int:
    """At least as many positions, so that the same graphs serve longer texts: up to a quarter more, or up to 256."""
    grain = max(LEAST_ATTENDED, (1 << (length - 1).bit_length()) // 8)
    context = getattr(model.config, "max_position_embeddings", None) or length
    return max(length, min(context, -(-length // grain) * grain))


@dataclass(frozen=True)
class _Kept:
    decoder: CudaGraphDecoder
    selections: list[ref[Selection]]
    """The layers' selections; a layer drops its selection when it moves or its kernels change, and then this is invalid."""


class DecoderCache:
    """For each model one decoder with its memory and captured graphs, which the model's next text takes again.

    A decoder is kept as long as its model lives, its layers keep their backends and no other shape is asked for. Whoever takes
    it has it alone.
    """

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[PreTrainedModel, _Kept] = WeakKeyDictionary()

    def keep(self, model: PreTrainedModel, decoder: object) -> None:
        """Keep a decoder for the model's next text; decoders without captured graphs are not kept."""
        if isinstance(decoder, CudaGraphDecoder):
            layers = packed_layers(model).values()
            self._kept[model] = _Kept(decoder, [ref(layer.selection(), partial(self._drop, ref(model))) for layer in layers])

    def take(self, model: PreTrainedModel, batch: int, length: int) -> CudaGraphDecoder | None:
        """The kept decoder, where it serves as many texts of this length; otherwise it is dropped."""
        decoder = self.peek(model)
        self._kept.pop(model, None)
        if decoder is None or decoder.batch != batch or decoder.length < length:
            return None
        return decoder if decoder.captured_from is not None and decoder.captured_from.is_still(model) else None

    def peek(self, model: PreTrainedModel) -> CudaGraphDecoder | None:
        """The kept decoder, which stays kept; None: there is none."""
        kept = self._kept.get(model)
        return None if kept is None else kept.decoder

    def clear(self) -> None:
        """Drop all decoders."""
        self._kept.clear()

    def _drop(self, model: ref[PreTrainedModel], selection: ref[Selection]) -> None:
        del selection
        if (alive := model()) is not None:
            self._kept.pop(alive, None)


KEPT = DecoderCache()


def _compare(model: PreTrainedModel, kind: type[Decoder]) -> str | None:
    device = structure.device_of(model)
    # However long the text is to be: one token rotates no key and mixes no values, so that wrong decoders would agree on it.
    context = getattr(model.config, "max_position_embeddings", None)
    count = min(_PROBE, structure.visible_positions(model) or _PROBE, context or _PROBE)
    ids = (17 + 7 * torch.arange(count, device=device)).remainder(model.config.vocab_size)[None]
    before = max(1, count - _STEPS)
    with torch.no_grad(), precise_kernels(model):
        cache = DynamicCache()
        theirs = [model(ids[:, :before], past_key_values=cache, use_cache=True).logits[:, -1]]
        # The kind is given: among layers that are all precise now, `decoder_class` could choose another.
        decoder = kind(model, batch=1, length=count)
        ours = [decoder.prefill(ids[:, :before])]
        for column in ids[:, before:].unbind(1):
            # Both multiply one token here, so that both use the same products.
            theirs.append(model(column[:, None], past_key_values=cache, use_cache=True).logits[:, -1])
            ours.append(decoder(column))
    expected, found = torch.cat(theirs).float(), torch.cat(ours).float()
    largest = float(expected.abs().max())
    difference = float((found - expected).abs().max())
    allowed = _TOLERANCE[_coarsest_dtype(model)] * largest
    if difference <= allowed:
        return None
    return f"its logits differ by {difference:.2g} from those of the model's own forward, where {allowed:.2g} is allowed"


def _coarsest_dtype(model: nn.Module) -> torch.dtype:
    """Of the dtypes that the model computes in, the one that rounds most."""
    own = [m for m in model.modules() if not isinstance(m, PackedLayer | WideEmbedding)]
    found = {structure.activation_dtype(model), *(p.dtype for m in own for p in m.parameters(recurse=False))}
    return max(found & _TOLERANCE.keys(), key=lambda dtype: _TOLERANCE[dtype])
