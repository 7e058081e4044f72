"""The speed of a compressed model on this machine, layer by layer and as a whole, compared with a dense model.

Layers are timed as layer_speed.py describes, with the checkpoint's own layers of one kind as copies of a weight. A whole model
is timed through `generate`: the prompt by its first token, further tokens by the time between them. Models are timed one after
another, because several do not fit into every memory; so their figures are of one machine, but not of the same minute.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlm.bench import layer_speed
from slimlm.bench.layer_speed import Call, Contender, Effort, Timing
from slimlm.core.errors import ModelError, SlimlmError
from slimlm.core.parts.pack import PartEntries
from slimlm.inference.generate import generate
from slimlm.inference.load import load
from slimlm.models.dense import open_dense
from slimlm.models.structure import context_length, swap, weight_of
from slimlm.runtime.embedding import CompressedEmbedding
from slimlm.runtime.kernel_names import Kernels
from slimlm.runtime.linear import CompressedLinear
from slimlm.runtime.memory import total_and_free
from slimlm.runtime.whole_model import packed_layers, prefer_fast

_DTYPES = {"torch float32": torch.float32, "torch bfloat16": torch.bfloat16}
_ROOM = 0.7
"""The share of the free memory that a dense model may take."""
Report = Callable[[str, int, int], None]
"""A function that is called with a stage, the number of its items that are done, and their total."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and how long."""

    kernels: Kernels = "auto"
    """The kernels of compressed layers."""
    batches: tuple[int, ...] = (1, 4, 16)
    """The numbers of texts at once."""
    threads: int = 1
    """The number of CPU threads."""
    prompt_tokens: int = 128
    """The prompt tokens of each text."""
    new_tokens: int = 32
    """The new tokens of each text, after the first."""
    repeats: int = 3
    """The number of texts that are generated."""
    effort: Effort = layer_speed.USUAL
    """The time that measuring layers may take."""


QUICK = Settings(prompt_tokens=16, new_tokens=4, repeats=1, effort=layer_speed.QUICK)
"""Coarse figures in little time."""


def model_speed(source: str, settings: Settings, *, against: str | None = None, report: Report | None = None) -> dict[str, Any]:
    """Time the layers of a checkpoint and the whole model, and those of a dense model.

    Args:
        source: the checkpoint's folder or hub name.
        settings: what is measured, and how long.
        against: folder or hub name of the dense model; None: random weights in the shapes of the compressed model. It is
            skipped, with a note, where it would not fit into memory.
        report: a function that is called with the stage and its progress.

    Returns:
        The figures, as plain data for JSON.

    Raises:
        SlimlmError: the settings are out of range, or need more positions than the model's context has.
        ModelError: the dense model has other layers.
    """
    report = report or _ignore
    if min(settings.batches, default=0) < 1 or min(settings.threads, settings.prompt_tokens, settings.new_tokens) < 1:
        raise SlimlmError("`batches`, `threads`, `prompt_tokens` and `new_tokens` must each be at least 1")
    with layer_speed.at_threads(settings.threads):
        bandwidth = layer_speed.read_bandwidth(settings.threads, bytes_=max(8_000_000, settings.effort.rotated))
        model = opened(source, settings.kernels)
        _refuse_length(model, settings)
        dense, notes = _dense_model(source, against, model)
        result = {
            "model": source,
            "against": against if dense is None or against else "random weights in the same shapes",
            "kernels": settings.kernels,
            "threads": settings.threads,
            "clock": "CPU time of the process" if settings.threads == 1 else "wall time",
            "machine": layer_speed.machine(),
            "versions": {name: version(name) for name in ("slimlm", "torch", "transformers")},
            "read_bandwidth": bandwidth,
            "layers": list(_layer_rows(model, dense, settings, bandwidth, report)),
            "generation": list(_generation_rows(model, dense, settings, bandwidth, report)),
            "notes": notes,
        }
    # The load may have changed since the beginning.
    result["load_average_at_end"] = layer_speed.load_average()
    return result


def _ignore(stage: str, done: int, total: int) -> None:
    """Ignore the report."""


def opened(source: str, kernels: Kernels) -> PreTrainedModel:
    """The model as `slimlm generate` runs it, ready to multiply: "auto" is "fast" where there are kernels."""
    model = load(source, kernels=kernels)
    prefer_fast(model)
    for layer in packed_layers(model).values():
        layer.prepare()
    return model


def _compressed(model: nn.Module) -> Iterator[tuple[str, CompressedLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, CompressedLinear))


def _refuse_length(model: nn.Module, settings: Settings) -> None:
    context = context_length(model)
    wanted = settings.prompt_tokens + settings.new_tokens + 1
    if context is not None and wanted > context:
        raise SlimlmError(
            f"`prompt_tokens={settings.prompt_tokens}` and `new_tokens={settings.new_tokens}` need {wanted} positions; "
            f"the model's context holds {context}"
        )


def _dense_model(source: str, against: str | None, model: nn.Module) -> tuple[PreTrainedModel | None, list[str]]:
    """The dense model in float32, or None and a note with the reason."""
    layers = sum(layer.in_features * layer.out_features for _, layer in _compressed(model))
    others = sum(parameter.numel() for parameter in model.parameters())
    # float32, and once more half of it while bfloat16 is made.
    needed, free = int(4 * 1.5 * (layers + others)), total_and_free()[1]
    if free is not None and needed > _ROOM * free:
        return None, [
            f"no dense model is measured: in float32 it needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        ]
    if against is not None:
        found = open_dense(against).model
        _refuse_other_layers(against, found, model)
        return found, []
    found = load(source, dtype=torch.float32, kernels="reference")
    for name, layer in list(_compressed(found)):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        swap(found, name, linear.requires_grad_(False))
    return found, []


def _refuse_other_layers(against: str, dense: nn.Module, model: nn.Module) -> None:
    modules = dict(dense.named_modules())
    for name, layer in _compressed(model):
        shape = (layer.out_features, layer.in_features)
        if name not in modules:
            raise ModelError(f"`against={against}` has no layer {name}; give the model that was compressed")
        if (found := tuple(weight_of(modules[name]).shape)) != shape:
            raise ModelError(f"`against={against}`: its {name} is {found}, and {shape} was compressed; give that model")


# Layers


@dataclass(frozen=True)
class _Alike:
    """Layers that differ only in their values."""

    names: list[str]
    layers: list[CompressedLinear]

    @property
    def shape(self) -> tuple[int, int]:
        return self.layers[0].out_features, self.layers[0].in_features


def _groups(model: nn.Module) -> list[_Alike]:
    found: dict[tuple[tuple[int, int], PartEntries], _Alike] = {}
    for name, layer in _compressed(model):
        key = (layer.out_features, layer.in_features), layer.entries
        group = found.setdefault(key, _Alike([], []))
        group.names.append(name)
        group.layers.append(layer)
    return list(found.values())


def read_bytes(layer: CompressedLinear) -> int:
    """Bytes of a layer that one product reads: its stored tensors, or the dense float32 matrix that the reference makes."""
    if layer.selection().backend.name == "reference":
        return 4 * layer.in_features * layer.out_features
    return sum(tensor.nbytes for tensor in layer.packed().values())


def _layer_rows(
    model: nn.Module, dense: nn.Module | None, settings: Settings, bandwidth: float, report: Report
) -> Iterator[dict[str, Any]]:
    groups = _groups(model)
    for done, group in enumerate(groups):
        report("layers", done, len(groups))
        selection = group.layers[0].selection()
        about = {
            "shape": list(group.shape),
            "layers": len(group.layers),
            "parts": group.layers[0].entries.summary(),
            "kernels": describe_backend(group.layers[0]),
            "refused": selection.refused,
        }
        contenders = [_packed(group), *_dense_layers(group, dense, settings.effort)]
        for batch in settings.batches:
            x = torch.randn(batch, group.shape[1], generator=torch.Generator().manual_seed(batch))
            race = layer_speed.race(contenders, x, threads=settings.threads, effort=settings.effort)
            for contender in contenders:
                timing = race.timings[contender.name]
                yield {
                    **about,
                    "batch": batch,
                    "contender": contender.name,
                    **_figures(timing, contender.bytes + 4 * batch * sum(group.shape), bandwidth),
                    "ratio": race.timings["torch float32"].seconds / timing.seconds,
                    "elsewhere": race.elsewhere,
                }
    report("layers", len(groups), len(groups))


def describe_backend(layer: CompressedLinear) -> str:
    """The backend of a layer, such as "cpu, fast"."""
    backend = layer.selection().backend
    precision = getattr(backend, "precision", None)
    return backend.name if precision is None else f"{backend.name}, {precision}"


def _figures(timing: Timing, bytes_: int, bandwidth: float) -> dict[str, Any]:
    return {
        "seconds": timing.seconds,
        "seconds_p20": timing.fast,
        "bytes_moved": bytes_,
        "bytes_per_second": bytes_ / timing.seconds,
        "of_bandwidth": bytes_ / timing.seconds / bandwidth,
    }


def _packed(group: _Alike) -> Contender:
    def calls(x: Tensor) -> list[Call]:
        return [_call(layer, x) for layer in group.layers]

    return Contender("slimlm", read_bytes(group.layers[0]), calls)


def _call(layer: CompressedLinear, x: Tensor) -> Call:
    return lambda: layer.forward(x)


def _dense_layers(group: _Alike, dense: nn.Module | None, effort: Effort) -> list[Contender]:
    """torch's products by the dense model's layers of these names, or by random weights where there is no such model."""
    out, width = group.shape
    found = []
    for name, dtype in _DTYPES.items():
        copies = min(len(group.layers), effort.copies(out * width * dtype.itemsize))
        weights: Iterable[Tensor]
        if dense is None:
            found.append(layer_speed.random_dense(name, group.shape, dtype, copies))
            continue
        weights = (weight_of(dense.get_submodule(layer)) for layer in group.names[:copies])
        found.append(layer_speed.dense(name, [weight.to(dtype).contiguous() for weight in weights]))
    return found


# The whole model


def _generation_rows(
    model: PreTrainedModel, dense: PreTrainedModel | None, settings: Settings, bandwidth: float, report: Report
) -> Iterator[dict[str, Any]]:
    contenders = ["slimlm", *([] if dense is None else _DTYPES)]
    for done, contender in enumerate(contenders):
        report("whole models", done, len(contenders))
        if contender != "slimlm":
            assert dense is not None
            model = dense.to(_DTYPES[contender])
        for batch in settings.batches:
            yield {"contender": contender, **generation_speed(model, batch, settings), **_bound(model, batch, bandwidth)}
    report("whole models", len(contenders), len(contenders))


def generation_speed(model: PreTrainedModel, batch: int, settings: Settings) -> dict[str, Any]:
    """Tokens per second of prompt and text, of all texts together; medians."""
    clock = layer_speed.clock_for(settings.threads)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (batch, settings.prompt_tokens), generator=generator)
    prompt_seconds, token_seconds, decode_path = [], [], ""
    before = layer_speed.processor_seconds()
    # The fast decoder is compared with the model once, before its first text.
    generate(model, prompt[:, :1], max_new_tokens=1, stop_tokens=[])
    for _ in range(settings.repeats):
        moments: list[float] = []

        def note(_: list[int], moments: list[float] = moments) -> None:
            moments.append(clock())

        began = clock()
        made = generate(model, prompt, max_new_tokens=settings.new_tokens + 1, stop_tokens=[], each=note)
        prompt_seconds.append(moments[0] - began)
        token_seconds += [late - early for early, late in pairwise(moments)]
        decode_path = made.decode_path
    elsewhere = layer_speed.taken_elsewhere(before, layer_speed.processor_seconds())
    prompts, tokens = Timing.of(prompt_seconds), Timing.of(token_seconds)
    return {
        "batch": batch,
        "prompt_tokens": settings.prompt_tokens,
        "prompt_tokens_per_second": batch * settings.prompt_tokens / prompts.seconds,
        "new_tokens": settings.new_tokens,
        "new_tokens_per_second": batch / tokens.seconds,
        "new_tokens_per_second_p80": batch / tokens.fast,
        "decode_path": decode_path,
        "elsewhere": elsewhere,
        "load_average": layer_speed.load_average(),
    }


def _bound(model: PreTrainedModel, batch: int, bandwidth: float) -> dict[str, Any]:
    """Bytes of weights that a step must read, and the tokens per second that reading alone would allow."""
    packed = sum(read_bytes(layer) for _, layer in _compressed(model))
    # A step looks up a row of the embedding; only where a dense head is the same matrix is all of it read.
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    looked_up = None if isinstance(embedding, CompressedEmbedding) else embedding.weight
    tied = head is not None and looked_up is not None and head.weight.data_ptr() == looked_up.data_ptr()
    others = sum(p.nbytes for p in model.parameters() if tied or p is not looked_up)
    read = packed + others
    return {"bytes_per_step": read, "new_tokens_per_second_bound": batch * bandwidth / read}


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write the figures to a file, with the time at which they were finished."""
    path.write_text(json.dumps({"finished": int(time.time()), **result}, indent=1) + "\n", encoding="utf-8")
