"""The text of a row: a field "text" or "content", or a conversation, written as text by the tokenizer's chat template.

{"text": "..."} or {"content": "..."}                                  text
{"messages": [{"role": "user", "content": "..."}, ...]}               a conversation
{"conversations": [{"from": "human", "value": "..."}, ...]}           the same, as ShareGPT writes it; "system" may stand beside
{"prompt": "...", "completion": "..."}                                 a question and its answer; also prompt and response,
                                                                       instruction (with input) and output, question and answer

`Chat` says what the template is applied to. Rows that hold neither are skipped and counted; `Reading.notes` tells the user.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from slimlm.core.errors import DataError

Conversation = list[dict[str, str]]
"""Messages with a "role" and a "content"."""

ChatTemplate = Callable[[Conversation], str]
"""A function that writes a conversation as text; raises DataError where the template does not accept it."""

Chat = Literal["auto", "yes", "no"]
"""What the chat template is applied to: conversations ("auto"), text, too, as a message of the user ("yes"), or nothing ("no"),
so that the messages of a conversation are joined."""

TEXT_FIELDS = ("text", "content")
_THREADS = ("messages", "conversations")
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("question", "answer"))
"""Fields of a question and of its answer."""
_BESIDE = ("system", "input")
"""Fields that add to a conversation: a system prompt, and what the instruction of a pair is about."""
EXPECTED = (
    'a field "text" or "content", or a conversation (messages, conversations, prompt and completion or response, instruction '
    "and output, question and answer)"
)
_APART = "\n\n"
"""What stands between the messages of a conversation that is written without a chat template."""
_BY_TEMPLATE = "written as text by the tokenizer's chat template"

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}
"""Names of roles in the ShareGPT format, and in chat templates."""


def fields_to_read(names: list[str]) -> list[str]:
    """Those of a table's columns that may hold text or conversations, as rows differ; none where it can hold neither."""
    text = [name for name in TEXT_FIELDS if name in names]
    threads = [name for name in _THREADS if name in names]
    pairs = [name for pair in _PAIRS if {*pair} <= {*names} for name in pair]
    if not (text or threads or pairs):
        return []
    return list(dict.fromkeys([*text, *threads, *pairs, *(name for name in _BESIDE if name in names)]))


@dataclass
class Reading:
    """How rows are read, and what was found in those that were read."""

    template: ChatTemplate | None = None
    """The tokenizer's chat template; None: it has none."""
    chat: Chat = "auto"
    """What the chat template is applied to."""
    rows: int = 0
    """The rows that were read."""
    conversations: int = 0
    """The rows that were conversations."""
    wrapped: int = 0
    """The texts that were written as messages of the user."""
    skipped: int = 0
    """The rows without text."""
    first_skipped: str = ""
    """The place of the first row without text, and what it holds instead."""
    remarks: list[str] = field(default_factory=list)
    """What else the user should know: files that were left out, encodings."""

    def __post_init__(self) -> None:
        """Raise DataError where a chat template is asked for and there is none."""
        if self.chat == "yes" and self.template is None:
            raise DataError(
                '`chat="yes"`: the model\'s tokenizer has no chat template; give a tokenizer that has one (of the chat version '
                'of this model, for example), or text with `chat="auto"`'
            )

    def text_of(self, row: Any, where: str) -> str | None:
        """The text of a row; None where it has none, which is counted.

        Raises:
            DataError: The row is a conversation, and there is no chat template to write it.
        """
        self.rows += 1
        try:
            return self._written(self._found(row), where)
        except _NoTextError as error:
            self.skipped += 1
            self.first_skipped = self.first_skipped or f"{where}: {error}"
            return None

    def document(self, text: str) -> str:
        """A document of plain text as it is read: as it is, or as a message of the user.

        Raises:
            DataError: The chat template does not accept a conversation of one message.
        """
        if self.chat != "yes" or not text:
            return text
        assert self.template is not None
        written = self.template([{"role": "user", "content": text}])
        self.wrapped += 1
        return written

    def _written(self, found: str | Conversation, where: str) -> str:
        """The text or conversation of a row, as it is read."""
        if isinstance(found, str):
            with _row_without_text():
                return self.document(found)
        if self.chat == "no":
            text = _full(_APART.join(message["content"] for message in found).strip(), "every message")
        elif self.template is not None:
            with _row_without_text():
                text = self.template(found)
        else:
            raise DataError(
                f"{where} is a conversation, and the model's tokenizer has no chat template that writes it as text. Give rows "
                'with a field "text", a tokenizer with a chat template (of the chat version of this model, for example), or, '
                'for calibration, `chat="no"`, which joins the messages as plain text'
            )
        self.conversations += 1
        return text

    def notes(self, source: str) -> Iterator[str]:
        """What the user should know after a source has been read."""
        yield from self.remarks
        if self.conversations:
            how = "joined as plain text, without a chat template" if self.chat == "no" else _BY_TEMPLATE
            yield f"{source}: {self.conversations} conversations were {how}"
        if self.wrapped:
            yield f"{source}: {self.wrapped} texts, each as a message of the user, were {_BY_TEMPLATE}"
        if self.skipped:
            yield f"{source}: {self.skipped} of {self.rows} rows were skipped; the first, {self.first_skipped}"

    def _found(self, row: Any) -> str | Conversation:
        """A row's text or conversation; where it has both, the conversation if the chat template writes it."""
        if isinstance(row, str):
            return _full(row, "the row")
        if not isinstance(row, dict):
            raise _NoTextError(f"it is {_kind(row)}; expected {EXPECTED}")
        text = next((name for name in TEXT_FIELDS if isinstance(row.get(name), str)), None)
        thread = next((name for name in _THREADS if row.get(name) is not None), None)
        if thread is not None and (text is None or (self.template is not None and self.chat != "no")):
            return _with_system(row, _messages(row[thread], thread))
        if text is not None:
            return _full(row[text], f'"{text}"')
        for asked, answered in _PAIRS:
            if row.get(asked) is not None and row.get(answered) is not None:
                return _with_system(row, [*_question(row, asked), *_turn(row[answered], answered, "assistant")])
        present = [name for name in TEXT_FIELDS if name in row]
        if present:
            raise _NoTextError(f'its "{present[0]}" is {_kind(row[present[0]])}, not text')
        raise _NoTextError(f"it has the fields {', '.join(map(str, row)) or '(none)'}; expected {EXPECTED}")


class _NoTextError(Exception):
    """A row without text; the message says what it holds instead."""


@contextmanager
def _row_without_text() -> Iterator[None]:
    """Within this context a conversation that the chat template does not accept makes its row one without text."""
    try:
        yield
    except DataError as error:
        raise _NoTextError(str(error)) from error


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


def _with_system(row: dict[str, Any], conversation: Conversation) -> Conversation:
    """A conversation with the system prompt that stands beside it, if there is one and it has none of its own."""
    given = row.get("system")
    if not isinstance(given, str) or not given or conversation[0]["role"] == "system":
        return conversation
    return [{"role": "system", "content": given}, *conversation]


def _question(row: dict[str, Any], name: str) -> Conversation:
    """The question of a pair, with what an instruction is about."""
    about = row.get("input") if name == "instruction" else None
    asked = f"{row[name]}{_APART}{about}" if isinstance(row[name], str) and isinstance(about, str) and about else row[name]
    return _turn(asked, name, "user")


def _turn(given: Any, name: str, role: str) -> Conversation:
    """A prompt or a completion: text, or messages."""
    return [{"role": role, "content": given}] if isinstance(given, str) else _messages(given, name)


def _kind(value: Any) -> str:
    """What a value of JSON or parquet is, in a sentence."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    return names.get(type(value), f"of type {type(value).__name__}")
