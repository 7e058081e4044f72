"""`slimlm generate`."""

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from slimlm.cli import options
from slimlm.cli.console import notifier, print_json, say_on_stderr
from slimlm.core.errors import DataError, SlimlmError

if TYPE_CHECKING:
    import torch

    from slimlm.evaluation.compare import OpenModel
    from slimlm.inference.generate import Generated


def generate(
    context: typer.Context,
    model: options.AnyModel,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue.", show_default="read from standard input, or a chat")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Chat with the model, a line at a time; without --prompt a terminal does where it can."),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the random choices that a temperature above 0 makes.")] = 0,
    kernels: options.ChosenKernels = "auto",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Continue a text, or chat; auto uses the fast kernels on a CPU. Speed goes to standard error.

    Without --prompt the text is read from standard input. On a terminal it is a chat where the tokenizer has a chat template.
    """
    if chat and as_json:
        raise SlimlmError("--chat prints a conversation, and --json one JSON object; give one of them")

    from slimlm.cli.opened import kernels_of, refuse_cpu_kernels, show_kernels
    from slimlm.data.windows import check_seed
    from slimlm.evaluation.compare import open_any
    from slimlm.report.tables import generation_lines
    from slimlm.run.config import pick_device
    from slimlm.runtime.whole_model import prefer_fast

    check_seed(seed)
    where = pick_device(device)
    refuse_cpu_kernels(kernels, where)
    opened = open_any(model, kernels=kernels, device=where, notify=notifier(context))
    prefer_fast(opened.model)
    writer = _Writer(opened, where, max_new_tokens, temperature, seed)
    asked = prompt is None and sys.stdin.isatty()
    if chat or (asked and not as_json and opened.tokenizer.chat_template):
        show_kernels(opened)
        _chat(writer, prompt)
        return
    if asked:
        say_on_stderr("type the text to continue; Ctrl-D ends it")
    text = _standard_input() if prompt is None else prompt
    echo = _ignore if as_json else _print
    made, written = writer.write(_prompt_tokens(opened, text), before=echo, each=echo)
    if as_json:
        print_json({"model": model, "prompt": text, "kernels": kernels_of(opened), "text": written, **made.to_dict()})
        return
    _print("\n")
    show_kernels(opened)
    for line in generation_lines(made):
        say_on_stderr(line)


@dataclass(frozen=True)
class _Writer:
    """A model that writes, with the options of the verb."""

    opened: "OpenModel"
    device: "torch.device"
    max_new_tokens: int
    temperature: float
    seed: int

    def write(self, ids: list[int], *, before: Callable[[str], None], each: Callable[[str], None]) -> tuple["Generated", str]:
        """Continue a text.

        Args:
            ids: The tokens of the prompt.
            before: Called with the prompt's text, before anything is generated.
            each: Called with every further piece of text.

        Returns:
            The tokens and their timing, and the text that was generated.
        """
        import torch

        from slimlm.inference.generate import TextStream, generate, room_for

        room_for(self.opened.model, len(ids))
        pieces, text = TextStream(self.opened.tokenizer), io.StringIO()
        before(pieces.put(ids))

        def show(piece: str) -> None:
            text.write(piece)
            each(piece)

        made = generate(
            self.opened.model,
            torch.tensor([ids], device=self.device),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            stop_tokens=_stop_tokens(self.opened),
            each=lambda tokens: show(pieces.put(tokens)),
        )
        show(pieces.end())
        return made, text.getvalue()


def _chat(writer: _Writer, first: str | None) -> None:
    """Answer line after line of standard input, each with the whole conversation before it; a prompt is the first line."""
    if not writer.opened.tokenizer.chat_template:
        raise DataError("--chat: the tokenizer has no chat template, so the model was not made for chats; give --prompt a text")
    if sys.stdin.isatty():
        say_on_stderr("a chat: type a line and Enter; Ctrl-D ends it")
    messages: list[dict[str, str]] = []
    for line in _lines(first):
        messages.append({"role": "user", "content": line})
        ids = _chat_tokens(writer.opened, messages)
        if len(messages) > 1 and (full := _no_room(writer.opened, ids)):
            say_on_stderr(f"note: the chat ends here, as the whole conversation is the prompt: {full}")
            return
        _, answer = writer.write(ids, before=_ignore, each=_print)
        _print("\n")
        messages.append({"role": "assistant", "content": answer})


def _no_room(opened: "OpenModel", ids: list[int]) -> str | None:
    """Why nothing can follow these tokens; None where something can."""
    from slimlm.inference.generate import room_for

    try:
        room_for(opened.model, len(ids))
    except DataError as error:
        return str(error)
    return None


def _lines(first: str | None) -> Iterator[str]:
    """The lines that the user types, without empty ones."""
    _let_undecodable_input_fail()
    if first is not None:
        yield first
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise _undecodable(error) from None
        if not line:
            return
        if line.strip():
            yield line.strip()


def _chat_tokens(opened: "OpenModel", messages: list[dict[str, str]]) -> list[int]:
    """The tokens of a conversation by the tokenizer's chat template, up to where the model's answer begins."""
    from jinja2 import TemplateError

    try:
        found = opened.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    except TemplateError as error:
        raise DataError(f"the tokenizer's chat template refuses the conversation: {error}; give --prompt a text") from error
    return list(found["input_ids"])


def _standard_input() -> str:
    """All of standard input, which is text in UTF-8, without the line break at its end."""
    _let_undecodable_input_fail()
    try:
        text = sys.stdin.read() if sys.stdin.isatty() else sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise _undecodable(error) from None
    if not text:
        raise DataError("there is no text to continue: standard input is empty; give --prompt, or text on standard input")
    return text.removesuffix("\n").removesuffix("\r")


def _let_undecodable_input_fail() -> None:
    """Let reading standard input raise at bytes that are no text, which Python passes on in the locales C and C.UTF-8."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")


def _undecodable(error: UnicodeDecodeError) -> DataError:
    return DataError(f"standard input is no {error.encoding} text: {error.reason} at byte {error.start}")


def _print(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _ignore(piece: str) -> None:
    """Ignore the text."""


def _prompt_tokens(opened: "OpenModel", prompt: str) -> list[int]:
    """The prompt's tokens, after the tokenizer's first one where it has one; raises SlimlmError where there are none."""
    tokenizer = opened.tokenizer
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [*start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise SlimlmError("the prompt is empty and the tokenizer has no token to begin with; give --prompt some text")
    return ids


def _stop_tokens(opened: "OpenModel") -> list[int]:
    """The tokens that end a text, of the model and of the tokenizer."""
    from slimlm.inference.generate import stop_tokens_of

    own = opened.tokenizer.eos_token_id
    return sorted({*stop_tokens_of(opened.model), *([] if own is None else [own])})
