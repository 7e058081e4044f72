"""Documents and token windows."""

import json
import re
import shutil
import tracemalloc
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import slimlm
from slimlm.core.errors import DataError
from slimlm.data.documents import Source, pieces
from slimlm.data.files import PIECE, pieces_of
from slimlm.data.rows import Chat, Reading
from slimlm.data.stdlib import split_of, stdlib_documents
from slimlm.data.windows import chat_template_of, choose_windows, tokens_of, windows_of
from slimlm.evaluation.perplexity import perplexity
from slimlm.inference.generate import generate
from tests.conftest import ENDS, LLAMA_LIKE, byte_tokenizer, documents, random_model, save

TEXTS = ["first story", "second\nstory", "third"]


def written(folder: Path, kind: str) -> Path:
    path = folder / f"data.{kind}"
    if kind == "txt":
        path.write_text("\n<|endoftext|>\n".join(TEXTS) + "\n")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    elif kind == "json":
        path.write_text(json.dumps([{"text": t} for t in TEXTS], indent=1))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": TEXTS}), path)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "parquet"])
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
    (tmp_path / "bad.txt").write_bytes(b"fine\nca\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8 text: invalid start byte in line 2, byte 7 of"):
        list(documents(str(tmp_path / "bad.txt"), "evaluation"))
    (tmp_path / "cut.txt").write_bytes("cut".encode("utf-16")[:-1])
    with pytest.raises(DataError, match="not UTF-16 text"):
        list(documents(str(tmp_path / "cut.txt"), "evaluation"))
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a parquet file"):
        list(documents(str(tmp_path / "bad.parquet"), "evaluation"))


def test_each_document_begins_with_the_start_token_and_windows_cut_the_stream() -> None:
    tokenizer = byte_tokenizer()
    a, b = tokenizer("ab", add_special_tokens=False)["input_ids"]
    stream = tokens_of(tokenizer, ("ab", "", "ba"), "calibration")
    assert stream.tolist() == [tokenizer.bos_token_id, a, b, tokenizer.bos_token_id, b, a]
    assert windows_of(stream, 4, source="x").tolist() == [[tokenizer.bos_token_id, a, b, tokenizer.bos_token_id]]


@pytest.mark.parametrize("at", [PIECE - 2, PIECE + 3, 3 * PIECE + 1])
def test_bytes_that_are_no_text_are_found_wherever_they_are(tmp_path: Path, at: int) -> None:
    # Characters of two bytes, so that one lies across the end of what is read at once.
    before = ("\u00e4" * 49 + "\n").encode() * (at // 99 + 1)
    before = before[: at // 99 * 99] + b"x" * (at % 99)
    (tmp_path / "bad.txt").write_bytes(before + b"\xff")
    with pytest.raises(DataError, match=rf"in line {at // 99 + 1}, byte {at} of"):
        list(documents(str(tmp_path / "bad.txt"), "evaluation"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_byte_order_mark_says_how_a_file_is_read_and_is_no_text(tmp_path: Path, encoding: str, ending: str) -> None:
    path = tmp_path / f"data{ending}"
    content = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode(encoding)
    with pyarrow.output_stream(path, compression={".gz": "gzip", ".zst": "zstd"}.get(path.suffix)) as file:
        file.write(content)
    reading = Reading()
    assert list(documents(str(path), "calibration", reading)) == TEXTS
    told = [] if encoding == "utf-8-sig" else [f"{path} is read as {encoding.upper()}, by its byte order mark"]
    assert list(reading.notes("data")) == told


def test_a_compressed_file_that_is_damaged_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"a\.txt\.gz cannot be read"):
        list(documents(str(tmp_path / "a.txt.gz"), "calibration"))


@pytest.mark.parametrize("newlines", [0, 1, 3, PIECE + 7])
def test_a_long_document_is_read_in_pieces_that_add_up_to_it(tmp_path: Path, newlines: int) -> None:
    random = Random(0)
    lines = ["".join(random.choices("ab \n", k=random.randrange(300))) for _ in range(PIECE // 50)]
    text = "\n".join(["\n" * newlines, *lines[:3000], "\n" * newlines, *lines[3000:], "x" * (2 * PIECE), "\n" * newlines])
    (tmp_path / "a.txt").write_text(text)
    found = list(pieces(str(tmp_path / "a.txt"), "calibration", Reading()))
    assert found == list(pieces_of(text.strip("\n")))
    assert len(found) > 3 and [piece.begins for piece in found] == [True, *[False] * (len(found) - 1)]


def test_a_large_file_costs_the_memory_of_what_is_read_of_it(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("w") as file:
        for _ in range(60):
            file.write("one two three four\n" * 50_000)
    tracemalloc.start()
    first = next(pieces(str(tmp_path / "a.txt"), "calibration", Reading()))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(first.text) == PIECE and most < 16 * PIECE, "the file has 57 MB"


ROWS_WITHOUT_TEXT = [
    ({"text": None}, 'its "text" is null, not text'),
    ({"text": ["a"]}, 'its "text" is a list, not text'),
    ({"text": ""}, '"text" is empty'),
    (None, "it is null; expected a field"),
    (7, "it is a number; expected a field"),
    ({"title": "a", "url": "b"}, "it has the fields title, url; expected"),
    ({}, r"it has the fields \(none\)"),
    ({"messages": []}, 'its "messages" is empty'),
    ({"messages": "hello"}, 'its "messages" is text, not a list of messages'),
    ({"messages": [{"role": "user", "content": None}]}, ".* has the role 'user' and null as its content"),
    ({"messages": [7]}, 'a message of its "messages" is a number'),
]


@pytest.mark.parametrize(("row", "why"), ROWS_WITHOUT_TEXT)
def test_rows_without_text_are_skipped_and_counted_and_refused_where_there_are_no_others(
    tmp_path: Path, row: object, why: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one"}) + "\n\n" + 2 * (json.dumps(row) + "\n") + json.dumps("two") + "\n")
    reading = Reading()
    assert list(documents(str(path), "calibration", reading)) == ["one", "two"]
    (note,) = reading.notes("a.jsonl")
    assert re.search(rf"2 of 4 rows were skipped; the first, .*line 3: {why}", note)
    path.write_text(2 * (json.dumps(row) + "\n"))
    with pytest.raises(DataError, match=f"none of its 2 rows has text; the first, .*line 1: {why}"):
        list(documents(str(path), "calibration"))


def test_parquet_rows_without_text_are_skipped_too(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [None, "one", "", "two"]}), path)
    reading = Reading()
    assert list(documents(str(path), "calibration", reading)) == ["one", "two"]
    assert (reading.rows, reading.skipped) == (4, 2) and 'row 0: its "text" is null' in reading.first_skipped
    pyarrow.parquet.write_table(pyarrow.table({"text": [None, "one"], "content": ["two", None]}), path)
    assert list(documents(str(path), "calibration")) == ["two", "one"]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["one"], "id": [2]}), path)
    with pytest.raises(DataError, match="has the columns prompt, id; expected"):
        list(documents(str(path), "calibration"))


@pytest.mark.parametrize("piece", [1, 2, 7, 50, PIECE])
def test_a_list_of_rows_is_read_in_pieces_of_any_size(tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimlm.data.files.PIECE", piece)
    path = tmp_path / "a.json"
    texts = ['one \u00e4 \U0001f600 \\ " ]', "two, [three]", "x" * 300]
    rows: list[Any] = [{"text": texts[0]}, 123456789012, None, texts[1], {"text": texts[2]}, True, -1.5e100]
    for indent, escaped in ((None, True), (2, False)):
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=escaped) + "\n")
        reading = Reading()
        assert "".join(documents(str(path), "calibration", reading)) == "".join(texts)
        assert (reading.rows, reading.skipped) == (7, 4) and "row 1: it is a number" in reading.first_skipped


@pytest.mark.parametrize("piece", [1, 5, PIECE])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}', "is no JSON list of rows; a file with a row in each line ends in .jsonl"),
        ("", "is no JSON list of rows"),
        ('[{"text": "a"} {"text": "b"}]', "neither a comma nor the end of the list follows row 0"),
        ('[{"text": "a"}', "neither a comma nor the end of the list follows row 0"),
        ('["a", "b', "row 1 is not JSON: Unterminated string"),
        ('["a", ', "row 1 is not JSON"),
        ('["a",]', "row 1 is not JSON"),
        ('["a", {"text": b"}, "c"]', "row 1 is not JSON"),
        ("[" * 100_000, "row 0 is not JSON"),
    ],
)
def test_what_is_no_list_of_rows_is_refused(
    tmp_path: Path, content: str, said: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimlm.data.files.PIECE", piece)
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=said):
        list(documents(str(tmp_path / "a.json"), "calibration"))


def test_json_files_are_left_out_of_folders_and_an_empty_list_has_no_documents(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    assert list(documents(str(tmp_path / "config.json"), "calibration")) == []
    (tmp_path / "a.txt").write_text("one")
    assert list(documents(str(tmp_path), "calibration")) == ["one"]


TURNS = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]
SHAREGPT = [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "ba"}]
CONVERSATIONS = [
    {"messages": TURNS},
    {"messages": [{"role": "user", "content": [{"text": "a"}, {"text": "b"}]}, TURNS[1] | {"content": [{"text": "ba"}]}]},
    {"conversations": SHAREGPT},
    {"prompt": "ab", "completion": "ba"},
    {"prompt": "ab", "response": "ba"},
    {"instruction": "ab", "input": "", "output": "ba"},
    {"question": "ab", "answer": "ba"},
    {"prompt": TURNS[:1], "completion": TURNS[1:]},
    {"text": "of another template", "messages": TURNS},
]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"


def rows_in(folder: Path, kind: str, rows: list[Any]) -> Path:
    """A file of these rows."""
    path = folder / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def chat_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def read_as(tokenizer: PreTrainedTokenizerFast, source: Source, chat: Chat, told: list[str] | None = None) -> str:
    """The text that a source is read as, a start token before each document."""
    reading = Reading(chat_template_of(tokenizer), chat)
    tokens = tokens_of(tokenizer, source, "calibration", notify=[].append if told is None else told.append, reading=reading)
    return str(tokenizer.decode(tokens)).replace(str(tokenizer.bos_token), "^")


@pytest.mark.parametrize("row", CONVERSATIONS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_conversations_are_written_by_the_chat_template_with_one_start_token(
    tmp_path: Path, row: dict[str, Any], kind: str
) -> None:
    path, told = rows_in(tmp_path, kind, [row, row]), []
    if "text" not in row:
        with pytest.raises(
            DataError, match=r"(line 1|row 0) is a conversation, and the model's tokenizer has no chat template"
        ):
            tokens_of(byte_tokenizer(), str(path), "calibration")
    assert read_as(chat_tokenizer(), str(path), "auto", told) == "^u:ab\na:ba\n^u:ab\na:ba\n"
    assert told == [f"{path}: 2 conversations were written as text by the tokenizer's chat template"]
    assert read_as(chat_tokenizer(), str(path), "yes") == "^u:ab\na:ba\n^u:ab\na:ba\n"
    plain = row.get("text", "ab\n\nba")
    for tokenizer in (byte_tokenizer(), chat_tokenizer()):
        assert read_as(tokenizer, str(path), "no") == f"^{plain}^{plain}"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_system_prompt_and_what_an_instruction_is_about_stand_beside_a_conversation(tmp_path: Path, kind: str) -> None:
    rows: list[dict[str, Any]] = [
        {"system": "s", "conversations": SHAREGPT, "instruction": None, "input": None, "output": None},
        {"system": "s", "conversations": [{"from": "system", "value": "t"}, *SHAREGPT], "instruction": None, "output": None},
        {"system": None, "conversations": None, "instruction": "ab", "input": "i", "output": "ba"},
    ]
    found = read_as(chat_tokenizer(), str(rows_in(tmp_path, kind, rows)), "auto")
    assert found == "^s:s\nu:ab\na:ba\n^s:t\nu:ab\na:ba\n^u:ab\n\ni\na:ba\n"


def test_text_is_a_message_of_the_user_only_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo")
    rows = rows_in(tmp_path, "jsonl", [{"text": "one"}, "two"])
    sources: list[Source] = [str(tmp_path / "a.txt"), str(rows), ("one", "two")]
    for source in sources:
        told: list[str] = []
        assert read_as(chat_tokenizer(), source, "auto", told) == read_as(chat_tokenizer(), source, "no") == "^one^two"
        assert told == []
        assert read_as(chat_tokenizer(), source, "yes", told) == "^u:one\n^u:two\n"
        assert [note.partition(": ")[2] for note in told] == [
            "2 texts, each as a message of the user, were written as text by the tokenizer's chat template"
        ]


def test_a_long_document_is_a_message_for_each_piece_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * (PIECE + 5))
    reading = Reading(chat_template_of(chat_tokenizer("<{{ messages[0].content }}>")), "yes")
    found = list(documents(str(tmp_path / "a.txt"), "calibration", reading))
    assert [len(text) for text in found] == [PIECE + 2, 7] and all(text[0] == "<" and text[-1] == ">" for text in found)


def test_a_chat_template_that_is_asked_for_must_be_there() -> None:
    with pytest.raises(DataError, match='`chat="yes"`: the model\'s tokenizer has no chat template'):
        Reading(None, "yes")


@pytest.mark.parametrize("chat", ["auto", "yes", "no"])
def test_conversations_without_a_word_are_skipped(tmp_path: Path, chat: Chat) -> None:
    path, told = rows_in(tmp_path, "jsonl", [{"messages": []}, {"messages": [TURNS[0] | {"content": ""}]}, {"text": "x"}]), []
    read_as(chat_tokenizer(), str(path), chat, told)
    assert any(f"{2 if chat == 'no' else 1} of 3 rows were skipped" in note for note in told)


@pytest.mark.parametrize("chat", ["auto", "yes"])
def test_a_conversation_that_the_template_does_not_accept_is_skipped(tmp_path: Path, chat: Chat) -> None:
    tokenizer = chat_tokenizer("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x")
    told: list[str] = []
    path = rows_in(tmp_path, "jsonl", [{"messages": [{"role": "system", "content": "a"}]}, {"messages": TURNS}])
    assert read_as(tokenizer, str(path), chat, told) == "^x"
    assert any("1 of 2 rows were skipped" in note and "no system role" in note for note in told)


def test_text_that_the_template_does_not_accept_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    tokenizer = chat_tokenizer("{{ raise_exception('no user role') }}")
    with pytest.raises(DataError, match=r"the chat template does not accept the conversation .*no user role"):
        read_as(tokenizer, str(tmp_path / "a.txt"), "yes")


def test_text_that_begins_with_the_start_token_gets_no_second_one() -> None:
    tokenizer = byte_tokenizer()
    plain = tokens_of(tokenizer, ("ab", "ba"), "calibration")
    assert torch.equal(tokens_of(tokenizer, (f"{tokenizer.bos_token}ab", "ba"), "calibration"), plain)


def test_texts_may_be_given_themselves(tmp_path: Path) -> None:
    folder = save(random_model("llama"), tmp_path / "m")
    texts = ["some text that is long enough " * 20, "and another one of them " * 20]
    result = slimlm.compress(folder, tmp_path / "o", recipe="absmax", data=texts, samples=4, length=32)
    assert result.record.calibration["data"] == "2 given texts"


def test_files_about_a_data_set_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / ".cache").mkdir(parents=True)
    (folder / "inner").mkdir()
    for name in ("README.md", "inner/LICENSE.txt", ".cache/a.txt", ".hidden.txt"):
        (folder / name).write_text("no data")
    with pytest.raises(DataError, match=r"left out README\.md, inner/LICENSE\.txt: about the data set"):
        documents(str(folder), "calibration")
    (folder / "a.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    (folder / "inner" / "b.md").write_text("two")
    pyarrow.parquet.write_table(pyarrow.table({"content": ["three"]}), folder / "inner" / "c.parquet")
    reading = Reading()
    assert list(documents(str(folder), "calibration", reading)) == ["one", "two", "three"]
    assert list(reading.notes("x")) == [
        f"{folder}: left out README.md, inner/LICENSE.txt: about the data set, not part of its text"
    ]
    assert list(documents(str(folder / "README.md"), "calibration")) == ["no data"], "a file that is named itself is read"


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimlm.data.documents.unreachable", lambda: "https://huggingface.co does not answer: no network")
    with pytest.raises(DataError, match="does not answer: no network; with HF_HUB_OFFLINE=1 its cache is used"):
        list(documents("allenai/c4:en", "calibration"))


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
