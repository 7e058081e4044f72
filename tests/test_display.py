"""What is shown of a run: figures that follow from its events, on a clock that the test turns."""

import dataclasses
import io
from typing import Literal

import pytest
from rich.console import Console
from typer.testing import CliRunner

from slimlm.cli.app import app
from slimlm.core.errors import SlimlmError
from slimlm.display import Display, Error, Lines, Progress, duration, progress_on, shown
from slimlm.events import BlockDone, BlockProgress, Event, LayerDone, TuningProgress, both, quiet
from slimlm.record import HeldBackLoss, LayerRecord, Measured


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def record(name: str, error: float) -> LayerRecord:
    return LayerRecord(name, (8, 4), "4-bit (one scale)", 128, 0.0, 0, error)


def block(number: int, seconds: float | None, *errors: float) -> BlockDone:
    name = f"layers.{number - 1}"
    return BlockDone(number, name, tuple(record(f"{name}.q{i}", error) for i, error in enumerate(errors)), seconds)


def after(progress: Progress, clock: Clock, *blocks: BlockDone, total: int = 6) -> None:
    """Let these blocks be finished in turn."""
    for done in blocks:
        clock.now += done.seconds or 0.0
        progress(Event("compress", done.number, total, blocks=(done,)))


def test_the_time_left_is_that_of_the_finished_blocks_for_those_to_come() -> None:
    clock = Clock()
    progress = Progress(clock)
    progress(Event("compress", 0, 6))
    assert progress.seconds_left is None
    after(progress, clock, block(1, 10, 0.2), block(2, 20, 0.4))
    assert progress.seconds_left == pytest.approx(4 * 15)
    clock.now += 5  # into the third block
    assert progress.seconds_left == pytest.approx(4 * 15 - 5)
    clock.now += 995  # it takes far longer than it should: those after it still take their time, and it a tenth more
    assert progress.seconds_left == pytest.approx(3 * 15 + 100)


def test_the_time_before_the_first_block_is_no_part_of_it_and_the_last_block_never_takes_nothing() -> None:
    clock = Clock()
    progress = Progress(clock)
    progress(Event("compress", 0, 2))
    clock.now += 500  # the embedding
    progress(Event("compress", 0, 2, "read", "layers.0"))
    clock.now += 6
    assert progress.seconds_left is None and progress.least_seconds_left == pytest.approx(6)
    assert progress.time_left == ", at least 6 s left"
    progress(Event("compress", 0, 2, "measure", "layers.0"))
    clock.now += 4
    progress(Event("compress", 1, 2, blocks=(block(1, 10, 0.2),)))
    assert progress.seconds_left == pytest.approx(10) and progress.least_seconds_left is None
    clock.now += 40
    assert progress.seconds_left == pytest.approx(4)
    progress(Event("compress", 2, 2, blocks=(block(2, 40, 0.2),)))
    assert progress.seconds_left == 0


def test_a_run_that_goes_on_counts_the_errors_of_all_blocks_and_the_pace_of_its_own() -> None:
    clock = Clock()
    progress = Progress(clock)
    progress(Event("compress", 3, 6, blocks=(block(1, None, 0.1), block(2, None, 0.2), block(3, None, 0.3))))
    assert progress.seconds_left is None and progress.error == Error("diagonal error", pytest.approx(0.2))
    after(progress, clock, block(4, 7, 0.6))
    assert progress.seconds_left == pytest.approx(2 * 7) and progress.error == Error("diagonal error", pytest.approx(0.3))


def test_other_stages_have_a_pace_of_their_own() -> None:
    clock = Clock()
    progress = Progress(clock)
    progress(Event("compress", 6, 6, blocks=(block(1, None, 0.1),)))
    clock.now += 100
    progress(Event("sample text", 0, 8))
    clock.now += 6
    progress(Event("sample text", 2, 8))
    assert progress.seconds_left == pytest.approx(18) and progress.error is None


def test_lines_say_once_per_block_what_it_lost_what_it_took_and_what_is_left() -> None:
    clock, file = Clock(), io.StringIO()
    lines = Lines(file, clock)
    lines(Event("open the model", 0, 1))
    lines(Event("open the model", 1, 1))
    lines(Event("compress", 1, 3, blocks=(block(1, None, 0.5),)))
    progress = BlockProgress(lines, "layers.1", 1, 3)
    progress.doing("read")
    progress.doing("measure", "q0", "q1")
    progress.finished_layer(LayerDone(record("layers.1.q0", 0.25), 64, 2.0))
    clock.now += 90
    progress.finished(block(2, 90, 0.25, 0.75).records, 90)
    lines(Event("compress", 3, 3, blocks=(block(3, 30),)))
    assert file.getvalue().splitlines() == [
        "open the model",
        "block 1/3 layers.0: finished by an earlier run, as are the blocks before it",
        "block 2/3 layers.1: diagonal error 0.5000 (mean so far 0.5000), 90.0 s, about 90 s left",
        "block 3/3 layers.2: nothing to compress (mean diagonal error so far 0.5000), 30.0 s, about 0 s left",
    ]


def test_errors_of_two_kinds_on_one_line_or_display_are_each_named() -> None:
    clock, file, display = Clock(), io.StringIO(), Display()
    lines = Lines(file, clock)
    measured = dataclasses.replace(record("layers.1.q0", 0.5), output_error=0.03)
    done = BlockDone(2, "layers.1", (measured,), 10)
    for observer in (lines, display):
        observer(Event("compress", 0, 3))
        observer(Event("compress", 1, 3, blocks=(block(1, 10, 0.25),)))
        observer(Event("compress", 1, 3, "steps", "layers.1", ("q0",), LayerDone(measured, 64, 2.0)))
        observer(Event("compress", 2, 3, blocks=(done,)))
    assert "block 2/3 layers.1: output error 0.0300 (mean diagonal error so far 0.3750), 10.0 s" in file.getvalue()
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(display)
    shown = [" ".join(row.split()) for row in console.export_text().splitlines()]
    assert {"diagonal error 0.3750 mean of 2 layers", "output error last 0.0300 (q0)"} <= set(shown)


def test_lines_of_other_stages_are_ten_seconds_apart() -> None:
    clock, file = Clock(), io.StringIO()
    lines = Lines(file, clock)
    for done in range(40):
        lines(Event("plan", done, 40))
        clock.now += 1
    assert file.getvalue().splitlines() == [
        "plan",
        "plan 10/40, about 30 s left",
        "plan 20/40, about 20 s left",
        "plan 30/40, about 10 s left",
    ]


def test_the_display_shows_block_layers_stage_errors_and_times() -> None:
    clock = Clock()
    display = Display(clock)
    console = Console(width=100, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(display)
    display(Event("compress", 0, 4))
    after(display.progress, clock, block(1, 60, 0.25, 0.75), total=4)
    progress = BlockProgress(display, "model.layers.1", 1, 4)
    progress.finished_layer(LayerDone(record("model.layers.1.mlp.down_proj", 0.125), 64, 2.0))
    progress.doing("measure", "self_attn.q_proj", "self_attn.k_proj")
    clock.now += 3
    console.print(display)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        "1 of 4 blocks",
        "model.layers.1",
        "measure the inputs of layers: self_attn.q_proj, self_attn.k_proj",
        "0.5000 mean of 2 layers, last 0.1250 (down_proj)",
        "63 s, about 177 s left".replace("177 s", duration(177)),
    ):
        assert words in text


def test_on_a_terminal_one_display_is_drawn_and_taken_away() -> None:
    file = io.StringIO()
    with progress_on(Console(file=file, force_terminal=True, width=80)) as observer:
        assert isinstance(observer, Display)
        observer(Event("compress", 1, 4))
    assert "compress" in file.getvalue()
    assert file.getvalue().endswith("\x1b[2K"), "the last thing written erases the display"


def test_elsewhere_lines_go_to_standard_error_and_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    for silent in (False, True):
        with progress_on(Console(file=io.StringIO()), silent=silent) as observer:
            observer(Event("open the model", 0, 1))
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "open the model\n")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (99, "99 s"), (187, "3:07 min"), (3599, "59:59 min"), (7500, "2:05 h"), (90000, "25:00 h")],
)
def test_times_are_said_in_a_unit_that_suits_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_both_observers_hear_everything() -> None:
    first: list[Event] = []
    second: list[Event] = []
    event = Event("plan", 1, 2)
    both(first.append, both(quiet, second.append))(event)
    assert first == second == [event]


def test_quiet_shows_no_progress(llama_folder, text_file, tmp_path) -> None:  # type: ignore[no-untyped-def]
    line = ["compress", str(llama_folder), "--recipe", "absmax", "--data", str(text_file), "--samples", "4", "--length", "32"]
    plain = CliRunner().invoke(app, [*line, "--out", str(tmp_path / "one")])
    assert plain.exit_code == 0 and "block 2/2 model.layers.1: diagonal error" in plain.stderr
    silent = CliRunner().invoke(app, [*line, "--out", str(tmp_path / "two"), "--quiet"])
    assert silent.exit_code == 0 and silent.stderr == "" and "written and verified" in silent.stdout


def test_a_long_block_has_lines_of_its_own_that_say_how_long_the_run_will_take_at_least() -> None:
    clock, file = Clock(), io.StringIO()
    lines = Lines(file, clock)
    lines(Event("compress", 0, 3))
    progress = BlockProgress(lines, "layers.0", 0, 3)
    progress.doing("read")
    clock.now += 20
    progress.doing("measure", "q0")
    clock.now += 5
    progress.doing("steps", "q0")
    clock.now += 5
    progress.doing("propagate")
    assert file.getvalue().splitlines() == [
        "compress",
        "block 1/3 layers.0: measure the inputs of layers, at least 40 s left",
        "block 1/3 layers.0: compute the block's outputs, at least 60 s left",
    ]


@pytest.mark.parametrize(("progress", "said"), [(True, "open the model\n"), (False, ""), ("auto", "")])
def test_progress_is_shown_where_it_is_asked_for(
    progress: bool | Literal["auto"], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with shown(progress) as observer:
        observer(Event("open the model", 0, 1))
    assert capsys.readouterr().err == said


def test_on_a_terminal_progress_is_shown_unasked_and_in_a_notebook_as_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Console, "is_terminal", property(lambda self: True))
    with shown("auto") as observer:
        assert isinstance(observer, Display)
    monkeypatch.setattr("slimlm.display.Console", lambda **_: Console(force_jupyter=True))
    with shown("auto") as observer:
        assert isinstance(observer, Lines)


def test_ranks_other_than_the_first_show_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("slimlm.display.global_rank", lambda: 1)
    with shown(True) as observer:
        observer(Event("open the model", 0, 1))
    assert capsys.readouterr().err == ""


def test_what_cannot_show_progress_is_refused() -> None:
    with pytest.raises(SlimlmError, match="`progress` is of type int"), shown(7):  # type: ignore[arg-type]
        pass


def test_the_output_error_is_shown_where_all_layers_have_it() -> None:
    measured = [dataclasses.replace(record(f"q{i}", 0.5), output_error=error) for i, error in enumerate((0.1, 0.3))]
    assert Error.of(measured) == Error("output error", pytest.approx(0.2))
    assert Error.of([*measured, record("q2", 0.8)]) == Error("diagonal error", pytest.approx(0.6))
    assert Error.of([]) is None


def test_a_form_that_is_worse_than_the_best_one_is_shown() -> None:
    def found(loss: float) -> HeldBackLoss:
        return HeldBackLoss(loss, Measured(2.0, 0.1), None)

    for last, words in ((0.2, "0.24 -> 0.2, on"), (0.6, "0.24 -> 0.2, last 0.6, on")):
        clock, file = Clock(), io.StringIO()
        lines = Lines(file, clock)
        lines(Event("tune", 0, 9))
        clock.now += 60
        lines(Event("tune", 1, 9, tuning=TuningProgress(512, 0.3, found(0.24), found(0.2), found(last))))
        assert f"tune 1/9: loss {words} windows held back" in file.getvalue()
