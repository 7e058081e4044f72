"""Devices, models and token ids that users give as arguments; anything else is refused in a message that names the argument."""

import torch
from torch import Tensor, nn

from slimlm.core.errors import DataError, SlimlmError
from slimlm.runtime.gpu.device import absent

DEVICES = '"cpu", "cuda" or "cuda:N"'
"""The devices that a model can be on."""
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""The dtypes of token ids."""


def device(value: object, choices: str = DEVICES) -> torch.device:
    """A device that there is; raises SlimlmError, which names the choices, for anything else."""
    try:
        found = torch.device(value) if isinstance(value, str | torch.device) else None
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise SlimlmError(f'`device="{value}"`: give {choices}')
    if (reason := absent(found)) is not None:
        raise SlimlmError(f'`device="{found}"`: {reason}; `device="cpu"` would do')
    return found


def refuse_no_module(value: object, kind: type[nn.Module] = nn.Module) -> None:
    """Raise SlimlmError for anything that is no model in memory, of this class, such as a folder."""
    if not isinstance(value, kind):
        raise SlimlmError(f"`model` is of type {type(value).__name__}; give an opened model, as slimlm.load returns it")


def token_ids(value: object, name: str) -> Tensor:
    """Whole numbers `[count, length]` as int64; raises DataError for anything else, and where one is negative."""
    if not isinstance(value, Tensor):
        raise DataError(f"`{name}` is of type {type(value).__name__}; give a tensor of token ids, [count, length]")
    if value.ndim != 2 or value.dtype not in _WHOLE:
        shape = "x".join(map(str, value.shape)) or "no dimensions"
        raise DataError(f"`{name}` is {value.dtype} of {shape}; give token ids, whole numbers [count, length]")
    if value.numel() and int(value.min()) < 0:
        raise DataError(f"`{name}` holds the token {int(value.min())}; token ids are 0 or more")
    return value.long()
