"""`slimlm generate` without a prompt: standard input, or a chat."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Line

TEMPLATE = "{{ bos_token or '' }}{% for m in messages %}{{ m.content }} {% endfor %}"


@pytest.fixture
def chatty(packed: Path, tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer has a chat template."""
    folder = Path(shutil.copytree(packed, tmp_path / "chatty"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def given(monkeypatch: pytest.MonkeyPatch, content: bytes, errors: str = "strict") -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", errors=errors))


def test_a_prompt_comes_from_standard_input_without_its_last_line_break(
    line: Line, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = line("generate", packed, "--prompt", "one two", "--max-new-tokens", 4, "--json")
    given(monkeypatch, b"one two\n")
    status, piped, _ = line("generate", packed, "--max-new-tokens", 4, "--json")
    same = ("prompt", "text", "prompt_tokens")
    assert status == 0 and [json.loads(piped)[key] for key in same] == [json.loads(out)[key] for key in same]


@pytest.mark.parametrize(("content", "said"), [(b"", "standard input is empty"), (b"a\xff", "no utf-8 text")])
def test_standard_input_that_holds_no_text_is_refused(
    line: Line, packed: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, said: str
) -> None:
    given(monkeypatch, content)
    assert said in line.refused("generate", packed, "--max-new-tokens", 2)


def test_the_user_of_a_terminal_is_told_that_a_text_is_waited_for(
    line: Line, chatty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, b"one two\n")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    status, out, err = line("generate", chatty, "--max-new-tokens", 2, "--json")
    assert status == 0 and json.loads(out)["prompt"] == "one two"
    assert "type the text to continue" in err


@pytest.mark.parametrize("flag", ["--chat", "--json"])
def test_bytes_that_are_no_text_are_refused_where_standard_input_would_pass_them_on(
    line: Line, chatty: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    # As Python opens standard input in the locales C and C.UTF-8.
    given(monkeypatch, b"a\xff\n", errors="surrogateescape")
    said = line.refused("generate", chatty, "--max-new-tokens", 2, flag)
    assert "standard input is no utf-8 text" in said


# Slow: a process of its own that imports torch and transformers; the test above reads the same way.
@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--chat", "--json"])
def test_bytes_that_are_no_text_are_refused_where_python_would_pass_them_on(chatty: Path, flag: str) -> None:
    command = [sys.executable, "-m", "slimlm", "generate", str(chatty), "--max-new-tokens", "2", flag]
    done = subprocess.run(command, input=b"a\xff\n", capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert done.returncode == 2 and done.stdout == b""
    assert b"standard input is no utf-8 text" in done.stderr and b"Traceback" not in done.stderr


def test_a_chat_whose_conversation_fills_the_context_ends_and_says_why(
    line: Line, chatty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, b"one\n" + b"two " * 70 + b"\nthree\n")
    status, out, err = line("generate", chatty, "--chat", "--max-new-tokens", 2)
    assert status == 0 and out.count("\n") == 1
    assert "note: the chat ends here" in err and "the model's context holds 64" in " ".join(err.split())


def test_each_answer_of_a_chat_is_given_the_conversation_before_it(
    line: Line, chatty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, b"one\n\ntwo\n")
    status, out, _ = line("generate", chatty, "--chat", "--max-new-tokens", 3)
    first, second = out.split("\n")[:2]
    _, alone, _ = line("generate", chatty, "--prompt", "one ", "--max-new-tokens", 3, "--json")
    assert status == 0 and json.loads(alone)["text"] == first
    _, both, _ = line("generate", chatty, "--prompt", f"one {first} two ", "--max-new-tokens", 3, "--json")
    assert json.loads(both)["text"] == second


def test_a_chat_without_a_template_is_refused(line: Line, packed: Path) -> None:
    assert "no chat template" in line.refused("generate", packed, "--chat")
    assert "give one of them" in line.refused("generate", packed, "--chat", "--json")


def test_what_a_template_refuses_is_said(line: Line, chatty: Path) -> None:
    (chatty / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}", encoding="utf-8")
    _, _, err = line("generate", chatty, "--chat", "--prompt", "one")
    assert "slimlm: the tokenizer's chat template refuses the conversation: no such role" in err
