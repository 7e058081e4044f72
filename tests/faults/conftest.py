"""A small model in two shards, the lines that compress it, and what they give when nothing disturbs them."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import ENDS, LLAMA_LIKE, save
from tests.faults import harness
from tests.faults.harness import Ended, Limits, Moment, Run, kept, same

BLOCKS = 3
MATCHED = """
name = "quick"
summary = "every stage but the plan, in little time"
embedding_bits = 8
[[steps]]
quantize = "absmax"
group_size = 16
[block_reconstruction]
passes = 1
"""
PLANNED = """
name = "planned"
summary = "for a plan, in as little time as one takes"
[[steps]]
joint = "alternation"
rounds = 1
descent_rounds = 0
group_size = 16
"""


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing disturbed."""

    out: Path
    seconds: float


@dataclass(frozen=True)
class Lines:
    """The lines that are typed: "matched" (calibrated on a text, blocks reconstructed), "own" (the same on text of the model's
    own), "planned" (on that too, within a budget)."""

    folder: Path
    model: Path

    def __call__(self, name: str, out: Path, model: Path | None = None) -> list[str]:
        own = {
            "matched": ["--recipe", str(self.folder / "matched.toml"), "--data", str(self.folder / "text.txt")],
            "own": ["--recipe", str(self.folder / "matched.toml"), "--data", "self"],
            "planned": ["--recipe", str(self.folder / "planned.toml"), "--data", "self", "--bits", "5"],
        }
        return ["compress", str(model or self.model), "-o", str(out), "--samples", "4", "--length", "16", *own[name]]


@dataclass(frozen=True)
class Bench:
    """One test's runs: each writes `out`, unless it is given another folder."""

    lines: Lines
    references: dict[str, Undisturbed]
    scratch: Path
    runs: list[Run]

    @property
    def out(self) -> Path:
        """What the test's runs write."""
        return self.scratch / "o"

    @property
    def journal(self) -> Path:
        """Where they keep their journal, while `out` is not there."""
        return self.scratch / "o.partial"

    def start(
        self,
        line: str | list[str] = "matched",
        moment: Moment | None = None,
        limits: Limits | None = None,
        *more: str,
    ) -> Run:
        """Begin a run."""
        typed = self.lines(line, self.out) if isinstance(line, str) else line
        run = harness.start([*typed, *more], self.scratch / f"said-{len(self.runs)}.txt", moment, limits)
        self.runs.append(run)
        return run

    def run(
        self,
        line: str | list[str] = "matched",
        moment: Moment | None = None,
        limits: Limits | None = None,
        *more: str,
    ) -> Ended:
        """Run to the end."""
        return self.start(line, moment, limits, *more).ended()

    def undisturbed(self, line: str = "matched") -> Undisturbed:
        """The same command where nothing goes wrong."""
        if line not in self.references:
            out = self.lines.folder / line
            began = time.monotonic()
            harness.start(self.lines(line, out), self.lines.folder / f"{line}.txt").ended().done()
            self.references[line] = Undisturbed(out, time.monotonic() - began)
        return self.references[line]

    def same(self, line: str = "matched", out: Path | None = None) -> None:
        """Check that what was written is what an undisturbed run writes, and that nothing is left next to it."""
        written = out or self.out
        same(self.undisturbed(line).out, written)
        assert not list(written.parent.glob("*.partial*")) and not list(written.parent.glob(".*.partial*"))

    def goes_on(self, line: str = "matched") -> Ended:
        """Check that the same command resumes with what is kept, makes nothing of it again, and gives the same bytes."""
        before = kept(self.journal)
        ended = self.run(line).done()
        if before:
            assert f"resuming after block {len(before)} of {BLOCKS}" in ended.said
        self.same(line)
        return ended


@pytest.fixture(scope="session")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Lines:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "matched.toml").write_text(MATCHED)
    (folder / "planned.toml").write_text(PLANNED)
    (folder / "text.txt").write_text("".join(f"{word} of the river, " for word in range(200)))
    torch.manual_seed(0)
    narrow = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": BLOCKS}
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA_LIKE, **ENDS, **narrow})).eval()
    save(model, folder / "model")
    model.save_pretrained(folder / "model", max_shard_size="60KB")
    (folder / "model" / "model.safetensors").unlink()
    return Lines(folder, folder / "model")


@pytest.fixture(scope="session")
def references() -> dict[str, Undisturbed]:
    return {}


@pytest.fixture
def bench(lines: Lines, references: dict[str, Undisturbed], tmp_path: Path, server: None) -> Iterator[Bench]:
    bench = Bench(lines, references, tmp_path, [])
    try:
        yield bench
    finally:
        for run in bench.runs:
            run.process.kill()
            run.process.join()
