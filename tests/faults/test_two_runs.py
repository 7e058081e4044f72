"""Two runs on one output: one writes, the other is refused with a message, whatever the moment."""

import signal

from tests.faults.conftest import BLOCKS, Bench
from tests.faults.harness import Moment, kept


def test_of_two_runs_that_begin_together_one_writes(bench: Bench) -> None:
    ended = [run.ended() for run in (bench.start(), bench.start())]
    first, second = sorted(ended, key=lambda run: run.code)
    first.done()
    # The other came while the first wrote, or when it had written.
    assert "another process is writing" in second.refused().said or "already holds something" in second.said
    bench.same()


def test_the_lock_is_held_by_a_run_that_stands_still_and_free_when_it_is_killed(bench: Bench) -> None:
    held = bench.start("matched", Moment(("slimlm.run.block:measure",), 3, signal=signal.SIGSTOP))
    held.stopped()
    bench.run().refused("another process is writing", "is locked")
    bench.run("matched", None, None, "--restart").refused("another process is writing")
    assert len(kept(bench.journal)) == 2
    held.send(signal.SIGKILL)
    held.ended()
    bench.goes_on()


def test_a_run_that_begins_just_before_another_ends_does_not_do_it_all_again(bench: Bench) -> None:
    late = bench.start("own", Moment(("slimlm.run.resume:open_journal",), signal=signal.SIGSTOP))
    late.stopped()
    bench.run().done()
    late.send(signal.SIGCONT)
    late.ended().refused("already holds something")
    bench.same()


def test_an_output_that_somebody_else_fills_meanwhile_is_not_written_over(bench: Bench) -> None:
    held = bench.start("matched", Moment(("slimlm.storage.checkpoint:write_config",), signal=signal.SIGSTOP))
    held.stopped()
    bench.out.mkdir()
    (bench.out / "config.json").write_text("somebody else's")
    held.send(signal.SIGCONT)
    held.ended().refused("the checkpoint is complete in", "already holds something (config.json)")
    assert (bench.out / "config.json").read_text() == "somebody else's"
    assert len(kept(bench.journal)) == BLOCKS
    bench.run().refused("already holds something (config.json)")
    (bench.out / "config.json").unlink()
    bench.goes_on()


def test_a_folder_that_is_no_journal_is_left_alone(bench: Bench) -> None:
    bench.journal.mkdir()
    mine = {"mine": "precious", "lock": "", "journal.json": "{}"}
    for name, text in mine.items():
        (bench.journal / name).write_text(text)
    for more in ([], ["--restart"]):
        bench.run("matched", None, None, *more).refused("holds other files")
    assert {path.name: path.read_text() for path in bench.journal.iterdir()} == mine
