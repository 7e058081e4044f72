"""Accuracy on tasks, by lm_eval (EleutherAI's evaluation harness): those that it knows by name, and .jsonl files.

lm_eval renders prompts, asks the model for log-likelihoods, and computes accuracies and standard errors; a file only becomes
a task of its kind `multiple_choice`. An item of a file is one line of one of these forms (.jsonl, or compressed, .jsonl.gz):

    {"query": ..., "choices": [...], "gold": 0}                      a context and several continuations
    {"context_options": [...], "continuation": ..., "gold": 0}       several contexts and one continuation
    {"doc_id": ..., "idx": ..., "label": 0, "request": {"context": ..., "continuation": ...}}
                                                                     one continuation of one context, a line for each choice

Continuations are put after a space. A query that begins with "Question:" and has no "Answer:" at its end is given one, on a
line of its own, as llm-foundry does with files of the first form and lm_eval with the same tasks by name.
"""

import gzip
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimlm.core.errors import DataError, SlimlmError, first_line
from slimlm.models.structure import context_length
from slimlm.record import Measured

_ENDINGS = (".jsonl", ".jsonl.gz")
_AT_ONCE = 8
"""Sequences that the model is run on at once."""


@dataclass(frozen=True)
class Item:
    """One question: either one context and several continuations, or several contexts and one continuation."""

    contexts: tuple[str, ...]
    """The contexts."""
    continuations: tuple[str, ...]
    """The continuations."""
    gold: int
    """The number of the right context or continuation."""


@dataclass(frozen=True)
class Task:
    """A task: one of lm_eval's, or the items of a file."""

    name: str
    """Its name."""
    items: tuple[Item, ...] = ()
    """The items of a file; none: lm_eval has the task."""


@dataclass(frozen=True)
class TaskScore:
    """A model's score on a task by one metric."""

    task: str
    """The name of the task."""
    metric: str
    """lm_eval's name of the metric: acc; acc_norm is of log-likelihoods divided by the lengths of the choices."""
    items: int
    """The number of items."""
    score: Measured
    """The score, and the standard error over items that lm_eval gives."""


def tasks_of(names: Sequence[str]) -> tuple[Task, ...]:
    """Tasks by name or file; names may be separated by commas.

    Raises:
        SlimlmError: lm_eval is not installed.
        DataError: It has no such task, or a file cannot be read.
    """
    wanted = [part.strip() for name in names for part in name.split(",") if part.strip()]
    if not wanted:
        return ()
    if (missing := _missing()) is not None:
        raise SlimlmError(f"`tasks` are run by lm_eval, and {missing} is not installed: pip install 'slimlm[eval]'")
    tasks = tuple(Task(_name_of(Path(each)), _read(Path(each))) if each.endswith(_ENDINGS) else Task(each) for each in wanted)
    if unknown := _unknown([task.name for task in tasks if not task.items]):
        raise DataError(f"lm_eval has no task {unknown[0]!r}; name one of its tasks, or a file: .jsonl or .jsonl.gz")
    if twice := sorted({task.name for task in tasks if [other.name for other in tasks].count(task.name) > 1}):
        raise DataError(f"the task {twice[0]!r} is named twice")
    return tasks


def _missing() -> str | None:
    """The first package that is missing of those that lm_eval needs to run a model."""
    return next((name for name in ("lm_eval", "accelerate", "peft") if find_spec(name) is None), None)


def _unknown(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    return [name for name in names if name not in known]


def _name_of(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def _read(path: Path) -> tuple[Item, ...]:
    """The items of a file.

    Raises:
        DataError: It cannot be read, or a line is no item.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = raw.decode("utf-8").split("\n")
        rows = [(number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]
    except (OSError, EOFError, ValueError) as error:  # ValueError: no JSON, or no UTF-8
        raise DataError(f"{path} cannot be read as a file of tasks: {first_line(error)}") from error
    if not rows:
        raise DataError(f"{path} holds no items")
    try:
        items = tuple(_of_requests(rows) if _is_request(rows[0][1]) else (_item(number, row) for number, row in rows))
    except _NoItemError as error:
        raise DataError(f"{path}, {error}") from error
    if len({len(item.contexts) > 1 for item in items}) > 1:
        raise DataError(f"{path} mixes items of several contexts with items of several continuations; give them in two files")
    return items


class _NoItemError(Exception):
    """A line that is no item; the message says which, and why."""


def _is_request(row: object) -> bool:
    return isinstance(row, dict) and isinstance(row.get("request"), dict)


def _item(number: int, row: object) -> Item:
    """The item of a line of one of the first two forms."""
    if isinstance(row, dict) and {"query", "choices", "gold"} <= row.keys():
        return _checked(number, (_asked(row["query"]),), row["choices"], row["gold"])
    if isinstance(row, dict) and {"context_options", "continuation", "gold"} <= row.keys():
        return _checked(number, row["context_options"], (row["continuation"],), row["gold"])
    fields = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
    raise _NoItemError(
        f"line {number} has the fields {fields}; expected query, choices and gold, or context_options, continuation and gold, "
        "or request, label, doc_id and idx"
    )


def _asked(query: object) -> object:
    """A query as the model is given it."""
    if not isinstance(query, str):
        return query
    query = query.rstrip()
    return f"{query}\nAnswer:" if query.startswith("Question:") and not query.endswith("Answer:") else query


def _of_requests(rows: Iterable[tuple[int, Any]]) -> Iterator[Item]:
    """The items of lines of the third form; those of an item follow one another."""
    own: list[tuple[int, dict[str, Any]]] = []
    for number, row in rows:
        if not _is_request(row) or not {"doc_id", "idx", "label"} <= row.keys():
            raise _NoItemError(f"line {number} lacks one of request, label, doc_id and idx, which the first line has")
        if own and row["doc_id"] != own[0][1]["doc_id"]:
            yield _joined(own)
            own = []
        own.append((number, row))
    yield _joined(own)


def _joined(rows: Sequence[tuple[int, Mapping[str, Any]]]) -> Item:
    """The item of the lines of all its choices."""
    number = rows[0][0]
    if [row["idx"] for _, row in rows] != list(range(len(rows))):
        raise _NoItemError(f"line {number}: the choices of the item are not numbered 0, 1, 2 and so on")
    requests = [row["request"] for _, row in rows]
    contexts = list(dict.fromkeys(request.get("context") for request in requests))
    continuations = list(dict.fromkeys(request.get("continuation") for request in requests))
    if len(contexts) == len(rows) > 1 == len(continuations):
        return _checked(number, contexts, continuations, rows[0][1]["label"])
    if len(contexts) > 1:
        raise _NoItemError(f"line {number}: both contexts and continuations of the item differ")
    return _checked(number, contexts, [request.get("continuation") for request in requests], rows[0][1]["label"])


def _checked(number: int, contexts: object, continuations: object, gold: object) -> Item:
    """An item; a space at the beginning of a continuation is left out, because one is put there."""
    lists = [_texts(contexts), _texts(continuations)]
    if not all(lists) or max(map(len, lists)) < 2:
        raise _NoItemError(f"line {number}: contexts and choices have to be text, and at least two of one of them")
    choices = max(map(len, lists))
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < choices:
        raise _NoItemError(f"line {number}: the right choice is {gold!r}, and there are {choices}, counted from 0")
    return Item(tuple(lists[0]), tuple(text.removeprefix(" ") for text in lists[1]), gold)


def _texts(given: object) -> list[str]:
    """The texts of a list; none where it is no list, or holds anything else."""
    texts = [text for text in given if isinstance(text, str)] if isinstance(given, list | tuple) else []
    return texts if isinstance(given, list | tuple) and len(texts) == len(given) else []


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], limit: int | None
) -> tuple[TaskScore, ...]:
    """The scores of a model on tasks.

    Args:
        model: A model in memory.
        tokenizer: Its tokenizer.
        tasks: The tasks.
        limit: Items of each task, from its beginning; None: all.

    Raises:
        DataError: The data of a task of lm_eval's cannot be fetched, or a choice of a file is longer than the model's context.
    """
    _refuse_long(model, tokenizer, tasks)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    asked = [task.name if not task.items else _config_of(task) for task in tasks]
    with _errors_alone():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_AT_ONCE)
        try:
            found = simple_evaluate(wrapped, tasks=asked, limit=limit, log_samples=False, verbosity="ERROR")
        except (OSError, ValueError) as error:
            # What `datasets` raises where the hub does not answer.
            raise DataError(
                f"lm_eval cannot run {', '.join(task.name for task in tasks)} ({first_line(error)}); tasks by name are fetched "
                "from the hub, and without a network files of tasks can be given"
            ) from error
    assert found is not None, "lm_eval gives results to the only process"
    return tuple(_scores_of(found["results"], found["n-samples"]))


def _refuse_long(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]) -> None:
    """Raise DataError where a continuation has more tokens than the model's context: its likelihood cannot be computed."""
    context = context_length(model)
    for task in tasks:
        for number, item in enumerate(task.items, 1):
            longest = max((len(tokenizer(f" {text}")["input_ids"]) for text in item.continuations), default=0)
            if context is not None and longest > context:
                raise DataError(
                    f"item {number} of the task {task.name!r} has a choice of {longest} tokens, and the context of "
                    f"{type(model).__name__} is {context}; leave the item out, or take a model of a longer context"
                )


def _scores_of(results: Mapping[str, Mapping[str, Any]], counts: Mapping[str, Mapping[str, int]]) -> Iterator[TaskScore]:
    """The scores in what lm_eval gives: by task, values by "metric,filter", each with one by "metric_stderr,filter"."""
    for name, values in results.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            standard_error = float(error) if isinstance(error, int | float) else None
            items = counts[name]["effective"] if name in counts else 0
            yield TaskScore(name, metric, items, Measured(float(value), standard_error))


def _config_of(task: Task) -> dict[str, Any]:
    """The configuration of the items of a file as a task of lm_eval's."""
    import datasets

    several_contexts = len(task.items[0].contexts) > 1
    rows = [{"contexts": list(i.contexts), "continuations": list(i.continuations), "gold": i.gold} for i in task.items]

    def read(**_: object) -> dict[str, datasets.Dataset]:
        return {"test": datasets.Dataset.from_list(rows)}

    # Of several contexts lm_eval takes the number of the right one as the text, and the continuation as the target.
    text, target, choices = ("gold", "continuations", "contexts") if several_contexts else ("contexts", "gold", "continuations")
    metrics = ("acc",) if several_contexts else ("acc", "acc_norm")
    return {
        "task": task.name,
        "custom_dataset": read,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": lambda row: row[text] if several_contexts else row[text][0],
        "doc_to_target": lambda row: row[target][0] if several_contexts else row[target],
        "doc_to_choice": lambda row: row[choices],
        "target_delimiter": " ",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
        "metadata": {"version": 1.0},
    }


@contextmanager
def _errors_alone() -> Iterator[None]:
    """Within this context lm_eval logs errors only."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
