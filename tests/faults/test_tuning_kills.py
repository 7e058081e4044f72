"""Tuning that is killed or stopped at named moments: the same line typed again gives the bytes of an unbroken run."""

import json
import signal
from pathlib import Path

import pytest

from tests.faults.conftest import Bench
from tests.faults.harness import Moment, start

STEPS = 4


def typed(bench: Bench, out: Path) -> list[str]:
    """The line that tunes what the line "matched" gives."""
    given = bench.undisturbed().out
    data, against = str(bench.lines.folder / "text.txt"), str(bench.lines.model)
    sizes = ["--length", "16", "--batch", "2", "--tokens", str(STEPS * 32)]
    return ["tune", str(given), "--out", str(out), "--data", data, "--against", against, *sizes]


def unbroken(bench: Bench) -> dict[str, bytes]:
    """The weights that nothing disturbed."""
    out = bench.lines.folder / "tuned"
    if not out.is_dir():
        start(typed(bench, out), bench.lines.folder / "tuned.txt").ended().done()
    return weights(out)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


STEP = "slimlm.tuning.loop:Loop._add_gradients"
MOMENTS = {
    "the original's hidden states are half written": Moment(("slimlm.run.tune:write_stream",), half=True),
    "the original's hidden states are noted": Moment(("slimlm.storage.journal:Journal.note_file",), after=True),
    "a step is made": Moment((STEP,), 3),
    "the state is half written": Moment(("slimlm.storage.journal:write_tensors",), 1, half=True, since=STEP),
    "the state is stored": Moment(("slimlm.storage.journal:Journal.commit_steps",), after=True),
    "the checkpoint is written": Moment(("slimlm.run.tune:verify",)),
    "it is moved": Moment(("os:rename",), after=True),
}

STORED = ("the state is stored", "the checkpoint is written", "it is moved")


@pytest.mark.parametrize("moment", MOMENTS)
def test_tuning_that_is_killed_when(moment: str, bench: Bench) -> None:
    expected = unbroken(bench)
    line = typed(bench, bench.out)
    assert bench.run(line, MOMENTS[moment]).code == -signal.SIGKILL
    assert bench.out.exists() == (moment == "it is moved")
    ended = bench.run(line).done()
    assert ("resuming after step" in ended.said) == (
        moment in ("the state is stored", "the checkpoint is written", "it is moved")
    )
    assert weights(bench.out) == expected
    assert not list(bench.scratch.glob("*.partial*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_tuning_that_is_told_to_stop_keeps_its_last_step(number: signal.Signals, bench: Bench) -> None:
    expected = unbroken(bench)
    line = typed(bench, bench.out)
    stopped = bench.run(line, Moment((STEP,), 3, signal=number))
    assert stopped.code in (128 + number, 130) and "2 finished steps are kept" in stopped.said
    content = json.loads((bench.journal / "journal.json").read_text())["content"]
    assert content["notes"]["steps"]["done"] == 2
    ended = bench.run(line).done()
    assert "resuming after step 2 of 4" in ended.said
    assert weights(bench.out) == expected
