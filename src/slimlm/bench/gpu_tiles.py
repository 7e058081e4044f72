"""Find the fastest tiles of the GPU kernels for a checkpoint's layers on this machine's GPU."""

from dataclasses import asdict
from typing import Any

import torch

from slimlm.core.errors import KernelError
from slimlm.events import Notify
from slimlm.inference.load import load
from slimlm.runtime.backends.triton import Gpu, PreparedOnGpu
from slimlm.runtime.gpu import device, products, tile_search, tiles
from slimlm.runtime.gpu.tile_search import Report, Search, Timer
from slimlm.runtime.whole_model import packed_layers

_GPU = torch.device("cuda")


def tune_kernels(
    source: str,
    *,
    report: Report,
    notify: Notify,
    where: torch.device = _GPU,
    timer: Timer = tile_search.replayed_seconds,
) -> dict[str, Any]:
    """Measure tiles, write the GPU's table into the user's cache, and use it from now on.

    Args:
        source: the checkpoint's folder or hub name.
        report: a function that is called with the stage and its progress.
        notify: a function that is given messages for the user.
        where: the GPU that is measured.
        timer: gives the seconds of a call.

    Returns:
        What was found, as plain data for JSON: "model", "gpu", "dtype", "path" of the table, "rows" (tile_search.Finding) and
        "fused_up_to".

    Raises:
        KernelError: the kernels cannot run there (nothing is read then), or take none of the layers.
    """
    if (reason := device.refuses(where)) is not None:
        raise KernelError(f"there are no GPU kernels to tune: {reason}")
    model = load(source, device=where, notify=notify)
    dtype = next((p.dtype for p in model.parameters() if p.dtype in products.NARROW), torch.bfloat16)
    layers = [layer for layer in packed_layers(model).values() if isinstance(layer.selection().backend, Gpu)]
    prepared = [own.layer for layer in layers if isinstance(own := layer.prepare(), PreparedOnGpu)]
    where = prepared[0].base.words.device if prepared else where
    table, findings = tile_search.search_tiles(tile_search.weights_of(prepared), Search(where, dtype, timer), report)
    gpu = torch.cuda.get_device_name(where) if where.type == "cuda" else "interpreted"
    path = tiles.write(gpu, table)
    tiles.forget_tables()
    return {
        "model": source,
        "gpu": gpu,
        "dtype": str(dtype).removeprefix("torch."),
        "path": str(path),
        "rows": [asdict(found) for found in findings],
        "fused_up_to": table.fused_up_to,
    }
