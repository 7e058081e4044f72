"""Models in GGUF files: config and tokenizer as transformers converts them, and weights that are dequantized one at a time.

Values are kept exactly: matrices in F16 and BF16 in their own dtype, everything else in float32. Sixteen bits would not do: the
product of a scale in float16 and a code has up to 18 significant bits.
"""

import json
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from slimlm.core.errors import first_line, is_out_of_memory
from slimlm.models.codes import CodedWeight
from slimlm.models.dequantize import Dequantized
from slimlm.models.gguf_config import EMBEDDING, HEAD, ROTARY_FACTORS, config_of
from slimlm.models.gguf_header import PLAIN, Gguf, GgufTensor
from slimlm.models.meta import meta_model
from slimlm.models.opening import loading_settings
from slimlm.models.parameters import FileTensors
from slimlm.models.placeholders import placeholder

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
"""Of matrices that are kept in 16 bits."""
_AT_ONCE = 2**24
"""Weights of an embedding or a head that are dequantized together."""
_TOKENIZER = "tokenizer.ggml.model"


def write_folder(gguf: Gguf, folder: Path) -> None:
    """Write the config and the tokenizer of a model as transformers' files, without weights.

    Raises:
        ModelError: transformers cannot make them of what the file says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(gguf), indent=2), encoding="utf-8")
    if gguf.text(_TOKENIZER) in (None, "no_vocab"):
        return
    first = gguf.paths[0]
    try:
        with loading_settings():
            AutoTokenizer.from_pretrained(first.parent, gguf_file=first.name, trust_remote_code=False).save_pretrained(folder)
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, OSError):
            raise
        # Whatever transformers meets in a header that makes no sense.
        raise gguf.error(
            f"transformers cannot make a tokenizer of what its header says ({first_line(error)}). Download it again, or give "
            "the folder of the original model"
        ) from error


def read_gguf(gguf: Gguf, folder: Path, files: FileTensors) -> Dequantized:
    """Which weights the tensors of a model stand for, by transformers' mapping of names; none is made yet.

    Args:
        gguf: the headers.
        folder: what `write_folder` wrote.
        files: the bytes of the tensors, by their names in the files.

    Raises:
        ModelError: a tensor has no place in the model, or an architecture does not fit its tensors.
    """
    tensors = gguf.tensors
    like = {name: placeholder(tensor.shape, torch.float16) for name, tensor in tensors.items()}
    model = meta_model(folder, like)
    architecture = str(gguf.text("general.architecture"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
    names = get_gguf_hf_weights_map(model, processor)
    left_out = {ROTARY_FACTORS: "the config says how rotary frequencies are scaled"} if ROTARY_FACTORS in tensors else {}
    weights: dict[str, CodedWeight] = {}
    for name, tensor in tensors.items():
        if name in left_out:
            continue
        if name not in names:
            raise gguf.error(
                f"{name} has no place in {type(model).__name__}, the class for the architecture {architecture}; slimlm leaves "
                "no weights out. Give the folder of the original model"
            )
        _refuse_other_shape(gguf, tensor, model, names[name])
        weights[names[name]] = _weight(tensor, files.stored[name], processor)
    return Dequantized(_form(gguf), torch.float32, weights, left_out, files)


def _form(gguf: Gguf) -> str | None:
    """How the weights are stored; None where none of them is a code."""
    counts = gguf.weights_by_type
    if all(kind in PLAIN for kind in counts):
        return None
    return "GGUF, " + ", ".join(f"{count:,} weights in {kind}" for kind, count in counts.items())


def _refuse_other_shape(gguf: Gguf, tensor: GgufTensor, model: PreTrainedModel, name: str) -> None:
    """Raise ModelError where a tensor has another shape than the header's config gives it; processors keep shapes."""
    wanted = tuple(model.state_dict()[name].shape)
    if tensor.shape != wanted:
        raise gguf.error(
            f"{tensor.name} has the shape {list(tensor.shape)}; by the header {type(model).__name__} has it as {list(wanted)}. "
            "Download it again"
        )


def _weight(tensor: GgufTensor, raw: Tensor, processor: TensorProcessor) -> CodedWeight:
    # Of F16 norms from which 1 is subtracted the result has more bits.
    dtype = _DTYPES.get(tensor.kind, torch.float32) if len(tensor.shape) > 1 else torch.float32
    return CodedWeight(tensor.shape, (tensor.name,), partial(_made, tensor, raw, processor), dtype)


def _made(tensor: GgufTensor, raw: Tensor, processor: TensorProcessor) -> Iterator[Tensor]:
    """The weight in float32; embedding and head, whose rows no processor moves, a few rows at a time."""
    rows = tensor.shape[0]
    many = tensor.name in (EMBEDDING, HEAD)
    step = max(1, _AT_ONCE // prod(tensor.shape[1:])) if many else rows
    for part in raw.view(rows if len(tensor.shape) > 1 else 1, -1).split(step):
        values = dequantized(part, tensor.kind).numpy()
        if not many:
            values = processor.process(weights=values.reshape(tensor.shape), name=tensor.name).weights
        # A copy where the processor gives a view with other strides.
        yield torch.from_numpy(values).contiguous()


def dequantized(raw: Tensor, kind: str) -> Tensor:
    """Weights in float32 `[rows, in]` of their bytes, uint8 `[rows, bytes]`, by the arithmetic of the gguf package."""
    from gguf import GGMLQuantizationType, dequantize

    found: Any = dequantize(raw.numpy(), GGMLQuantizationType[kind])
    return torch.from_numpy(found)
