"""The calibration windows of a run: drawn from a text, or written by the model itself, and kept in the journal."""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimlm.core.errors import CheckpointError, DataError
from slimlm.core.profiling import profiled
from slimlm.data.documents import DEFAULT_DATA, documents
from slimlm.data.windows import choose_windows, refuse_unknown_tokens, sample_from_model, token_stream, windows_of
from slimlm.events import Event, Observer
from slimlm.models.lazy import LazyModel
from slimlm.models.opening import DenseModel
from slimlm.models.structure import context_length
from slimlm.storage.journal import OWN_TEXT, TEXT, Journal

_READ_AHEAD = 8
"""Calibration windows are drawn from up to this many times the text they need."""


@dataclass(frozen=True)
class Calibration:
    """Where the calibration text comes from and how much of it is used."""

    data: str = DEFAULT_DATA
    """a .txt, .jsonl or .parquet file or folder, a hub data set, "stdlib", or "self" (the model's own text)"""
    samples: int = 128
    length: int = 2048
    """tokens per window; at most the model's context"""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise DataError(
                f"samples = {self.samples}, length = {self.length}: calibration needs at least one window of two tokens"
            )


def kept_windows(
    dense: LazyModel, whole: DenseModel | None, wanted: Calibration, journal: Journal, progress: Observer
) -> Tensor:
    """The calibration windows `[count, length]`, kept in the journal.

    Text that the model wrote itself is taken from there; other text is read again, and must be the same.
    """
    if wanted.data == "self":
        kept = journal.noted_tensor(OWN_TEXT)
        if kept is None:
            assert whole is not None
            kept = own_text(whole, wanted, progress)
            journal.note_tensor(OWN_TEXT, kept)
        return kept
    windows = calibration_windows(dense, wanted)
    kept = journal.noted_tensor(TEXT)
    if kept is None:
        journal.note_tensor(TEXT, windows)
    elif not torch.equal(kept, windows):
        raise CheckpointError(
            f"the run in {journal.folder} was begun on other calibration text: {wanted.data} has changed since, or the "
            "tokenizer has. Bring it back to go on, or give `restart=True` to begin anew"
        )
    return windows


def own_text(dense: DenseModel, wanted: Calibration, progress: Observer) -> Tensor:
    """Windows `[count, length]` that the model writes itself."""
    start = None if dense.tokenizer is None else dense.tokenizer.bos_token_id
    length = min(wanted.length, context_length(dense.model) or wanted.length)
    pieces = []
    for piece in sample_from_model(dense.model, samples=wanted.samples, length=length, seed=wanted.seed, start=start):
        pieces.append(piece)
        progress(Event("sample text", sum(map(len, pieces)), wanted.samples))
    return torch.cat(pieces)


@profiled("read text")
def calibration_windows(dense: LazyModel, wanted: Calibration) -> Tensor:
    """Token windows `[count, length]` of a text to calibrate on; raises DataError for tokens that the model does not have."""
    if dense.tokenizer is None:
        raise DataError(f"{dense.source} has no tokenizer, so text cannot be read; add its files, or calibrate on 'self'")
    length = min(wanted.length, context_length(dense.model) or wanted.length)
    texts = documents(wanted.data, "calibration")
    tokens = token_stream(dense.tokenizer, texts, at_most=_READ_AHEAD * wanted.samples * length)
    chosen = choose_windows(windows_of(tokens, length, source=wanted.data), wanted.samples, wanted.seed)
    refuse_unknown_tokens(chosen, dense.model, dense.tokenizer)
    return chosen
