"""What the verbs that run a model share: which kernels run it, and the samples of a text. Imported when a verb runs."""

from pathlib import Path

import torch

from slimlm.cli.console import say_on_stderr
from slimlm.core.errors import KernelError
from slimlm.evaluation.compare import OpenModel
from slimlm.inference.load import read_description
from slimlm.runtime.kernel_names import Kernels
from slimlm.runtime.whole_model import describe, describe_backends


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
