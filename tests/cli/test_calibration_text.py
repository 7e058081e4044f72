"""The calibration text on the command line: several texts with shares, and the chat template."""

import json
import re
from pathlib import Path

import pytest

from tests.conftest import Line, byte_tokenizer, random_model, save

FEW = ("--recipe", "absmax", "--samples", "10", "--length", "32")


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.txt"
    first.write_text("".join(json.dumps({"text": f"alpha beta {i} "}) + "\n" for i in range(900)))
    second.write_text("river stone " * 300)
    return first, second


def sources(line: Line, *arguments: object) -> list[tuple[str, float, int]]:
    """The sources in the record of a run: name, share and number of samples."""
    status, out, err = line("compress", *arguments, *FEW, "--json", "--quiet")
    assert status == 0, err
    return [(own["data"], own["share"], own["samples"]) for own in json.loads(out)["calibration"]["sources"]]


def test_several_texts_have_their_shares_or_equal_ones(
    line: Line, llama_folder: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = texts
    given = (llama_folder, "-o", tmp_path / "o", "--data", first, "--share", 0.7, "--data", second, "--share", 0.3)
    assert sources(line, *given) == [("a.jsonl", 0.7, 7), ("b.txt", 0.3, 3)]
    equal = sources(line, llama_folder, "-o", tmp_path / "p", "--data", first, "--data", second)
    assert equal == [("a.jsonl", 0.5, 5), ("b.txt", 0.5, 5)]
    status, out, _ = line("inspect", tmp_path / "o")
    assert status == 0 and "a.jsonl (0.7), b.txt (0.3), 10 samples of 32 tokens" in out


def test_shares_that_do_not_fit_are_refused_with_the_flags(
    line: Line, llama_folder: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = texts
    for typed, said in (
        (("--data", first, "--share", 0.7, "--data", second), "--data is given 2 times and --share 1 times; give one share"),
        (("--share", 0.7), "--data is given 0 times and --share 1 times"),
        (("--data", first, "--share", 0.7, "--data", second, "--share", 0.2), "--data: the shares 0.7 + 0.2 add up to 0.9"),
        (("--data", first, "--share", 0.7), "--data: the shares 0.7 add up to 0.7, not to 1"),
        (("--data", first, "--share", 70, "--data", second, "--share", 30), "a.jsonl is 70; give a part of the whole"),
        (("--data", first, "--data", first), "is given twice; name each text once"),
        (("--data", first, "--data", f"{tmp_path}/./a.jsonl"), "hold the same text"),
        (
            ("--data", first, "--share", 0.01, "--data", second, "--share", 0.99),
            "(0.01) is less than one sample; give at least 100",
        ),
        (("--data", first, "--chat", "yes"), "--chat yes: the model's tokenizer has no chat template"),
        (("--data", "self", "--chat", "no"), "--chat no says how text is read, and with --data self the model writes it"),
    ):
        assert said in line.refused("compress", llama_folder, "-o", tmp_path / "o", *typed, *FEW)
        assert said in line.refused("plan", llama_folder, *typed, *FEW)
        assert not (tmp_path / "o").exists()


def test_a_plan_says_how_many_tokens_for_each_input_and_what_a_further_sample_takes(line: Line, llama_folder: Path) -> None:
    status, out, _ = line("plan", llama_folder, "--recipe", "gptq", "--samples", 11, "--length", 32, "--quiet")
    shown = " ".join(out.split())
    assert status == 0
    assert "352 tokens in 11 samples, if the text has that many: 4 for each of the 88 inputs of the widest layer" in shown
    assert re.search(
        r"mlp\.down_proj\), whose covariance needs 176: enough; each further sample takes (about [\d.]+|less than 0.1) s more",
        shown,
    )


def test_a_source_with_too_little_text_is_refused_with_the_flag_for_fewer_samples(
    line: Line, llama_folder: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "few.txt").write_text("few words " * 10)
    typed = ("--data", texts[0], "--data", tmp_path / "few.txt", *FEW)
    said = line.refused("compress", llama_folder, "-o", tmp_path / "o", *typed)
    assert "gives 3 samples of 32 tokens, and its share of 0.5 of 10 samples is 5" in said and "or at most 7 --samples" in said
    assert not (tmp_path / "o").exists()


def test_conversations_are_written_by_the_chat_template_or_joined(line: Line, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    folder = save(random_model("llama"), tmp_path / "m")
    tokenizer.save_pretrained(folder)
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "what is a river?"}, {"role": "assistant", "content": "water"}]
    chats.write_text(200 * (json.dumps({"messages": turns}) + "\n"))
    checksums = set()
    for chat, said in (("auto", "written as text by the tokenizer's chat template"), ("no", "joined as plain text")):
        out = tmp_path / chat
        status, printed, err = line("compress", folder, "-o", out, "--data", chats, "--chat", chat, *FEW, "--json")
        assert status == 0 and f"conversations were {said}" in " ".join(err.split())
        checksums.add(json.loads(printed)["calibration"]["sources"][0]["sha256"])
    assert len(checksums) == 2
