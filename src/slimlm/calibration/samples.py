"""The calibration samples of a run: drawn from a text, or written by the model itself, and stored in the journal."""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimlm.core.errors import CheckpointError, DataError
from slimlm.core.profiling import profiled
from slimlm.data.documents import DEFAULT_DATA, documents
from slimlm.data.windows import choose_windows, refuse_unknown_tokens, sample_from_model, token_stream, windows_of
from slimlm.events import Event, Observer
from slimlm.models.dense import DenseModel
from slimlm.models.lazy import LazyModel
from slimlm.models.structure import context_length
from slimlm.storage.journal import OWN_TEXT, TEXT, Journal

_READ_AHEAD = 8
"""Calibration samples are drawn from up to this many times the text they need."""


@dataclass(frozen=True)
class Calibration:
    """Where the calibration text comes from and how much of it is used."""

    data: str = DEFAULT_DATA
    """A .txt, .jsonl or .parquet file or folder, a hub data set, "stdlib", or "self" (text that the model writes)."""
    samples: int = 128
    """The number of samples."""
    length: int = 2048
    """Tokens per sample, at most the model's context."""
    seed: int = 0
    """The seed by which samples are drawn."""

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise DataError(
                f"samples = {self.samples}, length = {self.length}: calibration needs at least one sample of two tokens"
            )


def calibration_samples(
    dense: LazyModel, whole: DenseModel | None, wanted: Calibration, journal: Journal, progress: Observer
) -> Tensor:
    """The calibration samples of a run, stored in the journal.

    Samples that the model wrote itself are read from the journal where it has them; a text is read again, and must be the same.

    Args:
        dense: The original model.
        whole: The same model in memory; needed where it writes the samples itself and the journal has none.
        wanted: The text and how much of it is used.
        journal: The journal of the run.
        progress: An observer of the events.

    Returns:
        Token ids `[count, length]`.

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
        return stored
    samples = draw_samples(dense, wanted)
    stored = journal.noted_tensor(TEXT)
    if stored is None:
        journal.note_tensor(TEXT, samples)
    elif not torch.equal(stored, samples):
        raise CheckpointError(
            f"the run in {journal.folder} was begun on other calibration text: {wanted.data} has changed since, or the "
            "tokenizer has. Bring it back to resume the run, or give `restart=True` to begin again"
        )
    return samples


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
def draw_samples(dense: LazyModel, wanted: Calibration) -> Tensor:
    """Samples `[count, length]` drawn from a text; raises DataError for tokens that the model does not have."""
    if dense.tokenizer is None:
        raise DataError(f"{dense.source} has no tokenizer, so text cannot be read; add its files, or calibrate on 'self'")
    length = min(wanted.length, context_length(dense.model) or wanted.length)
    texts = documents(wanted.data, "calibration")
    tokens = token_stream(dense.tokenizer, texts, at_most=_READ_AHEAD * wanted.samples * length)
    chosen = choose_windows(windows_of(tokens, length, source=wanted.data), wanted.samples, wanted.seed)
    refuse_unknown_tokens(chosen, dense.model, dense.tokenizer)
    return chosen
