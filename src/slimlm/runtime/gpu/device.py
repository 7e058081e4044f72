"""What the GPU kernels need of this machine, and why they cannot run where they cannot.

Whether Triton can start kernels is found by a launch, so the first question about a GPU takes as long as Triton compiles.
"""

import os
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

OLDEST_TRITON = (3, 6)
"""Older versions have not been tried."""
LEAST_CAPABILITY = (8, 0)
"""Compute capability (Ampere): asynchronous copies, and tensor cores for bfloat16."""
_LONGEST = 300
"""Characters of an error that are reported: the commands that it quotes can be long."""


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU and very slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def triton_version() -> str | None:
    """Triton's version; None where it is not installed."""
    if find_spec("triton") is None:
        return None
    try:
        return version("triton")
    except PackageNotFoundError:
        # Some builds of torch bring it under another name.
        import triton

        return str(triton.__version__)


def lacks_triton() -> str | None:
    """Why there is no Triton to compile the kernels with; None: there is one."""
    found = triton_version()
    if found is None:
        return "Triton is not installed: python -m pip install 'slimlm[gpu]'"
    number = tuple(int(n) for n in re.findall(r"\d+", found)[:2])
    if number < OLDEST_TRITON:
        return f"Triton {found} is too old; the kernels need {'.'.join(map(str, OLDEST_TRITON))} or later"
    return None


def refuses(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device; None: they can."""
    if (reason := lacks_triton()) is not None:
        return reason
    if device.type == "cpu" and interpreted():
        return None
    if device.type != "cuda":
        return f"the layer is on {device}, and these kernels run on NVIDIA GPUs"
    if (reason := lacks_gpu(device)) is not None:
        return reason
    return cannot_start(torch.cuda.current_device() if device.index is None else device.index)


@cache
def cannot_start(index: int) -> str | None:
    """Why Triton can start no kernel on the GPU of this number, found by starting one; None: it can.

    At the first launch Triton compiles a driver of its own, for which it needs a C compiler, Python's headers and libcuda, and
    calls an assembler that may be older than the GPU. Each GPU is tried once in a process.
    """
    try:
        start_one(torch.device("cuda", index))
    except Exception as error:  # Whatever it is, the kernels would fail with it, too.
        return f"Triton cannot start a kernel on {torch.cuda.get_device_name(index)}: {_in_one_line(error)}"
    return None


def start_one(device: torch.device) -> None:
    """Start the smallest kernel there is on a device.

    Raises:
        Exception: what Triton and the driver raise where they cannot.
    """
    from slimlm.runtime.gpu import trial

    trial.start(device)


def _in_one_line(error: Exception) -> str:
    """The kind of an error and the first line of its text, cut where that is long."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said[:_LONGEST]}" if said else type(error).__name__


def absent(device: torch.device) -> str | None:
    """Why torch cannot put a model on this device; None: it can, or the device is no GPU."""
    if device.type != "cuda":
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here"
    count = torch.cuda.device_count()
    return f"torch finds {count} CUDA devices, counted from 0" if (device.index or 0) >= count else None


def lacks_gpu(device: torch.device) -> str | None:
    """Why the GPU that torch calls `device` cannot run the kernels, apart from Triton; None: it can."""
    if torch.version.hip is not None:
        return "this torch was built for AMD GPUs, and the kernels for NVIDIA's"
    if torch.version.cuda is None:
        return "this torch was built for the CPU alone"
    if not torch.cuda.is_available():
        return "torch could use an NVIDIA GPU and sees none: there is no GPU, or no driver"
    found = torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, and the kernels need "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or later"
        )
    return None


def describe(device: torch.device) -> str:
    """The version of Triton and the GPU's architecture, such as "triton 3.7.1, sm_90"."""
    if device.type != "cuda":
        return f"triton {triton_version()}, interpreted"
    major, minor = torch.cuda.get_device_capability(device)
    return f"triton {triton_version()}, sm_{major}{minor}"
