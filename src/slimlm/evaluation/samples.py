"""The windows of a text that models are measured on."""

import sys

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimlm.core.errors import DataError, first_line
from slimlm.data.documents import Source, label_of
from slimlm.data.windows import tokens_of, windows_of
from slimlm.events import Notify
from slimlm.hub import unreachable

MOST_LENGTH = 2048
"""Tokens per window, where no length is given and the model's context is longer."""
DEFAULT_TEXT = "WikiText-2 (test)"
"""The name of the text that is measured on where none is given."""
_REPOSITORY, _CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"


def text_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: Source,
    *,
    length: int | None,
    context: int | None,
    at_most: int | None,
    notify: Notify,
    shrink: bool = False,
) -> Tensor:
    """Windows `[count, length]` of a text, one after another; the last, incomplete one is dropped.

    Args:
        tokenizer: The model's tokenizer.
        text: The text; see `slimlm.data.documents`.
        length: Tokens per window; None: the context, at most 2048.
        context: Tokens of the model's context; None: it is not limited.
        at_most: Tokens that are read of the text; None: all.
        notify: Is given what the user should know about the text.
        shrink: Whether a text shorter than a window is one window, where no length is given.

    Raises:
        DataError: Windows are longer than the model's context, or the text is too short.
    """
    limit = sys.maxsize if context is None else context
    if length is not None and length > limit:
        raise DataError(f"`length={length}` is more than the model's context of {limit} tokens")
    tokens = tokens_of(tokenizer, text, "evaluation", at_most=at_most, notify=notify)
    usual = min(limit, MOST_LENGTH, len(tokens) if shrink else MOST_LENGTH)
    return windows_of(tokens, length or usual, source=label_of(text))


def wikitext() -> tuple[str, ...]:
    """The test part of WikiText-2 as one document, its rows joined by empty lines as the papers on GPTQ do.

    Raises:
        DataError: The hub does not answer, or does not give it.
    """
    advice = "name a text in `text`: a .txt, .jsonl or .parquet file or folder, or 'stdlib' (Python's own source)"
    if (reason := unreachable()) is not None:
        raise DataError(
            f"no text is named, and {DEFAULT_TEXT}, the default, cannot be fetched from the hub ({reason}); {advice}"
        )
    import datasets

    try:
        rows = datasets.load_dataset(_REPOSITORY, _CONFIG, split="test")
        return ("\n\n".join(str(text) for text in rows["text"]),)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"no text is named, and the hub does not give {DEFAULT_TEXT}, the default ({first_line(error)}); {advice}"
        ) from error
