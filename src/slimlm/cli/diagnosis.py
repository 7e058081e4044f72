"""The findings of `slimlm doctor` on the machine and the installation, and advice."""

import dataclasses
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from rich.table import Table

from slimlm.kernels import native, processor
from slimlm.report.tables import pairs_table
from slimlm.runtime.gpu import device as gpu
from slimlm.runtime.memory import format_bytes, total_and_free

_PACKAGES = ("slimlm", "torch", "transformers", "tokenizers", "safetensors", "huggingface_hub")
_REINSTALL = "in slimlm's source folder: python -m pip install --force-reinstall --no-deps ."
_COMPILERS = {"linux": "apt install g++, or dnf install gcc-c++", "darwin": "xcode-select --install"}
_LITTLE_DISK = 5_000_000_000
"""Bytes; a model of two billion weights in 16 bits takes four billion."""


@dataclass(frozen=True)
class Findings:
    """The findings. Sizes are in bytes; None where the system does not report them."""

    versions: dict[str, str]
    platform: str
    processor: str
    features: tuple[str, ...]
    cores: int
    """Cores that this process may use."""
    threads: int
    """Threads that torch uses."""
    memory: int | None
    memory_free: int | None
    cache: str
    """The folder of models from the hub."""
    cache_free: int | None
    gpus: tuple[str, ...]
    no_gpu: str | None
    """Why no GPU is used; None where there is one."""
    kernels: native.Status
    gpu_kernels: str | None
    """Why compressed layers cannot run on slimlm's kernels on the first GPU; None where they can."""
    advice: tuple[str, ...]
    """Advice; empty where nothing is missing."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def examine() -> Findings:
    """Look at everything; nothing is changed and nothing is fetched."""
    memory, memory_free = total_and_free()
    cache_free = _free(Path(HF_HUB_CACHE))
    gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) if torch.cuda.is_available() else ()
    kernels = native.status()
    gpu_kernels = gpu.refuses(torch.device("cuda", 0)) if gpus else f"there is no GPU: {_no_gpu()}"
    return Findings(
        versions={"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        platform=platform.platform(),
        processor=processor.name(),
        features=tuple(name for name in processor.INTERESTING if name in processor.features()),
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory=memory,
        memory_free=memory_free,
        cache=HF_HUB_CACHE,
        cache_free=cache_free,
        gpus=gpus,
        no_gpu=None if gpus else _no_gpu(),
        kernels=kernels,
        gpu_kernels=gpu_kernels,
        advice=(*_about_kernels(kernels), *_about_gpu(gpus, gpu_kernels), *_about_disk(cache_free)),
    )


def table(found: Findings) -> Table:
    """The facts, one line each."""
    versions = ", ".join(f"{name} {number}" for name, number in found.versions.items())
    limits = ", ".join(f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ)
    kernels = found.kernels
    rows = [
        ("versions", versions),
        ("platform", found.platform),
        ("processor", f"{found.processor}; {' '.join(found.features) or 'its instructions are not known'}"),
        ("threads", f"torch uses {found.threads}; cores for this process: {found.cores}" + (f" ({limits})" if limits else "")),
        ("memory", _of(found.memory_free, found.memory)),
        ("disk", f"{_known(found.cache_free)} free for models from the hub, in {found.cache}"),
        ("GPU", ", ".join(found.gpus) or f"none: {found.no_gpu}"),
        ("CPU kernels", f"{kernels.active}, from {kernels.library}" if kernels.active else f"none: {kernels.reason}"),
        *[(f"  {v.name}", "in use" if v.active else v.why_not or "") for v in kernels.variants],
        *([("  built by", f"{kernels.compiler}, with {kernels.flags}")] if kernels.compiler else []),
    ]
    rows.append(("GPU kernels", f"none: {found.gpu_kernels}" if found.gpu_kernels else gpu.describe(torch.device("cuda", 0))))
    return pairs_table(rows)


def _about_kernels(kernels: native.Status) -> list[str]:
    """Advice where no kernels are in use, or slower ones than the processor could run."""
    if kernels.reason is not None:
        return [f"slimlm has no CPU kernels; compressed layers run as dense matrices, which is slow. {_cure(kernels.reason)}"]
    assert kernels.active is not None
    names = list(native.NEEDS)
    better = names[: names.index(kernels.active)]
    missed = [
        v
        for v in kernels.variants
        if v.name in better and not v.built and processor.features().issuperset(native.NEEDS[v.name])
    ]
    return [
        f"the processor could run the variant {v.name}, but it was {v.why_not}. With a newer compiler, reinstall, {_REINSTALL}"
        for v in missed[:1]
    ]


def _about_gpu(gpus: tuple[str, ...], reason: str | None) -> list[str]:
    """Advice where there is a GPU and no kernels for it."""
    return [f"slimlm has no kernels for {gpus[0]}, and compressed layers are dense there: {reason}"] if gpus and reason else []


def _cure(reason: str) -> str:
    if native.OVERRIDE in os.environ:
        return f"Unset {native.OVERRIDE}, or let it name a library that was built from this version's csrc."
    if sys.platform == "win32":
        return "They are not built on Windows yet; WSL has them."
    if "SLIMLM_KERNELS=off" in reason:
        return f"Reinstall without SLIMLM_KERNELS=off, {_REINSTALL}"
    if "no C++ compiler" in reason:
        how = _COMPILERS.get(sys.platform, "g++ or clang++")
        return f"Install a C++ compiler ({how}) and reinstall, {_REINSTALL}"
    return f"Once that is put right, reinstall, {_REINSTALL} (with SLIMLM_KERNELS=require it says what fails)"


def _about_disk(free: int | None) -> list[str]:
    if free is None or free >= _LITTLE_DISK:
        return []
    return [
        f"{format_bytes(free)} are little for models from the hub: free some disk, or set HF_HOME to a folder on a larger one"
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch was built for the CPU alone"
    return "torch could use one and sees none"


def _free(folder: Path) -> int | None:
    """Bytes free on the disk of a folder, which need not exist."""
    there = next((f for f in (folder, *folder.absolute().parents) if f.exists()), None)
    try:
        return None if there is None else shutil.disk_usage(there).free
    except OSError:
        return None


def _known(bytes_: int | None) -> str:
    return "an unknown amount" if bytes_ is None else format_bytes(bytes_)


def _of(free: int | None, total: int | None) -> str:
    return f"{_known(free)} free of {_known(total)}"
