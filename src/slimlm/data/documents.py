"""Documents from a source given by name.

file.txt            one document, or several separated by lines that hold only <|endoftext|>
file.jsonl          one document a line, in the field "text" (or "content")
file.parquet        one document a row, in the column "text" (or "content")
a folder            all such files in it, in order of name, except for what slimlm wrote there: checkpoints, runs and their logs
stdlib              the source of Python's standard library: its calibration or its evaluation part
anything else       a hub data set, NAME or NAME:CONFIG (split: train for calibration, test for evaluation)
"""

import json
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from slimlm.core.errors import DataError
from slimlm.data.stdlib import stdlib_documents

Purpose = Literal["calibration", "evaluation"]

DEFAULT_DATA = "allenai/c4:en"
"""The default of calibration, as in the papers; it is downloaded from the hub."""

SEPARATOR = "<|endoftext|>"
_READABLE = (".txt", ".text", ".raw", ".md", ".jsonl", ".parquet")
_FIELDS = ("text", "content")
_LOG, _LOG_BEGINS = ".log.jsonl", b'{"event": "run"'
"""The end of the name of a run's log (slimlm.run.log), and the start of the file."""
_RECORD = "slimlm.json"
"""The file that makes a folder a checkpoint (slimlm.storage.checkpoint)."""


def documents(source: str, purpose: Purpose) -> Iterator[str]:
    """The documents of a source, read lazily and in order.

    Args:
        source: one of those in this module's docstring.
        purpose: which part to read of a source that has one for calibration and one for evaluation.

    Raises:
        DataError: there is no text at the source, or it cannot be read; for some sources this is raised only when the
            documents are read.
    """
    if source == "self":
        raise DataError(
            "'self' is the text a model writes; it serves calibration, not evaluation. Name another text to measure on"
        )
    if source == "stdlib":
        return stdlib_documents(purpose)
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in _READABLE and not _own_output(p, path))
        if not files:
            raise DataError(
                f"{source} holds no file that ends in {', '.join(_READABLE)} (what slimlm wrote there does not count)"
            )
        return (text for file in files for text in _of_file(file))
    if path.is_file():
        if path.suffix not in _READABLE:
            raise DataError(f"{source}: text is read from files that end in {', '.join(_READABLE)}")
        return _of_file(path)
    if path.suffix in _READABLE or source.startswith((".", "/", "~")):
        raise DataError(f"no text at {source}")
    return _of_hub(source, purpose)


def _own_output(file: Path, folder: Path) -> bool:
    """Whether slimlm wrote a file below this folder: a run's log, or a file in a run's folder or in a checkpoint."""
    if file.name.endswith(_LOG) and file.is_file():
        with file.open("rb") as log:
            if log.read(len(_LOG_BEGINS)) == _LOG_BEGINS:
                return True
    between = file.parents[: file.parents.index(folder)]
    return any(".partial" in (p.suffix, p.suffix.partition("-")[0]) or (p / _RECORD).is_file() for p in between)


def _of_file(path: Path) -> Iterator[str]:
    try:
        if path.suffix == ".jsonl":
            yield from _of_jsonl(path)
        elif path.suffix == ".parquet":
            yield from _of_parquet(path)
        else:
            yield from _of_text(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _of_text(path: Path) -> Iterator[str]:
    lines: list[str] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip() == SEPARATOR:
                yield "".join(lines).strip("\n")
                lines = []
            else:
                lines.append(line)
    yield "".join(lines).strip("\n")


def _of_jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{path}, line {number} is not JSON: {error}") from error
            yield _text_of(row, f"{path}, line {number}")


def _of_parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a parquet file: {error}") from error
    names = [name for name in _FIELDS if name in file.schema_arrow.names]
    if not names:
        raise DataError(f'{path} has no column "text" or "content"; it has {", ".join(file.schema_arrow.names)}')
    number = 0
    try:
        for batch in file.iter_batches(columns=names[:1]):
            for text in batch.column(0).to_pylist():
                yield _text_of(text, f"{path}, row {number}")
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged at row {number}: {error}") from error


def _of_hub(name: str, purpose: Purpose) -> Iterator[str]:
    import datasets

    repository, _, config = name.partition(":")
    try:
        rows = None
        for split in ("train",) if purpose == "calibration" else ("test", "validation"):
            try:
                rows = datasets.load_dataset(repository, config or None, split=split, streaming=True)
                break
            except ValueError as error:  # what datasets raises for an unknown split, among other things
                missing = error
        if rows is None:
            raise missing
        for number, row in enumerate(rows):
            yield _text_of(row, f"{name}, row {number}")
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(_no_hub_data(name, purpose, error)) from error


def _no_hub_data(name: str, purpose: Purpose, error: Exception) -> str:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    named = f"{name!r} (the default)" if name == DEFAULT_DATA else repr(name)
    argument = "data" if purpose == "calibration" else "text"
    own = ", or 'self' (text that the model writes)" if purpose == "calibration" else ""
    near = " Did you mean 'stdlib'?" if get_close_matches(name, ["stdlib"]) else ""
    return (
        f"{named} is no file here, and the hub gave no data set of that name ({first}). Without a network, name a text "
        f"in `{argument}`: a .txt, .jsonl or .parquet file or folder, 'stdlib' (Python's own source){own}.{near}"
    )


def _text_of(row: Any, where: str) -> str:
    if isinstance(row, str):
        return row
    for field in _FIELDS:
        if isinstance(row, dict) and isinstance(row.get(field), str):
            return str(row[field])
    found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise DataError(f'{where}: no text in a field "text" or "content"; found {found}')
