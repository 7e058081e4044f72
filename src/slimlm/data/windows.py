"""Token windows: a stream of documents cut into pieces of equal length that do not overlap.

Every document is preceded by the tokenizer's beginning-of-sequence token, if it has one and the document does not begin with
it; the last, incomplete window is dropped. This is the usual protocol for perplexity. Calibration samples are windows drawn at
random.
"""

from array import array
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimlm.core.errors import DataError, first_line
from slimlm.data.documents import Purpose, Source, label_of, pieces
from slimlm.data.files import PIECE, Piece
from slimlm.data.rows import ChatTemplate, Conversation, Reading
from slimlm.events import Notify, silent


def tokens_of(
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    purpose: Purpose,
    *,
    at_most: int | None = None,
    notify: Notify = silent,
    reading: Reading | None = None,
) -> Tensor:
    """The tokens of a source.

    Args:
        tokenizer: The model's.
        source: The texts, or their name (slimlm.data.documents).
        purpose: Which part of the source is read.
        at_most: Stop reading after this many tokens.
        notify: Is given what the user should know: rows and files that were left out, conversations.
        reading: How rows are read, and where what is found is counted; None: conversations are written as text by the
            tokenizer's chat template.

    Returns:
        int64 `[tokens]`.

    Raises:
        DataError: There is no text, or it cannot be read.
    """
    reading = reading or Reading(chat_template_of(tokenizer))
    tokens = _stream(tokenizer, pieces(source, purpose, reading), at_most)
    for note in reading.notes(label_of(source)):
        notify(note)
    return tokens


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """The tokenizer's chat template as a function; None where it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    from jinja2 import TemplateError

    def chat(conversation: Conversation) -> str:
        try:
            return str(tokenizer.apply_chat_template(conversation, tokenize=False))
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:  # templates raise what they like
            raise DataError(f"the chat template does not accept the conversation ({first_line(error)})") from error

    return chat


def _stream(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[Piece], at_most: int | None) -> Tensor:
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens = array("q")
    for batch in _batches(pieces):
        rows = tokenizer([piece.text for piece in batch], add_special_tokens=False, verbose=False)["input_ids"]
        for piece, row in zip(batch, rows, strict=True):
            # A chat template, or the text itself, may write the token already.
            tokens.extend(start if piece.begins and row[:1] != start else [])
            tokens.extend(row)
        if at_most is not None and len(tokens) >= at_most:
            break
    return torch.frombuffer(tokens, dtype=torch.int64)[:at_most] if tokens else torch.empty(0, dtype=torch.int64)


def windows_of(tokens: Tensor, length: int, *, source: str) -> Tensor:
    """Windows of a stream of tokens that do not overlap.

    Args:
        tokens: int64 `[tokens]`.
        length: tokens per window.
        source: the text's name in messages.

    Returns:
        A view `[count, length]` of the tokens, without the last, incomplete window.

    Raises:
        DataError: the text fills no window, or `length` is below 2.
    """
    if length < 2:
        raise DataError(f"`length={length}`: a sample needs at least 2 tokens")
    count = len(tokens) // length
    if count == 0:
        shorter = f" or a smaller `length` (at most {len(tokens)})" if len(tokens) > 1 else ""
        raise DataError(f"{source} gives {len(tokens)} tokens, less than one window of {length}; give more text{shorter}")
    return tokens[: count * length].view(count, length)


def check_seed(seed: int) -> int:
    """The seed itself.

    Raises:
        DataError: torch's generators do not accept it.
    """
    if not -(2**63) <= seed < 2**64:
        raise DataError(f"`seed={seed}`: give a whole number of at most 64 bits, such as 0")
    return seed


def choose_windows(windows: Tensor, count: int, seed: int) -> Tensor:
    """Windows drawn at random without repetition.

    Args:
        windows: `[all, length]`.
        count: how many to draw; where there are fewer, all are drawn.
        seed: of the random numbers.

    Returns:
        `[count, length]`, in random order.
    """
    generator = torch.Generator().manual_seed(seed)
    return windows[torch.randperm(len(windows), generator=generator)[:count]]


def refuse_unknown_tokens(tokens: Tensor, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Check that all tokens have a row in the model's embedding, which those of another model's tokenizer may not have.

    Args:
        tokens: integers, `[count, length]` or of any other shape.
        model: the rows of its input embedding are counted; a model without one accepts all tokens.
        tokenizer: decodes such a token for the message.

    Raises:
        DataError: there are such tokens.
    """
    find = getattr(model, "get_input_embeddings", None)
    rows = getattr(find() if find else None, "num_embeddings", None)
    if not isinstance(rows, int) or tokens.numel() == 0 or int(tokens.max()) < rows:
        return
    token = int(tokens.max())
    text = "" if tokenizer is None else f" ({tokenizer.decode([token])!r})"
    raise DataError(
        f"the tokenizer gives token {token}{text}; the embedding of {type(model).__name__} has {rows} rows, for tokens 0 to "
        f"{rows - 1}. The tokenizer files belong to another model, or have tokens that the model lacks: use those that "
        "came with the model, or a text without such tokens"
    )


def sample_from_model(model: PreTrainedModel, *, samples: int, length: int, seed: int, start: int | None) -> Iterator[Tensor]:
    """Calibration samples that the model generates, at temperature 1, to be used where there is no text.

    Args:
        model: on the CPU.
        samples: how many.
        length: tokens of each.
        seed: of the random numbers.
        start: the first token of each sample; None: a random one.

    Yields:
        int64 `[batch, length]`, `samples` of them in all.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    batch = max(1, 4096 // length)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for done in range(0, samples, batch):
            rows = min(batch, samples - done)
            first = torch.randint(vocabulary, (rows, 1)) if start is None else torch.full((rows, 1), start)
            yield model.generate(
                first,
                attention_mask=torch.ones_like(first),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
                pad_token_id=0,
            )


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Lists of pieces, which are tokenized together."""
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= PIECE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
