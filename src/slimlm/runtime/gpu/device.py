"""What the GPU kernels need of this machine, and why it cannot be had where it cannot, in words.

What only a launch can tell is found by one: the first question about a card takes as long as Triton takes to compile.
"""

import os
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

OLDEST_TRITON = (3, 6)
"""Older ones have not been tried. Which one torch was built for is torch's to say."""
OLDEST_CARD = (8, 0)
"""Compute capability (Ampere): asynchronous copies, and tensor cores for bfloat16."""
_LONGEST = 300
"""Characters of an error that are given on: commands that failed can be long."""


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
        # Some builds of torch carry it under another name.
        import triton

        return str(triton.__version__)


def lacks_triton() -> str | None:
    """Why there is no Triton to compile the kernels with; None: there is."""
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
    if (reason := lacks_card(device)) is not None:
        return reason
    return _cannot_start(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _cannot_start(index: int) -> str | None:
    """Why Triton can start no kernel on the card of this number, found by starting one; None: it can.

    Triton compiles a driver of its own at the first launch, for which it needs a C compiler, Python's headers and libcuda, and
    calls an assembler that may be older than the card. A card is tried once in a process.
    """
    try:
        _start_one(torch.device("cuda", index))
    except Exception as error:  # Whatever it is, the kernels would meet it, too.
        return f"Triton cannot start a kernel on {torch.cuda.get_device_name(index)}: {_in_one_line(error)}"
    return None


def _start_one(device: torch.device) -> None:
    from slimlm.runtime.gpu import trial

    trial.start(device)


def _in_one_line(error: Exception) -> str:
    """What kind of error it is and the first line of what it says, cut where that is long."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said[:_LONGEST]}" if said else type(error).__name__


def absent(device: torch.device) -> str | None:
    """Why torch cannot put a model on this device, in words; None: it can, or the device is no card."""
    if device.type != "cuda":
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here"
    count = torch.cuda.device_count()
    return f"torch finds {count} CUDA devices, counted from 0" if (device.index or 0) >= count else None


def lacks_card(device: torch.device) -> str | None:
    """Why a card that torch would call `device` cannot run the kernels, Triton aside; None: it can."""
    if torch.version.hip is not None:
        return "this torch was built for AMD GPUs, and the kernels for NVIDIA's"
    if torch.version.cuda is None:
        return "this torch was built for the CPU alone"
    if not torch.cuda.is_available():
        return "torch could use an NVIDIA GPU and sees none: there is no card, or no driver"
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST_CARD:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, and the kernels need "
            f"{OLDEST_CARD[0]}.{OLDEST_CARD[1]} or later"
        )
    return None


def words(device: torch.device) -> str:
    """The card and who compiles for it, such as "triton 3.7.1, sm_90"."""
    if device.type != "cuda":
        return f"triton {triton_version()}, interpreted"
    major, minor = torch.cuda.get_device_capability(device)
    return f"triton {triton_version()}, sm_{major}{minor}"
