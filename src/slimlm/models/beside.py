"""The files beside a model's weights: which of them belong with a checkpoint of it, and why the others do not.

What a model needs besides its weights is copied: its licence, the settings of its tokenizer, processor and chat. Weights in
other formats, Python code, the state of a training run and the description of the original are not.
"""

import fnmatch
import shutil
from collections.abc import Iterable
from pathlib import Path

from slimlm.record import COPIED, LEFT_OUT, READ

BELONGING = (
    "*.json", "*.jinja", "*.txt", "*.model", "*.spm", "*.vocab", "*.merges", "*.tiktoken", "*.yaml", "*.yml",
    "LICEN[CS]E*", "licen[cs]e*", "COPYING*", "NOTICE*", "USE_POLICY*", "*[Ll]icen[cs]e*.md",
)  # fmt: skip
"""Patterns of the names of files that are copied."""
REPLACED = "replaced by the checkpoint's own"
_LEFT_OUT = {
    "training state": ("optimizer*", "scheduler*", "trainer_state*", "training_args*", "rng_state*", "scaler.pt", "*.distcp"),
    "an index of weight files": ("*.safetensors.index.json", "*.bin.index.json", "*.index.json"),
    "weights that are not read": (
        "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.ggml", "*.onnx", "*.onnx_data",
        "*.npz", "*.npy", "*.tflite", "*.ot", "*.pkl", "*.mlmodel",
    ),
    "Python code, which slimlm does not run": ("*.py", "*.pyc"),
    "the description of the original": ("README*", "readme*", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.pdf", "*.webp"),
    "it describes the original's files": (
        "quantize_config.json", "quant_config.json", "hf_quant_config.json", "checkpoint.json", "SHA256SUMS*", "*.sha256",
        "*.md5",
    ),
}  # fmt: skip
"""Reasons, and patterns of the names of files that are left out for them; the first that fits counts."""
_LARGEST = 256 * 10**6
"""Bytes of the largest file that is copied."""
_OWN = ("config.json", "slimlm.json")
"""Files that every checkpoint has of its own."""


def copy_beside(folder: Path, out: Path, weights: Iterable[Path]) -> dict[str, str]:
    """Copy the files that belong with a model's checkpoint, unless the checkpoint has them already.

    Args:
        folder: the model's folder.
        out: the checkpoint, whose weights, config and tokenizer are written.
        weights: the files that the model's weights were read from.

    Returns:
        For each name in the folder what became of it: copied, replaced, or why it was left out. A GGUF file, which lies
        elsewhere, has none beside it: its folder may hold anything.
    """
    paths = list(weights)
    read = {path.name for path in paths}
    if not any(path.parent == folder for path in paths):
        return dict.fromkeys(sorted(read), READ)
    written = {path.name for path in out.iterdir()}
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name in read:
            found[path.name] = READ
        elif path.is_file() and path.name in (*written, *_OWN):
            found[path.name] = REPLACED
        elif (reason := _left_out(path)) is not None:
            found[path.name] = f"{LEFT_OUT}{reason}"
        else:
            shutil.copyfile(path, out / path.name)
            found[path.name] = COPIED
    return found


def _left_out(path: Path) -> str | None:
    """Why a file or folder beside the weights is not copied; None where it is."""
    if path.is_dir():
        return "a folder"
    if not path.is_file():
        return "a link that leads nowhere" if path.is_symlink() else "no file"
    if path.name.startswith("."):
        return "a hidden file"
    for reason, patterns in _LEFT_OUT.items():
        if _fits(path.name, patterns):
            return reason
    if not _fits(path.name, BELONGING):
        return "not a kind of file that belongs with a model's weights"
    return f"larger than {_LARGEST // 10**6} MB" if path.stat().st_size > _LARGEST else None


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
