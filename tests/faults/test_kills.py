"""kill -9, at named moments, at every change of the disk, and at random: what is finished stays, what comes out is the same."""

import os
import random
import shutil
import signal

import pytest

from tests.faults.conftest import BLOCKS, Bench
from tests.faults.harness import Moment, checkpoint_files, kept, same
from tests.gguf_models import write

SLOW = pytest.mark.slow  # A plan takes several seconds.
STAGES = {
    "the model is opened": ("matched", Moment(("slimlm.run.prepare:open_lazy",)), 0),
    "samples are drawn": ("matched", Moment(("slimlm.calibration.samples:draw_samples",), after=True), 0),
    "the model writes text": ("own", Moment(("slimlm.calibration.samples:generate_samples",), after=True), 0),
    "the text is noted": ("own", Moment(("slimlm.storage.journal:Journal.note_tensor",), after=True), 0),
    "a plan is made": ("planned", Moment(("slimlm.run.prepare:plan_within_budget",), after=True), 0),
    "the plan is noted": ("planned", Moment(("slimlm.pipeline:decide",), after=True), 0),
    "arguments are captured": ("matched", Moment(("slimlm.run.block:shared_arguments",), after=True), 0),
    "a layer is measured": ("matched", Moment(("slimlm.run.block:measure",), 2), 1),
    "a layer's steps are done": ("matched", Moment(("slimlm.run.block:record_of",), 9), 1),
    "a block is reconstructed": ("matched", Moment(("slimlm.pipeline:reconstruct_block",), 2, after=True), 1),
    "activations are passed on": ("matched", Moment(("slimlm.run.block:run_through",), 6), 2),
    "a block's file is written": ("matched", Moment(("slimlm.storage.journal:write_tensors",), 5, half=True), 1),
    "activations are written": ("matched", Moment(("slimlm.storage.activations:write_stream",), 3, half=True), 1),
    "the journal is written": ("own", Moment(("slimlm.storage.journal:Journal._write",), 6, after=True), 2),
    "embedding and head are compressed": ("matched", Moment(("slimlm.run.assemble:compress_embeddings",), after=True), BLOCKS),
    "the checkpoint is written": ("matched", Moment(("slimlm.storage.checkpoint:write_config",), 2), BLOCKS),
    "it is verified": ("matched", Moment(("slimlm.pipeline:verify_written",)), BLOCKS),
    "it is moved": ("matched", Moment(("os:rename",)), BLOCKS),
}


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=SLOW if line == "planned" else ()) for stage, (line, _, _) in STAGES.items()]
)
def test_a_run_killed_when(stage: str, bench: Bench) -> None:
    line, moment, blocks = STAGES[stage]
    assert bench.run(line, moment).code == -signal.SIGKILL
    assert not bench.out.exists()
    assert len(kept(bench.journal)) == blocks
    ended = bench.goes_on(line)
    # Neither text of the model's own nor a plan is made again.
    assert ("sample text" in ended.said) == (stage == "the model writes text")
    assert ("whole model" in ended.said) == (stage == "the model writes text")


@pytest.mark.parametrize("number", [1, 3])
def test_a_run_killed_while_it_moves_files_to_a_folder_that_is_there(number: int, bench: Bench) -> None:
    bench.out.mkdir()
    inside = bench.out / "slimlm.partial"
    # The first is that of the journal, which then names the files that are moved.
    moving = Moment(("os:replace",), 1 + number, after=True, since="slimlm.pipeline:verify_written")
    assert bench.run("matched", moving).code == -signal.SIGKILL
    assert len(kept(inside)) == BLOCKS and len(checkpoint_files(bench.out)) == 1 + number
    (bench.out / "stranger").write_text("x")
    bench.run().refused("already holds something (stranger)")
    (bench.out / "stranger").unlink()
    bench.run("matched", None, None, "--restart").refused("already holds something")
    assert len(kept(inside)) == BLOCKS
    bench.goes_on()


def test_a_run_killed_when_its_output_is_in_place_ends_when_its_line_is_typed_again(bench: Bench) -> None:
    assert bench.run("matched", Moment(("os:rename",), after=True)).code == -signal.SIGKILL
    same(bench.undisturbed().out, bench.out)
    # To start again would drop a finished checkpoint.
    bench.run("matched", None, None, "--restart").refused("already holds something")
    same(bench.undisturbed().out, bench.out)
    assert len(kept(bench.journal)) == BLOCKS
    bench.goes_on()


RESTARTS = {
    "the first file is to be set aside": (Moment(("os:rename",), 1), 2),
    "the journal is to be set aside": (Moment(("os:rename",), 5), 2),
    "all is set aside": (Moment(("slimlm.storage.set_aside:set_aside",), after=True), 2),
    "the run is ready": (Moment(("slimlm.pipeline:decide",), after=True), 2),
    "what was set aside is dropped": (Moment(("slimlm.storage.set_aside:drop",), after=True), 0),
}


@pytest.mark.parametrize("stage", RESTARTS)
def test_a_restart_that_is_killed_before_it_begins_gives_back_what_was_kept(stage: str, bench: Bench) -> None:
    moment, left = RESTARTS[stage]
    bench.run("matched", Moment(("slimlm.run.block:measure",), 3))
    assert len(kept(bench.journal)) == 2
    assert bench.run("matched", moment, None, "--restart").code == -signal.SIGKILL
    said = bench.run("matched").done().said
    assert (f"resuming after block {left} of {BLOCKS}" in said) == (left > 0)
    bench.same()


# Every call that changes what is on the disk or makes it last.
CHANGES = ("os:fsync", "os:replace", "os:rename", "os:unlink", "os:mkdir", "os:rmdir")


@pytest.mark.slow
def test_a_run_killed_at_every_change_of_the_disk(bench: Bench) -> None:
    """Some 70 calls, and twice a run for each: minutes."""
    for number in range(1, 500):
        shutil.rmtree(bench.out, ignore_errors=True)
        ended = bench.run("matched", Moment(CHANGES, number))
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended
        if bench.out.exists():
            same(bench.undisturbed().out, bench.out)
        again = bench.run()
        if again.code != 0:
            # The output is whole, and what says so was being dropped.
            again.refused("already holds something")
            assert not kept(bench.journal)
            same(bench.undisturbed().out, bench.out)
            shutil.rmtree(bench.journal, ignore_errors=True)
        bench.same()
    assert number > 40, "the calls were not counted"


def killed_at_random(bench: Bench, kills: int, seed: int) -> None:
    """Runs on one output after another, each killed at a moment drawn evenly over an undisturbed run, if it has not ended."""
    drawn, whole, made, blocks = random.Random(seed), bench.undisturbed().seconds, 0, 0
    while made < kills:
        run = bench.start()
        run.send_after(drawn.uniform(0, whole), signal.SIGKILL)
        ended = run.ended()
        if ended.code == -signal.SIGKILL:
            made += 1
            if not bench.out.exists():
                # Nothing that was finished is lost.
                now = len(kept(bench.journal))
                assert now >= blocks, f"seed {seed}, kill {made}: {now} blocks are kept where {blocks} were"
                blocks = now
                continue
            ended = bench.run()
        # A kill while the journal was dropped, the output being whole, leaves what is refused with a message.
        if ended.code != 0:
            ended.refused("already holds something")
            shutil.rmtree(bench.journal, ignore_errors=True)
        bench.same()
        shutil.rmtree(bench.out)
        blocks = 0
    if not bench.out.exists():
        bench.goes_on()


SEED = int(os.environ.get("SLIMLM_SEED", "0"))


def test_a_run_killed_at_a_few_random_moments(bench: Bench) -> None:
    killed_at_random(bench, 3, SEED)


@pytest.mark.slow
def test_a_run_killed_at_many_random_moments(bench: Bench) -> None:
    """50 kills, or SLIMLM_KILLS, and as many starts: a minute or two."""
    killed_at_random(bench, int(os.environ.get("SLIMLM_KILLS", "50")), SEED + 1)


@pytest.mark.parametrize("half", [False, True])
def test_a_run_killed_while_the_weights_of_a_gguf_file_are_dequantized(half: bool, bench: Bench) -> None:
    model = write(bench.scratch / "m.gguf")
    line, other = (bench.lines("matched", out, model) for out in (bench.out, bench.scratch / "p"))
    moment = Moment(("slimlm.models.lazy:write_stream",), half=half, after=not half)
    assert bench.run(line, moment).code == -signal.SIGKILL
    assert not bench.out.exists() and kept(bench.journal) == []
    bench.run(line).done()
    bench.run(other).done()
    same(bench.out, bench.scratch / "p")
    assert not list(bench.scratch.glob("*.partial*")), "the dequantized weights are gone with the journal"


def test_a_gguf_file_that_changes_between_two_starts_is_another_model(bench: Bench) -> None:
    model = write(bench.scratch / "m.gguf")
    line = bench.lines("matched", bench.out, model)
    stopped = bench.run(line, Moment(("slimlm.run.block:run_through",), 4, after=True))
    assert stopped.code == -signal.SIGKILL and len(kept(bench.journal)) == 1
    write(model, kinds=("Q4_0",))
    bench.run(line).refused("holds another run", "m.gguf")
