"""What the verbs that run a model share: which kernels run it, and the samples of a text. Imported when a verb runs."""

import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimlm.cli.console import say_on_stderr
from slimlm.core.errors import DataError, KernelError
from slimlm.data.windows import tokens_of, windows_of
from slimlm.evaluation.compare import OpenModel
from slimlm.inference.load import read_description
from slimlm.runtime.kernel_names import Kernels
from slimlm.runtime.whole_model import describe, describe_backends

MOST_LENGTH = 2048
"""Tokens per sample of a text, where no length is given and the model's context is longer."""


def refuse_cpu_kernels(kernels: Kernels, device: torch.device) -> None:
    """Raise KernelError where CPU kernels are asked for by name on another device, before anything is read."""
    if device.type != "cpu" and kernels in ("precise", "fast"):
        raise KernelError(f"--kernels {kernels}: these run on the CPU, and the device is {device}; use --device cpu")


def kernels_of(opened: OpenModel) -> str | None:
    """A description of the kernels that run an opened model; None for a model that is not compressed."""
    return describe(opened.model)


def show_kernels(opened: OpenModel) -> None:
    """Print which kernels run an opened model to standard error."""
    if (used := kernels_of(opened)) is not None:
        say_on_stderr(f"kernels: {used}")


def kernels_for(folder: Path) -> str:
    """A description of the kernels that would run the layers of a compressed folder on this machine's CPU."""
    return describe_backends([entry.parts for entry in read_description(folder).layers.values()])


def text_samples(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    length: int | None,
    context: int | None,
    at_most: int | None,
    shrink: bool = False,
) -> Tensor:
    """Samples `[count, length]` of a text to measure a model on.

    Args:
        tokenizer: The model's tokenizer.
        text: The text; see `slimlm.data.documents`.
        length: Tokens per sample; None: the context, at most 2048.
        context: Tokens of the model's context; None: it is not limited.
        at_most: Tokens that are read of the text; None: all.
        shrink: Whether a text shorter than a sample is one sample, where no length is given.

    Raises:
        DataError: Samples are longer than the model's context, or the text is too short.
    """
    limit = sys.maxsize if context is None else context
    if length is not None and length > limit:
        raise DataError(f"--length {length} is more than the model's context of {limit} tokens")
    tokens = tokens_of(tokenizer, text, "evaluation", at_most=at_most, notify=say_on_stderr)
    usual = min(limit, MOST_LENGTH, len(tokens) if shrink else MOST_LENGTH)
    return windows_of(tokens, length or usual, source=text)
