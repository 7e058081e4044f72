"""Files of tasks become items, and lm_eval scores them by the log-likelihoods of a model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimlm.core.errors import DataError
from slimlm.evaluation import tasks
from slimlm.evaluation.tasks import Item, run_tasks, tasks_of

pytest.importorskip("lm_eval", reason="tasks are run by lm_eval, the extra `eval`")

ASKED = {"query": "Question: what is sand?", "choices": ["a stone", "a bird"], "gold": 0}
TWO_CONTEXTS = {"context_options": ["Ann is tall so Ann", "Ann is tall so Bob"], "continuation": "sees far.", "gold": 1}


def written(path: Path, *rows: Any) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def request(idx: int, continuation: str) -> dict[str, Any]:
    return {"doc_id": 7, "idx": idx, "label": 1, "request": {"context": "one two", "continuation": continuation}}


def test_the_three_forms_become_items(tmp_path: Path) -> None:
    first, second, third = tasks_of(
        [
            written(tmp_path / "a.jsonl", ASKED),
            written(tmp_path / "b.jsonl", TWO_CONTEXTS),
            written(tmp_path / "c.jsonl", request(0, " three"), request(1, " four")),
        ]
    )
    assert first.items == (Item(("Question: what is sand?\nAnswer:",), ("a stone", "a bird"), 0),)
    assert second.items == (Item(("Ann is tall so Ann", "Ann is tall so Bob"), ("sees far.",), 1),)
    assert third.items == (Item(("one two",), ("three", "four"), 1),)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"query": "q", "choices": ["one"], "gold": 0}, "at least two"),
        ({"query": "q", "choices": ["one", "two"], "gold": 2}, "the right choice is 2, and there are 2"),
        ({"question": "q"}, "line 1 has the fields question"),
    ],
)
def test_lines_that_are_no_items_are_refused(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        tasks_of([written(tmp_path / "t.jsonl", row)])


def test_an_unknown_task_and_a_missing_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda name: None if name == "lm_eval" else object())
    with pytest.raises(Exception, match=r"lm_eval is not installed: pip install 'slimlm\[eval\]'"):
        tasks_of(["piqa"])


def test_scores_are_those_of_the_log_likelihoods(llama_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama_folder), AutoTokenizer.from_pretrained(llama_folder)
    choices = ["cat sat", "dog ran", "xyz"]
    rows = [{"query": f"the {word}", "choices": choices, "gold": i % 3} for i, word in enumerate("abcdef")]

    def likelihood(query: str, choice: str) -> float:
        ids = tokenizer(f"{query} {choice}", return_tensors="pt")["input_ids"]
        start = len(tokenizer(query)["input_ids"])
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(dim=-1)
        return float(logs[start - 1 : -1].gather(1, ids[0, start:, None]).sum())

    right = [max(range(3), key=lambda i, row=row: likelihood(str(row["query"]), choices[i])) == row["gold"] for row in rows]
    found = run_tasks(model, tokenizer, tasks_of([written(tmp_path / "t.jsonl", *rows)]), None)
    by_metric = {score.metric: score for score in found}
    assert by_metric["acc"].score.value == pytest.approx(sum(right) / len(rows))
    assert by_metric["acc"].items == len(rows) and {"acc", "acc_norm"} <= by_metric.keys()


def test_a_choice_longer_than_the_context_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama_folder), AutoTokenizer.from_pretrained(llama_folder)
    row = {"query": "q", "choices": ["long " * 5000, "short"], "gold": 0}
    with pytest.raises(DataError, match="item 1 of the task 't' has a choice of"):
        run_tasks(model, tokenizer, tasks_of([written(tmp_path / "t.jsonl", row)]), None)
