"""Files of text: which ones a folder holds, how they are opened, and the pieces and rows in them, read as they are needed.

UTF-8, with or without a byte order mark; UTF-16 and UTF-32 with one. Names that end in .gz or .zst are decompressed.
"""

import codecs
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from slimlm.core.errors import DataError
from slimlm.data.rows import EXPECTED, Reading, fields_to_read

SEPARATOR = "<|endoftext|>"
PIECE = 2**20
"""Characters of a document that are read, and tokenized, at once."""
READABLE = (".txt", ".text", ".raw", ".md", ".jsonl", ".parquet")
LIST = ".json"
"""The end of the names of files that hold a list of rows. They are read where they are named themselves; in folders such files
are about models and data sets."""
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_ABOUT = ("readme", "license", "licence", "notice", "citation", "changelog", "contributing")
"""Names, without their ends, of files that are about a data set."""
_DECODER = json.JSONDecoder()
_LONGEST_TOKEN = 12
"""Characters of the longest token of JSON but strings and numbers: a pair of escaped surrogates."""
_ROWS = 256
"""Rows of a parquet file that are made into Python objects at once."""
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks; that of UTF-32 begins with that of UTF-16."""
_LOG, _LOG_BEGINS = ".log.jsonl", b'{"event": "run"'
"""The end of the name of a run's log (slimlm.run.log), and the start of the file."""
_RECORD = "slimlm.json"
"""The file that makes a folder a checkpoint (slimlm.storage.checkpoint)."""


class Piece(NamedTuple):
    """A part of a document, at most `PIECE` characters."""

    begins: bool
    """Whether the document begins with it."""
    text: str
    """The text."""


def pieces_of(text: str) -> Iterator[Piece]:
    """The pieces of a document that is in memory; none where it is empty."""
    for begin in range(0, len(text), PIECE):
        yield Piece(begin == 0, text[begin : begin + PIECE])


def is_readable(path: Path) -> bool:
    """Whether a file's name ends as those of texts do, compressed or not; parquet files have a compression of their own."""
    kind = _kind(path)
    return kind in (*READABLE, LIST) and not (kind == ".parquet" and path.suffix in _COMPRESSED)


def readable_endings(*, in_folder: bool) -> str:
    """The ends of names, for messages about a file that is named itself or about a folder."""
    endings = READABLE if in_folder else (*READABLE, LIST)
    return f"{', '.join(endings)} (all but .parquet also with .gz or .zst after it)"


def files_in(folder: Path, reading: Reading) -> list[Path]:
    """The files of text in a folder, in order of name.

    Hidden files, what slimlm wrote there, and files about the data set (README.md, LICENSE.txt) are left out; the last are
    named in `reading`.
    """
    texts = [path for path in folder.rglob("*") if is_readable(path) and _kind(path) != LIST]
    found = [path for path in texts if not _hidden(path, folder) and not _own_output(path, folder)]
    about = sorted(p.relative_to(folder).as_posix() for p in found if p.name.lower().split(".")[0] in _ABOUT)
    if about:
        reading.remarks.append(f"{folder}: left out {', '.join(about)}: about the data set, not part of its text")
    return sorted(p for p in found if p.relative_to(folder).as_posix() not in about)


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _own_output(file: Path, folder: Path) -> bool:
    """Whether slimlm wrote a file below this folder: a run's log, or a file in a run's folder or in a checkpoint."""
    if file.name.endswith(_LOG) and file.is_file():
        with file.open("rb") as log:
            if log.read(len(_LOG_BEGINS)) == _LOG_BEGINS:
                return True
    between = file.parents[: file.parents.index(folder)]
    return any(".partial" in (p.suffix, p.suffix.partition("-")[0]) or (p / _RECORD).is_file() for p in between)


def pieces_in(path: Path, reading: Reading) -> Iterator[Piece]:
    """The text of a file; raises DataError where it cannot be read, saying where."""
    try:
        if _kind(path) == ".parquet":
            yield from _of_parquet(path, reading)
            return
        with _text_file(path, reading) as file:
            if _kind(path) == ".jsonl":
                yield from _of_jsonl(file, path, reading)
            elif _kind(path) == LIST:
                yield from _of_list(file, path, reading)
            else:
                for piece in _of_text(file):
                    yield from (piece,) if reading.chat != "yes" else pieces_of(reading.document(piece.text))
    except UnicodeDecodeError as error:
        raise DataError(_undecodable(path)) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _kind(path: Path) -> str:
    """The end of a file's name without that of its compression."""
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


@contextmanager
def _bytes_of(path: Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of a file."""
    if path.suffix not in _COMPRESSED:
        with path.open("rb") as file:
            yield file
        return
    import pyarrow

    with pyarrow.input_stream(str(path), compression=_COMPRESSED[path.suffix]) as stream:
        yield stream


def _encoding_of(path: Path) -> str:
    with _bytes_of(path) as file:
        start = file.read(4)
    return next((encoding for mark, encoding in _MARKS if start.startswith(mark)), "utf-8")


@contextmanager
def _text_file(path: Path, reading: Reading) -> Iterator[TextIO]:
    encoding = _encoding_of(path)
    if encoding not in ("utf-8", "utf-8-sig"):
        reading.remarks.append(f"{path} is read as {encoding.upper()}, by its byte order mark")
    with _bytes_of(path) as file, io.TextIOWrapper(file, encoding=encoding) as text:
        yield text


def _undecodable(path: Path) -> str:
    """A message that says where a file is no text of its encoding: reads it again, a piece at a time."""
    encoding = _encoding_of(path)
    decoder = codecs.getincrementaldecoder(encoding)()
    line, before = 1, 0
    with _bytes_of(path) as file:
        while True:
            chunk = file.read(PIECE)
            try:
                line += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeDecodeError as error:
                # Its bytes are those that the decoder held back, and the chunk.
                at = before + len(chunk) - len(error.object) + error.start
                line += error.object[: error.start].decode(encoding, errors="replace").count("\n")
                name = "UTF-8" if encoding == "utf-8-sig" else encoding.upper()
                return (
                    f"{path} is not {name} text: {error.reason} in line {line}, byte {at} of the file. Text is read as UTF-8, "
                    "and as UTF-16 or UTF-32 where it begins with a byte order mark; convert it first"
                )
            assert chunk, "the file decodes now, and did not before: it changed meanwhile"
            before += len(chunk)


def _of_text(file: TextIO) -> Iterator[Piece]:
    document = _Document()
    while line := file.readline(PIECE):
        if line.strip() == SEPARATOR:
            yield from document.end()
            document = _Document()
        else:
            yield from document.add(line)
    yield from document.end()


class _Document:
    """A document that is read line by line, without the newlines at its start and end."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._length, self._enough, self._begins = 0, PIECE, True

    def add(self, line: str) -> Iterator[Piece]:
        """Add a line; gives the pieces that are complete."""
        self._lines.append(line)
        self._length += len(line)
        if self._length < self._enough:
            return
        text = self._joined()
        # Newlines at the end belong to the document only if more text follows.
        sure, at = len(text.rstrip("\n")), 0
        while sure - at >= PIECE:
            yield self._piece(text[at : at + PIECE])
            at += PIECE
        self._lines, self._length = [text[at:]], len(text) - at
        self._enough = max(PIECE, 2 * self._length)

    def end(self) -> Iterator[Piece]:
        """The last piece, which may be short."""
        if text := self._joined().rstrip("\n"):
            for piece in pieces_of(text):
                yield self._piece(piece.text)

    def _joined(self) -> str:
        text = "".join(self._lines)
        return text.lstrip("\n") if self._begins else text

    def _piece(self, text: str) -> Piece:
        begins, self._begins = self._begins, False
        return Piece(begins, text)


def _of_jsonl(file: TextIO, path: Path, reading: Reading) -> Iterator[Piece]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from error
        if (text := reading.text_of(row, f"{path}, line {number}")) is not None:
            yield from pieces_of(text)


def _of_list(file: TextIO, path: Path, reading: Reading) -> Iterator[Piece]:
    for number, row in enumerate(_JsonList(file, path).rows()):
        if (text := reading.text_of(row, f"{path}, row {number}")) is not None:
            yield from pieces_of(text)


class _JsonList:
    """The values in a file that holds one JSON list, of which about a piece at a time is in memory."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._at = "", 0

    def rows(self) -> Iterator[Any]:
        """The values one after another; raises DataError where the file is no JSON list."""
        if self._next() != "[":
            raise DataError(f"{self._path} is no JSON list of rows; a file with a row in each line ends in .jsonl")
        self._at += 1
        if self._next() == "]":
            return
        number, after = 0, ","
        while after == ",":
            self._next()
            yield self._value(number)
            after, number = self._next(), number + 1
            self._at += 1
        if after != "]":
            raise DataError(f"{self._path} is not JSON: neither a comma nor the end of the list follows row {number - 1}")

    def _next(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if not (more := self._file.read(PIECE)):
                return ""
            self._text, self._at = more, 0

    def _value(self, number: int) -> Any:
        """The value that begins at this place."""
        size = PIECE
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except (json.JSONDecodeError, RecursionError) as error:
                end = len(self._text)
                more = self._file.read(size) if _may_go_on(error, end) else ""
                if not more:
                    raise DataError(f"{self._path}, row {number} is not JSON: {error}") from error
            else:
                # A number may go on, with a decimal point or an exponent.
                more = self._file.read(size) if end > len(self._text) - _LONGEST_TOKEN else ""
                if not more:
                    self._at = end
                    return value
            self._text, self._at, size = self._text[self._at :] + more, 0, 2 * size


def _may_go_on(error: json.JSONDecodeError | RecursionError, length: int) -> bool:
    """Whether a text of so many characters may be the beginning of JSON: it ends within a string, or where it is wrong."""
    if isinstance(error, RecursionError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= length - _LONGEST_TOKEN


def _of_parquet(path: Path, reading: Reading) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=PIECE)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a parquet file: {error}") from error
    names = file.schema_arrow.names
    columns = fields_to_read(names)
    if not columns:
        raise DataError(f"{path} has the columns {', '.join(names)}; expected {EXPECTED}")
    number = 0
    try:
        for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
            rows: list[Any] = batch.to_pylist()
            for row in rows:
                if (text := reading.text_of(row, f"{path}, row {number}")) is not None:
                    yield from pieces_of(text)
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged at row {number}: {error}") from error
