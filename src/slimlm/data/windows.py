"""Token windows: a stream of documents cut into pieces of one length, none overlapping.

Every document is preceded by the tokenizer's beginning-of-sequence token, where it has one; the last, incomplete window
is dropped. This is the usual perplexity protocol and serves calibration as well.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimlm.core.errors import DataError

_CHARACTERS_AT_ONCE = 2**20


def token_stream(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, at_most: int | None = None) -> Tensor:
    """All tokens of the texts, int64 `[tokens]`; reading stops once `at_most` are there."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens: list[int] = []
    for batch in _batches(texts):
        rows = tokenizer([piece for _, piece in batch], add_special_tokens=False, verbose=False)["input_ids"]
        for (first, _), row in zip(batch, rows, strict=True):
            tokens += (start if first else []) + row
        if at_most is not None and len(tokens) >= at_most:
            return torch.tensor(tokens[:at_most])
    return torch.tensor(tokens, dtype=torch.int64)


def windows_of(tokens: Tensor, length: int, *, source: str) -> Tensor:
    """Non-overlapping windows `[count, length]`; raises DataError where the text fills none."""
    if length < 2:
        raise DataError(f"`length={length}`: a sample needs at least 2 tokens")
    count = len(tokens) // length
    if count == 0:
        shorter = f" or a smaller `length` (at most {len(tokens)})" if len(tokens) > 1 else ""
        raise DataError(f"{source} gives {len(tokens)} tokens, less than one window of {length}; give more text{shorter}")
    return tokens[: count * length].view(count, length)


def check_seed(seed: int) -> int:
    """The seed; raises DataError where torch's generators do not take it."""
    if not -(2**63) <= seed < 2**64:
        raise DataError(f"`seed={seed}`: give a whole number of at most 64 bits, such as 0")
    return seed


def choose_windows(windows: Tensor, samples: int, seed: int) -> Tensor:
    """`samples` windows drawn without repetition by `seed`, or all where there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    return windows[torch.randperm(len(windows), generator=generator)[:samples]]


def refuse_unknown_tokens(tokens: Tensor, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Raise DataError where tokens have no row in the model's embedding; a tokenizer of another model gives such."""
    find = getattr(model, "get_input_embeddings", None)
    rows = getattr(find() if find else None, "num_embeddings", None)
    if not isinstance(rows, int) or tokens.numel() == 0 or int(tokens.max()) < rows:
        return
    token = int(tokens.max())
    words = "" if tokenizer is None else f" ({tokenizer.decode([token])!r})"
    raise DataError(
        f"the tokenizer gives token {token}{words}; the embedding of {type(model).__name__} has {rows} rows, for tokens 0 to "
        f"{rows - 1}. The tokenizer files belong to another model, or got tokens that the model was never given: use those "
        "that came with the model, or a text without such tokens"
    )


def sample_from_model(model: PreTrainedModel, *, samples: int, length: int, seed: int, start: int | None) -> Iterator[Tensor]:
    """Windows `[batch, length]` that the model writes itself (temperature 1), for when no data can be had.

    Each begins with the token `start`, or with a random one where the tokenizer has none.
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


def _batches(texts: Iterable[str]) -> Iterator[list[tuple[bool, str]]]:
    """Pieces of text, each with whether it begins a document; a book in one document is cut, so as not to be read whole."""
    batch: list[tuple[bool, str]] = []
    characters = 0
    for text in texts:
        for begin in range(0, len(text), _CHARACTERS_AT_ONCE):
            batch.append((begin == 0, text[begin : begin + _CHARACTERS_AT_ONCE]))
            characters += len(batch[-1][1])
            if characters >= _CHARACTERS_AT_ONCE:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch
