"""The same error names an argument in Python and the verb's flag on the command line."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import slimlm
from slimlm import pipeline
from slimlm.bench.model_speed import Settings, model_speed
from slimlm.cli import compress as compress_verb
from slimlm.cli import plan as plan_verb
from slimlm.cli.app import VERBS, app
from slimlm.cli.verb import in_flags
from slimlm.core.errors import SlimlmError
from slimlm.run.config import RunConfig, RunOptions
from tests.conftest import Line, documents

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("verb", "text", "said"),
    [
        ("compress", "give more text or `samples`", "give more text or --samples"),
        ("compress", "or give `restart=True` to start again", "or give --restart to start again"),
        ("compress", '`device="gpu"`: give `device=\'cpu\'`', "--device gpu: give --device cpu"),
        ("compress", "`embedding_bits=3`: 4 to 8", "--embedding-bits 3: 4 to 8"),
        ("compress", "`model` and `out` are alike", "MODEL and --out are alike"),
        ("compress", "`text` and `x y` are no arguments here", "`text` and `x y` are no arguments here"),
        ("bench", "`new_tokens=0` and `batches`", "--new-tokens 0 and --batch"),
        ("verify", "the `folder`", "the FOLDER"),
        ("plan", "`out=/a b`: is taken", "--out /a b: is taken"),
    ],
)  # fmt: skip
def test_arguments_become_the_flags_of_the_verb(verb: str, text: str, said: str) -> None:
    assert in_flags(text, COMMANDS[verb].params) == said


def bench(folder: Path, **settings: Any) -> None:
    model_speed(str(folder), Settings(**settings))


Cases = dict[str, tuple[Callable[[], object], tuple[object, ...]]]


@pytest.fixture
def cases(llama_folder: Path, packed: Path, tmp_path: Path) -> Cases:
    """By the argument that it names: an error raised in Python, and the line that gives the same error."""
    out = tmp_path / "out"
    (tmp_path / "few.txt").write_text("few words of text")
    few = {"data": str(tmp_path / "few.txt"), "recipe": "absmax"}
    given = ("--data", tmp_path / "few.txt", "--recipe", "absmax")
    compress = ("compress", llama_folder, "-o")
    return {
        "bits": (lambda: slimlm.compress(llama_folder, out, bits=1), (*compress, out, "--bits", 1)),
        "seed": (lambda: slimlm.compress(llama_folder, out, seed=2**64), (*compress, out, "--seed", 2**64)),
        "out": (lambda: slimlm.compress(llama_folder, "/", recipe="absmax"), (*compress, "/", "--recipe", "absmax")),
        "length": (lambda: slimlm.compress(llama_folder, out, **few), (*compress, out, *given)),
        "data": (lambda: next(documents("no-such-text", "calibration")), (*compress, out, "--data", "no-such-text")),
        "text": (lambda: next(documents("no-such-text", "evaluation")), ("eval", packed, "--text", "no-such-text")),
        "prompt_tokens": (lambda: bench(packed, prompt_tokens=64), ("bench", packed, "--quick", "--prompt-tokens", 64)),
        "batches": (lambda: bench(packed, batches=(0,)), ("bench", packed, "--quick", "--batch", 0)),
    }


FLAGS = {"prompt_tokens": "--prompt-tokens", "batches": "--batch"}
"""of the arguments whose flag has another name"""


@pytest.mark.parametrize("argument", ["bits", "seed", "out", "length", "data", "text", "prompt_tokens", "batches"])
def test_an_error_names_the_argument_in_python_and_the_flag_on_the_command_line(
    argument: str,
    cases: Cases,
    line: Line,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    raised, typed = cases[argument]
    with pytest.raises(SlimlmError) as error:
        raised()
    python, shown = str(error.value), line.refused(*typed)
    flag = FLAGS.get(argument, f"--{argument}")
    assert re.search(rf"`{argument}[=`]", python) and "--" not in python
    assert re.search(rf"(?<![\w-]){flag}\b", shown) and f"`{argument}" not in shown


def test_notes_name_flags(
    llama_folder: Path,
    tmp_path: Path,
    line: Line,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compress(*_: object, notify: Callable[[str], None], **__: object) -> None:
        notify('give more `samples`, or `recipe="gptq"`')
        raise SlimlmError("then `data`")

    monkeypatch.setattr("slimlm.pipeline.compress", compress)
    status, _, err = line("compress", llama_folder, "-o", tmp_path / "out")
    assert status == 2
    assert err == "note: give more --samples, or --recipe gptq\nslimlm: then --data\n"


@pytest.mark.parametrize(
    ("verb", "functions"),
    [
        (compress_verb.compress, [pipeline.compress]),
        (plan_verb.plan, [pipeline.estimate, pipeline.plan]),
    ],
)
def test_flags_have_the_names_and_defaults_of_the_arguments(
    verb: Callable[..., object], functions: list[Callable[..., object]]
) -> None:
    flags = inspect.signature(verb).parameters
    defaults = {field.name: field.default for field in dataclasses.fields(RunConfig)}
    for function in functions:
        given = {name: argument.default for name, argument in inspect.signature(function).parameters.items()}
        for name, default in {**given, **{option: defaults[option] for option in RunOptions.__annotations__}}.items():
            if name not in ("progress", "notify", "options"):
                assert name in flags, name
                assert flags[name].default == default, name


def test_every_default_is_shown() -> None:
    for name, _ in VERBS:
        for option in COMMANDS[name].params:
            if option.param_type_name == "option" and not option.required and not option.is_flag:
                assert option.default is not None or isinstance(option.show_default, str), (name, option.name)
