"""The calibration samples of a run: drawn from a text, or written by the model itself, and stored in the journal."""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from slimlm.core.errors import CheckpointError, DataError
from slimlm.core.profiling import profiled
from slimlm.data.documents import label_of, name_of
from slimlm.data.mixture import Data, Portion, each_at_least_once, interleaved, most_samples, portions_of
from slimlm.data.rows import Chat, Reading
from slimlm.data.windows import (
    chat_template_of,
    choose_windows,
    refuse_unknown_tokens,
    sample_from_model,
    tokens_of,
    windows_of,
)
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

    data: Data
    """A .txt, .jsonl or .parquet file or folder, a hub data set, "stdlib", "self" (text that the model writes), or texts; or
    several of them, each with a share of the samples."""
    samples: int
    """The number of samples."""
    length: int
    """Tokens per sample, at most the model's context."""
    seed: int = 0
    """The seed by which samples are drawn."""
    chat: Chat = "auto"
    """What the tokenizer's chat template is applied to."""

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise DataError(
                f"samples = {self.samples}, length = {self.length}: calibration needs at least one sample of two tokens"
            )

    @property
    def portions(self) -> tuple[Portion, ...]:
        """The sources and their shares."""
        return portions_of(self.data)

    @property
    def shares(self) -> list[float]:
        """The share of each source."""
        return [portion.share for portion in self.portions]

    @cached_property
    def order(self) -> list[int]:
        """For each sample the number of the source that it is drawn from."""
        return interleaved(self.shares, self.samples)

    def refuse_empty_shares(self) -> None:
        """Raise DataError where there are so few samples that a source gives none."""
        for number, portion in enumerate(self.portions):
            if number not in self.order:
                raise DataError(
                    f"`samples={self.samples}`: the share of {label_of(portion.source)} ({portion.share:g}) is less than one "
                    f"sample; give at least {math.ceil(1 / portion.share)} samples, or leave that text out"
                )


@dataclass(frozen=True)
class Drawn:
    """Token ids drawn from a text."""

    samples: Tensor
    """The calibration samples, `[count, length]`."""
    held_back: Tensor | None
    """Windows of the same text that share no token with the samples, `[count, length]`; None: there are no more."""

    @classmethod
    def of(cls, windows: Tensor, samples: int, held_back: int | None = None) -> "Drawn":
        """The first of these windows `[count, length]` as samples; of those after them as many tokens as are held back.

        Args:
            windows: The windows of a text.
            samples: How many are samples.
            held_back: The most windows of at most 512 tokens that are held back; None: as many as all text together has.
        """
        length, most = held_back_windows(windows.shape[1])
        whole = windows.shape[1] // length * length
        rest = windows[samples:, :whole].reshape(-1, length)[: most if held_back is None else held_back]
        return cls(windows[:samples], rest if len(rest) else None)


def held_back_windows(length: int) -> tuple[int, int]:
    """The tokens of each window that is held back, and how many are, where samples have `length` tokens."""
    own = min(length, _HELD_BACK_LENGTH)
    return own, max(1, HELD_BACK_TOKENS // own)


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
            f"the run in {journal.folder} was begun on other calibration text: {_changed(stored, drawn.samples, wanted)} "
            "changed since, or the tokenizer has. Bring it back to resume the run, or give `restart=True` to begin again"
        )
    if drawn.held_back is None:
        return drawn
    if (held_back := journal.noted_tensor(HELD_BACK)) is None:
        journal.note_tensor(HELD_BACK, held_back := drawn.held_back)
    return Drawn(drawn.samples, held_back)


def _changed(before: Tensor, now: Tensor, wanted: Calibration) -> str:
    """The sources whose samples are no longer the same, as the subject of a sentence."""
    same = before.shape == now.shape
    changed = {source for i, source in enumerate(wanted.order[: len(now)]) if not same or not torch.equal(before[i], now[i])}
    names = " and ".join(label_of(wanted.portions[source].source) for source in sorted(changed))
    return f"{names} {'has' if len(changed) == 1 else 'have'}"


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
    """Samples drawn from a text, or from several by their shares, and windows held back.

    Raises:
        DataError: A text cannot be read or is too short, or has tokens that the model does not have.
    """
    if dense.tokenizer is None:
        raise DataError(f"{dense.source} has no tokenizer, so text cannot be read; add its files, or calibrate on 'self'")
    length = min(wanted.length, context_length(dense.model) or wanted.length)
    template = chat_template_of(dense.tokenizer)
    held_back = each_at_least_once(wanted.shares, held_back_windows(length)[1])
    parts, conversations = [], 0
    for number, portion in enumerate(wanted.portions):
        reading, count = Reading(template, wanted.chat), wanted.order.count(number)
        ahead = _READ_AHEAD * count * length
        tokens = tokens_of(dense.tokenizer, portion.source, "calibration", at_most=ahead, notify=notify, reading=reading)
        windows = windows_of(tokens, length, source=label_of(portion.source))
        chosen = choose_windows(windows, count + HELD_BACK_TOKENS, wanted.seed)
        parts.append(Drawn.of(chosen, count, held_back[number]))
        conversations += reading.conversations
    drawn = parts[0] if len(parts) == 1 else _together(parts, wanted)
    without = [label_of(own.source) for own, part in zip(wanted.portions, parts, strict=True) if part.held_back is None]
    if without and drawn.held_back is not None:
        notify(
            f"nothing of {', '.join(without)} is held back; the comparison at the end is on the rest of the calibration text"
        )
    for own in (drawn.samples, drawn.held_back):
        if own is not None:
            refuse_unknown_tokens(own, dense.model, dense.tokenizer)
    if wanted.chat == "auto" and template is not None and not conversations:
        notify(
            "the model's tokenizer has a chat template, and the calibration text holds no conversations: where the model will "
            'be used in chats, rows with `messages` (or `chat="yes"`) are more like what it will see'
        )
    return drawn


def _refuse_short(parts: list[Drawn], wanted: Calibration) -> None:
    """Raise DataError where a source has too few samples for its share."""
    for number, (portion, part) in enumerate(zip(wanted.portions, parts, strict=True)):
        asked, (found, length) = wanted.order.count(number), part.samples.shape
        if found < asked:
            most = most_samples(wanted.shares, [len(part.samples) for part in parts])
            fewer = f", or at most {most} `samples`" if most * min(wanted.shares) >= 1 else ""
            raise DataError(
                f"{label_of(portion.source)} gives {found} samples of {length} tokens, and its share of {portion.share:g} of "
                f"{wanted.samples} samples is {asked}; give more of this text, a smaller share{fewer}"
            )


def _together(parts: list[Drawn], wanted: Calibration) -> Drawn:
    """The samples of several sources, interleaved by their shares, and the windows of all that are held back."""
    _refuse_short(parts, wanted)
    samples = torch.cat([part.samples for part in parts])
    placed = torch.empty_like(samples)
    # The places of the first source's samples, then those of the second's.
    placed[torch.tensor(wanted.order).argsort(stable=True)] = samples
    held_back = [part.held_back for part in parts if part.held_back is not None]
    return Drawn(placed, torch.cat(held_back) if held_back else None)


def sources_of(samples: Tensor, wanted: Calibration) -> list[dict[str, Any]]:
    """The sources of calibration samples `[count, length]` as a record describes them, each with a checksum of its samples."""
    order = torch.tensor(wanted.order[: len(samples)])
    found = []
    for number, portion in enumerate(wanted.portions):
        own = samples[order == number]
        checksum = hashlib.sha256(own.numpy().tobytes()).hexdigest()
        found.append({"data": name_of(portion.source), "share": portion.share, "samples": len(own), "sha256": checksum})
    return found
