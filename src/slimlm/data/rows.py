"""The text of a row: a field "text" or "content", or a conversation, written as text by the tokenizer's chat template.

{"text": "..."} or {"content": "..."}                                  text
{"messages": [{"role": "user", "content": "..."}, ...]}               a conversation
{"conversations": [{"from": "human", "value": "..."}, ...]}           the same, as ShareGPT writes it
{"prompt": "...", "completion": "..."}                                 a question and its answer

Rows that hold neither are skipped and counted; `Reading.notes` tells the user.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from slimlm.core.errors import DataError

Conversation = list[dict[str, str]]
"""Messages with a "role" and a "content"."""

ChatTemplate = Callable[[Conversation], str]
"""A function that writes a conversation as text; raises DataError where the template does not accept it."""

TEXT_FIELDS = ("text", "content")
CHAT_FIELDS = ("messages", "conversations", "prompt", "completion")
EXPECTED = 'a field "text" or "content", or a conversation (messages, conversations, or prompt and completion)'

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
"""Names of roles in the ShareGPT format, and in chat templates."""


@dataclass
class Reading:
    """How rows are read, and what was found in those that were read."""

    chat: ChatTemplate | None = None
    """The tokenizer's chat template; None: it has none."""
    rows: int = 0
    """The rows that were read."""
    conversations: int = 0
    """The rows that were conversations."""
    skipped: int = 0
    """The rows without text."""
    first_skipped: str = ""
    """The place of the first row without text, and what it holds instead."""
    remarks: list[str] = field(default_factory=list)
    """What else the user should know: files that were left out, encodings."""

    def text_of(self, row: Any, where: str) -> str | None:
        """The text of a row; None where it has none, which is counted.

        Raises:
            DataError: The row is a conversation, and there is no chat template.
        """
        self.rows += 1
        try:
            found = self._text(row)
        except _NoTextError as error:
            self.skipped += 1
            self.first_skipped = self.first_skipped or f"{where}: {error}"
            return None
        if isinstance(found, str):
            return found
        if self.chat is None:
            raise DataError(
                f"{where} is a conversation, and the model's tokenizer has no chat template that writes it as text. Give rows "
                'with a field "text", or a tokenizer with a chat template (of the chat version of this model, for example)'
            )
        try:
            text = self.chat(found)
        except DataError as error:
            self.skipped += 1
            self.first_skipped = self.first_skipped or f"{where}: {error}"
            return None
        self.conversations += 1
        return text

    def notes(self, source: str) -> Iterator[str]:
        """What the user should know after a source has been read."""
        yield from self.remarks
        if self.conversations:
            yield f"{source}: {self.conversations} conversations were written as text by the tokenizer's chat template"
        if self.skipped:
            yield f"{source}: {self.skipped} of {self.rows} rows were skipped; the first, {self.first_skipped}"

    def _text(self, row: Any) -> str | Conversation:
        if isinstance(row, str):
            return _full(row, "the row")
        if not isinstance(row, dict):
            raise _NoTextError(f"it is {_kind(row)}; expected {EXPECTED}")
        for name in TEXT_FIELDS:
            if isinstance(row.get(name), str):
                return _full(row[name], f'"{name}"')
        for name in ("messages", "conversations"):
            if row.get(name) is not None:
                return _messages(row[name], name)
        if row.get("prompt") is not None and row.get("completion") is not None:
            return [*_turn(row["prompt"], "prompt", "user"), *_turn(row["completion"], "completion", "assistant")]
        present = [name for name in TEXT_FIELDS if name in row]
        if present:
            raise _NoTextError(f'its "{present[0]}" is {_kind(row[present[0]])}, not text')
        raise _NoTextError(f"it has the fields {', '.join(map(str, row)) or '(none)'}; expected {EXPECTED}")


class _NoTextError(Exception):
    """A row without text; the message says what it holds instead."""


def _full(text: str, what: str) -> str:
    if not text:
        raise _NoTextError(f"{what} is empty")
    return text


def _messages(given: Any, name: str) -> Conversation:
    if not isinstance(given, list) or not given:
        raise _NoTextError(f'its "{name}" is {"empty" if given == [] else _kind(given)}, not a list of messages')
    return [_message(message, f'a message of its "{name}"') for message in given]


def _message(given: Any, what: str) -> dict[str, str]:
    """One message of either format, with its text parts joined."""
    if not isinstance(given, dict):
        raise _NoTextError(f"{what} is {_kind(given)}")
    # Parquet files hold every key of every row, with null in place of those that a row does not have.
    role, content = given.get("role") or given.get("from"), given.get("content")
    if content is None:
        content = given.get("value")
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise _NoTextError(f"{what} has the role {role!r} and {_kind(content)} as its content, not text")
    return {"role": _ROLES.get(role, role), "content": content}


def _turn(given: Any, name: str, role: str) -> Conversation:
    """A prompt or a completion: text, or messages."""
    return [{"role": role, "content": given}] if isinstance(given, str) else _messages(given, name)


def _kind(value: Any) -> str:
    """What a value of JSON or parquet is, in a sentence."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    return names.get(type(value), f"of type {type(value).__name__}")
