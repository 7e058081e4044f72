"""What `slimlm bench OUT --tune` does: find the fastest tiles of the GPU kernels for a checkpoint's layers on this card."""

from dataclasses import asdict
from typing import Any

import torch

from slimlm.core.errors import KernelError
from slimlm.events import Notify
from slimlm.inference.load import load
from slimlm.runtime.backends.triton import Gpu, Ready
from slimlm.runtime.gpu import device, products, tiles, tuning
from slimlm.runtime.gpu.tuning import Report, Timer
from slimlm.runtime.whole_model import multipliers

_CARD = torch.device("cuda")


def tune_kernels(
    source: str,
    *,
    report: Report,
    notify: Notify,
    where: torch.device = _CARD,
    timer: Timer = tuning.replayed_seconds,
) -> dict[str, Any]:
    """Measure, write the card's table into the user's cache, and use it from now on; gives what was found, as plain data.

    where, timer: the card that is measured, and what takes the times. Raises KernelError, before anything is read, where the
    kernels cannot run there.
    """
    if (reason := device.refuses(where)) is not None:
        raise KernelError(f"there are no GPU kernels to tune: {reason}")
    model = load(source, device=where, notify=notify)
    dtype = next((p.dtype for p in model.parameters() if p.dtype in products.NARROW), torch.bfloat16)
    layers = [layer for layer in multipliers(model).values() if isinstance(layer.choice().backend, Gpu)]
    ready = [own.layer for layer in layers if isinstance(own := layer.prepare(), Ready)]
    where = ready[0].base.words.device if ready else where
    table, rows = tuning.tune(tuning.products_of(ready), where, dtype, timer, report)
    card = torch.cuda.get_device_name(where) if where.type == "cuda" else "interpreted"
    path = tiles.write(card, table)
    tiles.forget()
    return {
        "model": source,
        "card": card,
        "dtype": str(dtype).removeprefix("torch."),
        "path": str(path),
        "rows": [asdict(row) for row in rows],
        "fused_up_to": table.fused_up_to,
    }
