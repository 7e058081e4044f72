"""Documents and token windows."""

import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import slimlm
from slimlm.core.errors import DataError
from slimlm.data.documents import documents
from slimlm.data.stdlib import split_of, stdlib_documents
from slimlm.data.windows import choose_windows, token_stream, windows_of
from slimlm.evaluation.perplexity import perplexity
from slimlm.inference.generate import generate
from tests.conftest import ENDS, LLAMA_LIKE, byte_tokenizer, random_model, save

TEXTS = ["first story", "second\nstory", "third"]


def written(folder: Path, kind: str) -> Path:
    path = folder / f"data.{kind}"
    if kind == "txt":
        path.write_text("\n<|endoftext|>\n".join(TEXTS) + "\n")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": TEXTS}), path)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    assert list(documents(str(written(tmp_path, kind)), "calibration")) == TEXTS


def test_a_folder_gives_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.bin").write_bytes(b"\0")
    assert list(documents(str(tmp_path), "evaluation")) == ["one", "two"]


def test_a_folder_s_text_is_the_same_after_a_run_that_writes_into_it(tmp_path: Path, text_file: Path) -> None:
    folder = tmp_path / "data"
    (folder / "more.partially").mkdir(parents=True)
    (folder / "a.txt").write_text(text_file.read_text())
    (folder / "more.partially" / "b.txt").write_text("two")
    (folder / "web.log.jsonl").write_text(json.dumps({"text": "three"}) + "\n")
    expected = list(documents(str(folder), "calibration"))
    assert expected[1:] == ["two", "three"]
    model = save(random_model("llama"), tmp_path / "m")
    slimlm.compress(model, folder / "out", recipe="absmax", data=str(folder), samples=4, length=32)
    assert (folder / "out.log.jsonl").is_file()
    for kept in ("other.partial", ".other.partial-1a2b", "out"):
        (folder / kept).mkdir(exist_ok=True)
        (folder / kept / "README.md").write_text("no text to calibrate on")
    (folder / "out.partial" / "original").mkdir(parents=True)
    (folder / "out.partial" / "original" / "x.txt").write_text("neither")
    assert list(documents(str(folder), "calibration")) == expected
    with pytest.raises(DataError, match="what slimlm wrote there does not count"):
        shutil.rmtree(folder / "more.partially")
        (folder / "a.txt").unlink()
        (folder / "web.log.jsonl").unlink()
        documents(str(folder), "calibration")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        list(documents(str(tmp_path / "bad.txt"), "evaluation"))
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a parquet file"):
        list(documents(str(tmp_path / "bad.parquet"), "evaluation"))


def test_each_document_begins_with_the_start_token_and_windows_cut_the_stream() -> None:
    tokenizer = byte_tokenizer()
    a, b = tokenizer("ab", add_special_tokens=False)["input_ids"]
    stream = token_stream(tokenizer, ["ab", "", "ba"])
    assert stream.tolist() == [tokenizer.bos_token_id, a, b, tokenizer.bos_token_id, b, a]
    assert windows_of(stream, 4, source="x").tolist() == [[tokenizer.bos_token_id, a, b, tokenizer.bos_token_id]]


def test_windows_are_drawn_without_repetition_and_by_seed() -> None:
    rows = torch.arange(40).view(20, 2)
    one, same, other = choose_windows(rows, 8, 0), choose_windows(rows, 8, 0), choose_windows(rows, 8, 1)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert len({tuple(r) for r in one.tolist()}) == 8
    assert len(choose_windows(rows, 100, 0)) == 20


def test_the_splits_of_the_standard_library_share_no_file_and_all_hold_text() -> None:
    calibration, evaluation = set(stdlib_documents("calibration")), set(stdlib_documents("evaluation"))
    assert calibration
    assert evaluation
    assert not calibration & evaluation
    # Fixed, so that the bundled model stays untrained on what it is measured on.
    assert [split_of(p) for p in ("argparse.py", "ast.py", "json/decoder.py")] == ["train", "train", "train"]


def test_a_model_can_be_calibrated_on_its_own_text(tmp_path: Path) -> None:
    folder = save(random_model("qwen3"), tmp_path / "m")
    one = slimlm.compress(folder, tmp_path / "one", recipe="slim", data="self", samples=6, length=24)
    assert one.record.calibration["tokens"] == 6 * 24
    two = slimlm.compress(folder, tmp_path / "two", recipe="slim", data="self", samples=6, length=24)
    assert one.record.layers == two.record.layers


def test_tokens_that_the_model_does_not_have_are_refused_before_anything_runs(tmp_path: Path) -> None:
    config = LlamaConfig(**{**LLAMA_LIKE, **ENDS, "vocab_size": 100})
    model = LlamaForCausalLM(config)
    folder = save(model, tmp_path / "m")
    text = tmp_path / "text.txt"
    text.write_text("\u00ff" + "a" * 200)
    token = max(byte_tokenizer()("\u00ff", add_special_tokens=False)["input_ids"])
    asked = rf"the tokenizer gives token {token}( \(.*\))?; the embedding of LlamaForCausalLM has 100 rows"
    with pytest.raises(DataError, match=asked):
        slimlm.compress(folder, tmp_path / "o", recipe="absmax", data=str(text), samples=4, length=32)
    tokens = torch.tensor([[1, token]])
    with pytest.raises(DataError, match=asked):
        perplexity(model, tokens)
    with pytest.raises(DataError, match=asked):
        generate(model, tokens, max_new_tokens=1)
    assert not (tmp_path / "o").exists()
