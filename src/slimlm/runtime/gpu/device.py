"""What the GPU kernels need of this machine, and why it cannot be had where it cannot, in words."""

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
    return lacks_card(device)


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
