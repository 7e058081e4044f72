"""Tiny random models of the real transformers classes, what compression makes of them, and the command line in this process."""

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Workers that run side by side (pytest -n) share the cores; torch and the commands that tests start read this.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
# As `import slimlm` would choose before torch: what a run tells the user must not depend on how busy the machine is.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import pytest
import torch
from filelock import FileLock
from transformers import PreTrainedModel

import slimlm
from benchmarks import tiny_models
from benchmarks.tiny_models import ENDS as ENDS
from benchmarks.tiny_models import LLAMA_LIKE as LLAMA_LIKE
from benchmarks.tiny_models import VOCABULARY as VOCABULARY
from benchmarks.tiny_models import byte_tokenizer as byte_tokenizer
from benchmarks.tiny_models import made_text
from benchmarks.tiny_models import save as save
from slimlm.cli.app import main
from slimlm.data.documents import Purpose, Source, pieces
from slimlm.data.files import Piece
from slimlm.data.rows import Reading
from slimlm.kernels import native
from slimlm.record import Record
from slimlm.runtime.cpu import bindings
from tests import forked
from tests.fake_cuda import FakeCuda, install

needs_kernels = pytest.mark.skipif(native.library() is None, reason=f"no CPU kernels: {native.status().reason}")
KERNEL_VARIANTS: list[str] = [] if (library := native.library()) is None else library.slimlm_variants().decode().split()
"""The variants of the CPU kernels that this processor can run, best first."""


def _named(*names: str) -> dict[str, Callable[[], PreTrainedModel]]:
    """Functions that make models of these families."""
    return {name: partial(tiny_models.model_of, tiny_models.FAMILIES[name]) for name in names}


FAMILIES = _named("llama", "llama-tied", "mistral-window", "qwen2-mixed-attention", "qwen3", "opt", "opt-projected", "gpt2")
# A mixture whose first block is dense, and one with experts transposed, biases, and the rows of gate and up in turn.
MIXTURES = _named("mixtral", "qwen3-moe", "gpt-oss")
MORE_FAMILIES = {
    **_named("gemma2", "gemma3", "phi3", "gpt-neox", "falcon", "falcon-alibi", "falcon-new", "stablelm"),
    **MIXTURES,
}
ALL_FAMILIES = {**FAMILIES, **MORE_FAMILIES}


def random_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model whose logits are far from constant."""
    torch.manual_seed(0)
    return tiny_models.randomized({**ALL_FAMILIES, **FAMILIES}[family]()).to(dtype)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 6000 bytes of made-up text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    made_text(path)
    return path


@pytest.fixture(params=[*sorted(FAMILIES), "gemma2", "mixtral"])
def family(request: pytest.FixtureRequest) -> str:
    """Families in turn, of those with an unusual embedding or head and of mixtures one."""
    return str(request.param)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The process that runs of tests/forked.py and tests/faults are forked from."""
    forked.start_server()
    # It answers when it has imported the program, so that runs can be timed.
    first = forked.start("", [], tmp_path_factory.mktemp("server") / "said.txt")
    first.join()
    assert first.exitcode == 0


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in float16 with its tokenizer."""
    return save(random_model("llama", torch.float16), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(params=KERNEL_VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each variant of the CPU kernels that this processor can run, in use."""
    before = bindings.active_variant()
    bindings.use_variant(request.param)
    yield request.param
    bindings.use_variant(before)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """torch.cuda with two fake GPUs."""
    return install(monkeypatch)


@dataclass(frozen=True)
class Checkpoint:
    """A compressed model and its original. Many tests share the folders: a test that changes one copies it first."""

    dense: Path
    out: Path
    record: Record


class Checkpoints:
    """Random models, each compressed once, whichever test and whichever worker asks first."""

    def __init__(self, root: Path, text: Path) -> None:
        self._root = root
        self._text = text
        root.mkdir(exist_ok=True)

    def __call__(self, family: str = "llama", dtype: torch.dtype = torch.float16, recipe: str = "slim") -> Checkpoint:
        """The model of this family and dtype, compressed by a shipped recipe on eight samples of 48 tokens."""
        folder = self._root / f"{family}-{dtype}-{recipe}"
        record = folder / "record.pickle"
        with FileLock(folder.with_suffix(".lock")):
            if not record.is_file():
                save(random_model(family, dtype), folder / "dense")
                options: dict[str, Any] = {"recipe": recipe, "data": str(self._text), "samples": 8, "length": 48}
                made = slimlm.compress(folder / "dense", folder / "out", device="cpu", **options)
                record.write_bytes(pickle.dumps(made.record))
        return Checkpoint(folder / "dense", folder / "out", pickle.loads(record.read_bytes()))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Checkpoints:
    """Compressed models that all tests share."""
    root = tmp_path_factory.getbasetemp()
    return Checkpoints((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "checkpoints", text_file)


@pytest.fixture(scope="session")
def packed(checkpoints: Checkpoints) -> Path:
    """The tiny Llama in float16, compressed by `slim`."""
    return checkpoints().out


def documents(source: Source, purpose: Purpose, reading: Reading | None = None) -> Iterator[str]:
    """The documents of a source, read lazily and in order, each put together from its pieces."""
    return _joined(pieces(source, purpose, reading or Reading()))


def _joined(pieces: Iterator[Piece]) -> Iterator[str]:
    document: list[str] = []
    for piece in pieces:
        if piece.begins and document:
            yield "".join(document)
            document = []
        document.append(piece.text)
    if document:
        yield "".join(document)


class Line:
    """Types a command line into this process, and gives what came of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """The exit status, standard output and standard error."""
        self.monkeypatch.setattr(sys, "argv", ["slimlm", *map(str, arguments)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = self.capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    def refused(self, *arguments: object) -> str:
        """The message of a refusal: status 2, nothing on standard output, no traceback."""
        status, out, err = self(*arguments)
        assert status == 2
        assert out == ""
        assert "Traceback" not in err
        return " ".join(err.split())


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Line:
    """The command line."""
    return Line(monkeypatch, capsys)
