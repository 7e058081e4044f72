"""The calibration samples of a run: drawn from a text, or written by the model itself, and stored in the journal."""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimlm.core.errors import CheckpointError, DataError
from slimlm.core.profiling import profiled
from slimlm.data.documents import Source, label_of
from slimlm.data.windows import choose_windows, refuse_unknown_tokens, sample_from_model, tokens_of, windows_of
from slimlm.events import Event, Notify, Observer
from slimlm.models.dense import DenseModel
from slimlm.models.lazy import LazyModel
from slimlm.models.structure import context_length
from slimlm.storage.journal import HELD_BACK, OWN_TEXT, TEXT, Journal

_READ_AHEAD = 8
"""Calibration samples are drawn from up to this many times the text they need."""


HELD_BACK_TOKENS = 2048
"""The most tokens that are held back, on which the compressed model is compared with the original at the end."""
_HELD_BACK_LENGTH = 512
"""The most tokens of a window of them."""


@dataclass(frozen=True)
class Calibration:
    """Where the calibration text comes from and how much of it is used."""

    data: Source
    """A .txt, .jsonl or .parquet file or folder, a hub data set, "stdlib", "self" (text that the model writes), or texts."""
    samples: int
    """The number of samples."""
    length: int
    """Tokens per sample, at most the model's context."""
    seed: int = 0
    """The seed by which samples are drawn."""

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise DataError(
                f"samples = {self.samples}, length = {self.length}: calibration needs at least one sample of two tokens"
            )


@dataclass(frozen=True)
class Drawn:
    """Token ids drawn from a text."""

    samples: Tensor
    """The calibration samples, `[count, length]`."""
    held_back: Tensor | None
    """Windows of the same text that share no token with the samples, `[count, length]`; None: there are no more."""

    @classmethod
    def of(cls, windows: Tensor, samples: int) -> "Drawn":
        """The first of these windows `[count, length]` as samples; of those after them as many tokens as are held back."""
        length = min(windows.shape[1], _HELD_BACK_LENGTH)
        whole = windows.shape[1] // length * length
        rest = windows[samples:, :whole].reshape(-1, length)[: max(1, HELD_BACK_TOKENS // length)]
        return cls(windows[:samples], rest if len(rest) else None)


def calibration_samples(
    dense: LazyModel,
    whole: DenseModel | None,
    wanted: Calibration,
    journal: Journal,
    progress: Observer,
    notify: Notify,
) -> Drawn:
    """The calibration samples of a run and the windows that are held back, stored in the journal.

    Samples that the model wrote itself are read from the journal where it has them; a text is read again, and must be the same.

    Args:
        dense: The original model.
        whole: The same model in memory; needed where it writes the samples itself and the journal has none.
        wanted: The text and how much of it is used.
        journal: The journal of the run.
        progress: An observer of the events.
        notify: Is given what the user should know about the text.

    Raises:
        DataError: The text cannot be read or is too short, or has tokens that the model does not have.
        CheckpointError: The text is not the one that the run was begun on.
    """
    if wanted.data == "self":
        stored = journal.noted_tensor(OWN_TEXT)
        if stored is None:
            assert whole is not None
            stored = generate_samples(whole, wanted, progress)
            journal.note_tensor(OWN_TEXT, stored)
        return Drawn(stored, None)
    drawn = draw_samples(dense, wanted, notify)
    stored = journal.noted_tensor(TEXT)
    if stored is None:
        journal.note_tensor(TEXT, drawn.samples)
    elif not torch.equal(stored, drawn.samples):
        raise CheckpointError(
            f"the run in {journal.folder} was begun on other calibration text: {label_of(wanted.data)} has changed since, or "
            "the tokenizer has. Bring it back to resume the run, or give `restart=True` to begin again"
        )
    if drawn.held_back is None:
        return drawn
    if (held_back := journal.noted_tensor(HELD_BACK)) is None:
        journal.note_tensor(HELD_BACK, held_back := drawn.held_back)
    return Drawn(drawn.samples, held_back)


def generate_samples(dense: DenseModel, wanted: Calibration, progress: Observer) -> Tensor:
    """Samples `[count, length]` that the model writes itself."""
    start = None if dense.tokenizer is None else dense.tokenizer.bos_token_id
    length = min(wanted.length, context_length(dense.model) or wanted.length)
    pieces = []
    for piece in sample_from_model(dense.model, samples=wanted.samples, length=length, seed=wanted.seed, start=start):
        pieces.append(piece)
        progress(Event("sample text", sum(map(len, pieces)), wanted.samples))
    return torch.cat(pieces)


@profiled("read text")
def draw_samples(dense: LazyModel, wanted: Calibration, notify: Notify) -> Drawn:
    """Samples drawn from a text, and windows held back; raises DataError for tokens that the model does not have."""
    if dense.tokenizer is None:
        raise DataError(f"{dense.source} has no tokenizer, so text cannot be read; add its files, or calibrate on 'self'")
    length = min(wanted.length, context_length(dense.model) or wanted.length)
    ahead = _READ_AHEAD * wanted.samples * length
    tokens = tokens_of(dense.tokenizer, wanted.data, "calibration", at_most=ahead, notify=notify)
    windows = windows_of(tokens, length, source=label_of(wanted.data))
    drawn = Drawn.of(choose_windows(windows, wanted.samples + HELD_BACK_TOKENS, wanted.seed), wanted.samples)
    for own in (drawn.samples, drawn.held_back):
        if own is not None:
            refuse_unknown_tokens(own, dense.model, dense.tokenizer)
    return drawn
