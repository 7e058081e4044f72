"""What a run reads is changed while it is stopped: refused with an error that names it, and resumed when it is brought back."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.faults import harness
from tests.faults.conftest import Bench, Lines
from tests.faults.harness import Moment, kept

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def model(bench: Bench) -> Path:
    """A copy of the model, to damage."""
    return Path(shutil.copytree(bench.lines.model, bench.scratch / "model"))


@pytest.fixture
def line(bench: Bench, model: Path) -> list[str]:
    """What compresses that copy, stopped in the second of three blocks."""
    line = bench.lines("matched", bench.out, model)
    assert bench.run(line, Moment(("slimlm.run.block:measure",), 2)).code == -signal.SIGKILL
    assert len(kept(bench.journal)) == 1
    return line


def brought_back(bench: Bench, model: Path, line: list[str], name: str) -> None:
    """Check that a refusal dropped nothing, and that the original file is all that is needed."""
    assert len(kept(bench.journal)) == 1
    shutil.copyfile(bench.lines.model / name, model / name)
    assert "resuming after block 1" in bench.run(line).done().said
    bench.same()


def test_a_shard_that_was_cut_short(bench: Bench, model: Path, line: list[str]) -> None:
    data = (model / SHARD).read_bytes()
    (model / SHARD).write_bytes(data[: len(data) // 2])
    bench.run(line).refused("damaged or cut short", SHARD)
    (model / SHARD).unlink()
    bench.run(line).refused(f"{SHARD} is missing")
    brought_back(bench, model, line, SHARD)


def test_a_weight_that_was_changed_in_the_middle_of_its_tensor(bench: Bench, model: Path, line: list[str]) -> None:
    """The identity of a file samples the first 4 KiB of each tensor, and does not see this."""
    tensors = load_file(model / SHARD)
    name = next(name for name, tensor in tensors.items() if tensor.numel() * 4 > 5000)
    tensors[name].view(-1)[-1] += 1e-3
    save_file(tensors, model / SHARD, metadata={"format": "pt"})
    size = (bench.lines.model / SHARD).stat().st_size
    assert (model / SHARD).stat().st_size == size
    block = ".".join(name.split(".")[:3])
    bench.run(line).refused("was begun on other weights", f"{block} changed since", "restart")
    brought_back(bench, model, line, SHARD)


def test_a_setting_of_the_model_that_was_changed(bench: Bench, model: Path, line: list[str]) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    bench.run(line).refused("config.rms_norm_eps was 1e-06 and is 0.001")
    brought_back(bench, model, line, "config.json")


def test_a_shard_that_is_cut_short_while_a_run_reads_it(bench: Bench, model: Path) -> None:
    """The system kills the run (SIGBUS: it reads a mapping whose file is gone); the journal is sound."""
    line = bench.lines("matched", bench.out, model)
    held = bench.start(line, Moment(("slimlm.run.block:run_through",), 2, signal=signal.SIGSTOP))
    held.stopped()
    for shard in model.glob("*.safetensors"):
        with shard.open("r+b") as file:
            file.truncate(0)
    held.send(signal.SIGCONT)
    assert held.ended().code in (-signal.SIGBUS, 2)
    blocks = len(kept(bench.journal))
    assert blocks >= 1
    bench.run(line).refused("damaged or cut short")
    for shard in bench.lines.model.glob("*.safetensors"):
        shutil.copyfile(shard, model / shard.name)
    assert f"resuming after block {blocks}" in bench.run(line).done().said
    bench.same()


@pytest.fixture(scope="module")
def stopped(lines: Lines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The journal of a run that was killed in the second of three blocks."""
    folder = tmp_path_factory.mktemp("stopped")
    run = harness.start(lines("matched", folder / "o"), folder / "said.txt", Moment(("slimlm.run.block:measure",), 2))
    assert run.ended().code == -signal.SIGKILL
    return folder / "o.partial"


@pytest.mark.parametrize("file", ["journal.json", "block-0001.safetensors", "inputs-0001.safetensors", "text.safetensors"])
@pytest.mark.parametrize("how", ["a bit", "half", "all", "gone"])
def test_a_damaged_journal(bench: Bench, stopped: Path, file: str, how: str) -> None:
    shutil.copytree(stopped, bench.journal)
    path = bench.journal / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"a bit": data, "half": data[: len(data) // 2]}.get(how, b""))
    if how == "gone":
        path.unlink()
    if (file, how) == ("journal.json", "gone"):
        # Nothing says any more that there was a run.
        bench.goes_on()
        return
    bench.run().refused("cannot be resumed", "restart")
    if how == "a bit":
        bench.run("matched", None, None, "--restart").done()
        bench.same()
