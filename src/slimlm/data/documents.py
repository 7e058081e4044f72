"""Documents from a source given by name, or given themselves.

file.txt            one document, or several separated by lines that hold only <|endoftext|>
file.jsonl          one document a line: text or a conversation (slimlm.data.rows)
file.json           a list of such documents; left out of folders
file.parquet        one document a row, likewise
a folder            all such files in it, in order of name (slimlm.data.files says which are left out)
stdlib              the source of Python's standard library: its calibration or its evaluation part
anything else       a hub data set, NAME or NAME:CONFIG (split: train for calibration, test for evaluation)

Files may be compressed: file.jsonl.gz, file.txt.zst.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from slimlm.core import arguments
from slimlm.core.errors import DataError, first_line
from slimlm.data.files import Piece, files_in, is_readable, pieces_in, pieces_of, readable_endings
from slimlm.data.rows import Reading
from slimlm.data.stdlib import stdlib_documents
from slimlm.hub import unreachable

Purpose = Literal["calibration", "evaluation"]

Source = str | tuple[str, ...]
"""A source by name, or the texts themselves."""

DEFAULT_DATA = "allenai/c4:en"
"""The default of calibration, as in the papers; it is downloaded from the hub."""


def label_of(source: Source) -> str:
    """A source as messages name it: as the user does, or how many texts."""
    return source if isinstance(source, str) else f"{len(source)} given texts"


def name_of(source: Source) -> str:
    """A source as it is recorded: of a path the last name, because folders above it are private; a hub name unchanged."""
    return Path(source).resolve().name if isinstance(source, str) and Path(source).exists() else label_of(source)


def pieces(source: Source, purpose: Purpose, reading: Reading) -> Iterator[Piece]:
    """The documents of a source in pieces, read lazily and in order.

    Args:
        source: One of those in this module's docstring, or texts.
        purpose: Which part to read of a source that has one for calibration and one for evaluation.
        reading: How rows are read; what is found is counted there.

    Raises:
        DataError: There is no text at the source, or it cannot be read; for some sources this is raised only when the
            documents are read.
    """
    if isinstance(source, tuple):
        return (piece for text in source for piece in pieces_of(reading.document(text)))
    if source == "self":
        raise DataError(
            "'self' is the text a model writes; it serves calibration, not evaluation. Name another text to measure on"
        )
    if source == "stdlib":
        return (piece for text in stdlib_documents(purpose) for piece in pieces_of(reading.document(text)))
    path = arguments.path(source, "data" if purpose == "calibration" else "text", DataError)
    if path.is_dir():
        files = files_in(path, reading)
        if not files:
            left_out = "".join(f"; {remark}" for remark in reading.remarks)
            endings = readable_endings(in_folder=True)
            raise DataError(f"{source} holds no file that ends in {endings} (what slimlm wrote there does not count){left_out}")
        return _not_nothing((piece for file in files for piece in pieces_in(file, reading)), source, reading)
    if path.is_file():
        if not is_readable(path):
            raise DataError(f"{source}: text is read from files that end in {readable_endings(in_folder=False)}")
        return _not_nothing(pieces_in(path, reading), source, reading)
    if is_readable(path) or source.startswith((".", "/", "~")):
        raise DataError(f"no text at {source}")
    return _not_nothing(_of_hub(source, purpose, reading), source, reading)


def _not_nothing(pieces: Iterator[Piece], source: str, reading: Reading) -> Iterator[Piece]:
    """The same pieces; raises DataError where all rows of a source were skipped."""
    found = False
    for piece in pieces:
        found = True
        yield piece
    if not found and reading.skipped:
        raise DataError(f"{source}: none of its {reading.rows} rows has text; the first, {reading.first_skipped}")


def _of_hub(name: str, purpose: Purpose, reading: Reading) -> Iterator[Piece]:
    if (reason := unreachable()) is not None:
        raise DataError(_no_hub_data(name, purpose, f"{reason}; with HF_HUB_OFFLINE=1 its cache is used"))
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
            if (text := reading.text_of(row, f"{name}, row {number}")) is not None:
                yield from pieces_of(text)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(_no_hub_data(name, purpose, first_line(error))) from error


def _no_hub_data(name: str, purpose: Purpose, reason: str) -> str:
    named = f"{name!r} (the default)" if name == DEFAULT_DATA else repr(name)
    argument = "data" if purpose == "calibration" else "text"
    own = ", or 'self' (text that the model writes)" if purpose == "calibration" else ""
    near = " Did you mean 'stdlib'?" if get_close_matches(name, ["stdlib"]) else ""
    return (
        f"{named} is no file here, and the hub gave no data set of that name ({reason}). Without a network, name a text "
        f"in `{argument}`: a .txt, .jsonl or .parquet file or folder, 'stdlib' (Python's own source){own}.{near}"
    )
