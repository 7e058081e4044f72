"""The loop of all tuners: steps, checks of the stored form on windows that are held back, and a state that can be stored.

Every few steps all values are rounded to their stored form, and that is measured; the best one is the result. The given model
is the first of them, so that the result is never worse on these windows. The state after so many steps is all that the rest
depends on: a loop that is stopped and goes on from a stored state gives the same bytes.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from slimlm.calibration.backward import Hold
from slimlm.calibration.capture import batches_of
from slimlm.core.errors import NumericsError, first_line
from slimlm.evaluation.divergence import Predictions, divergence_of, mean_of, perplexity_from, predictions_of
from slimlm.evaluation.perplexity import pieces_of
from slimlm.evaluation.stored_model import Head, LastOutputs, LossGradient, StoredModel
from slimlm.events import Event, Notify, Observer, TuningProgress
from slimlm.models.structure import vocabulary_size
from slimlm.record import HeldBackLoss
from slimlm.tuning.entrance import Entrance
from slimlm.tuning.losses import Objective
from slimlm.tuning.optimization import Optimization
from slimlm.tuning.student import Student
from slimlm.tuning.tuner import Tuner
from slimlm.tuning.windows import Windows

AT_ONCE = 1024
"""The most tokens of a batch, unless a window has more; a step adds up the gradients of several."""
_CHECKS = 10
"""How many times the stored form is measured after the first step, the last time after the last one."""
_DIVERGED = 10.0
"""Tuning ends where the loss on the windows that are held back is this many times what it was at first."""
_BETWEEN_COMMITS = 30.0
"""Seconds between two times that the state is stored."""
_ARRAYS = 4
"""Arrays of logits that a measurement of two models holds at a time."""

Commit = Callable[[dict[str, Any], dict[str, Tensor]], None]
"""A function that stores plain data and tensors in place of those of before."""


@dataclass(frozen=True)
class Original:
    """The model that a compressed one was made of."""

    entrance: Entrance
    """The model."""
    hidden: Sequence[Tensor]
    """Its last block's outputs for each window, those to train on first, `[1, length, width]`."""

    @property
    def stored(self) -> StoredModel:
        """Its tensors."""
        return self.entrance.stored

    def of(self, numbers: Sequence[int]) -> Tensor:
        """The outputs for the windows of these numbers, `[windows, length, width]`."""
        return torch.cat([self.hidden[number] for number in numbers])


@dataclass(frozen=True)
class Task:
    """What is tuned, on what and how."""

    student: Student
    """The model that is tuned."""
    entrance: Entrance
    """The same up to its first block."""
    original: Original | None
    """The original; None: none was given."""
    windows: Windows
    """The text."""
    tuner: Tuner
    """What is trained and how fast."""
    steps: int
    """The number of steps."""
    hold: Hold
    """Keeps the outputs of a block."""

    def check_points(self) -> frozenset[int]:
        """The numbers of steps after which the stored form is measured."""
        return frozenset(round(self.steps * i / _CHECKS) for i in range(_CHECKS + 1)) | {0, self.steps}


@dataclass(frozen=True)
class Check:
    """A measurement of the stored form."""

    step: int
    """The number of steps before it."""
    held_back: HeldBackLoss
    """What was found."""


@dataclass(frozen=True)
class State:
    """What a loop has done, besides the values of parameters and optimizer."""

    done: int = 0
    """The number of steps."""
    checks: tuple[Check, ...] = ()
    """The measurements, in order."""
    best: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """The best stored form: the tensors that are not those of the given model, by full name."""
    best_step: int = 0
    """The number of steps before it."""
    diverged: str = ""
    """Why the loop ended early; empty: it did not."""

    @property
    def first(self) -> HeldBackLoss:
        """What was measured of the given model."""
        return self.checks[0].held_back

    @property
    def least(self) -> HeldBackLoss:
        """What was measured of the best form."""
        [found] = [check.held_back for check in self.checks if check.step == self.best_step]
        return found


class Loop:
    """The steps of one run."""

    def __init__(self, task: Task) -> None:
        """Make the optimizer; all is as at the beginning."""
        self.state = State()
        self._task = task
        self._optimization = Optimization(task.student.parameters, task.tuner, task.steps)
        self._objective = _objective(task)
        self._check_points = task.check_points()
        self._last_loss: float | None = None
        self._whole = True
        """Whether the parameters are those of `state.done` steps; they are not while the optimizer moves them."""

    def restore(self, plain: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from a state that was stored."""
        named = _by_kind(tensors)
        checks = TypeAdapter(tuple[Check, ...]).validate_python(plain["checks"])
        best = {name: tensor.clone() for name, tensor in named["best"].items()}
        self.state = State(plain["done"], checks, best, plain["best_step"], plain["diverged"])
        with torch.no_grad():
            for name, parameter in self._task.student.parameters.items():
                parameter.copy_(named["parameter"][name])
        self._optimization.restore(named["optimizer"])

    def stored(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The state as plain data and tensors."""
        state, student = self.state, self._task.student
        plain = {
            "done": state.done,
            "checks": [dataclasses.asdict(check) for check in state.checks],
            "best_step": state.best_step,
            "diverged": state.diverged,
        }
        kinds: dict[str, Mapping[str, Tensor]] = {
            "parameter": student.parameters,
            "optimizer": self._optimization.tensors(),
            "best": state.best,
        }
        return plain, {f"{kind}:{name}": tensor for kind, own in kinds.items() for name, tensor in own.items()}

    def run(self, commit: Commit, progress: Observer, notify: Notify) -> State:
        """All steps that are left.

        Args:
            commit: Stores the state: now and then, at the end, and where the loop is stopped.
            progress: Is given an event for each step.
            notify: Is told where the loop ends early.
        """
        committed = time.monotonic()
        try:
            for _ in self._run(notify):
                progress(Event("tune", self.state.done, self._task.steps, tuning=self._progress()))
                if time.monotonic() - committed > _BETWEEN_COMMITS:
                    commit(*self.stored())
                    committed = time.monotonic()
        except KeyboardInterrupt:
            if self._whole:
                commit(*self.stored())
            raise
        commit(*self.stored())
        return self.state

    def _progress(self) -> TuningProgress:
        windows, state = self._task.windows, self.state
        tokens = state.done * windows.batch * windows.train.shape[1]
        return TuningProgress(tokens, self._last_loss, state.first, state.least, state.checks[-1].held_back)

    def _run(self, notify: Notify) -> Iterator[None]:
        """One step after another, with the checks between them; a check that was made is not made again."""
        while True:
            checked = self.state.checks[-1].step if self.state.checks else -1
            if self.state.done in self._check_points and checked < self.state.done and not self.state.diverged:
                self._check()
            if self.state.diverged:
                notify(f"tuning ended after {self.state.done} of {self._task.steps} steps, because {self.state.diverged}")
                return
            yield
            if self.state.done >= self._task.steps:
                return
            self._step()

    def _check(self) -> None:
        """Measure the stored form, and keep it where it is the best one."""
        state, student = self.state, self._task.student
        changed = student.changed() if state.done else {}
        try:
            found = held_back_loss(student.with_changed(changed), self._task)
        except NumericsError as error:
            if not state.checks:
                raise
            self.state = dataclasses.replace(state, diverged=first_line(error))
            return
        state = dataclasses.replace(state, checks=(*state.checks, Check(state.done, found)))
        if state.done and found.loss < state.least.loss:
            state = dataclasses.replace(state, best=changed, best_step=state.done)
        if found.loss > _DIVERGED * state.first.loss:
            words = f"the loss on windows that are held back rose from {state.first.loss:.4g} to {found.loss:.4g}"
            state = dataclasses.replace(state, diverged=f"{words}; a smaller `rate` may work")
        self.state = state

    def _step(self) -> None:
        state = self.state
        try:
            self._last_loss = self._add_gradients()
        except NumericsError as error:
            self.state = dataclasses.replace(state, diverged=first_line(error))
            return
        self._whole = False
        self._optimization.step(state.done)
        self.state = dataclasses.replace(state, done=state.done + 1)
        self._whole = True

    def _add_gradients(self) -> float:
        """Give all parameters the gradient of the step's loss, its mean over the tokens that are predicted; gives the loss."""
        task = self._task
        numbers = task.windows.numbers(self.state.done)
        tokens = task.windows.train[numbers]
        inputs = task.entrance.inputs(tokens, AT_ONCE)
        kept = task.entrance.chain(inputs, task.student.block).forward(inputs.hidden, task.hold)
        found: list[LossGradient] = []
        begin = 0
        for own, hidden in zip(inputs.arguments.batches, kept.outputs, strict=True):
            original = None
            if task.original is not None and task.tuner.loss.needs_original:
                original = task.original.of(numbers[begin : begin + len(own)])
            found.append(self._objective.gradient(own, hidden, original, 1 / tokens[:, 1:].numel()))
            begin += len(own)
        for _ in kept.reverse([each.gradient for each in found]):
            pass
        return sum(each.loss for each in found)


def held_back_loss(model: StoredModel, task: Task) -> HeldBackLoss:
    """What a stored model gives on the windows that are held back.

    Raises:
        NumericsError: Its logits hold NaN.
    """
    windows, device, found = task.windows, task.entrance.device, []
    pieces_for = _ARRAYS * vocabulary_size(model.meta_model)
    number = len(windows.train)
    for batch in batches_of(windows.held_back):
        pieces = pieces_of(batch, pieces_for)
        logits = model.logits(model.outputs(batch, device), pieces, device=device)
        theirs = None
        if (original := task.original) is not None:
            hidden = original.of(range(number, number + len(batch)))
            before = LastOutputs(batch, hidden, original.entrance.calls.forms)
            theirs = original.stored.logits(before, pieces, device=device)
        found.append(predictions_of(logits, batch, pieces, theirs))
        number += len(batch)
    return _loss_of(Predictions.joined(found), task.tuner)


def _loss_of(found: Predictions, tuner: Tuner) -> HeldBackLoss:
    perplexity, divergence = perplexity_from(found.losses), divergence_of(found)
    loss = tuner.loss.next_token * mean_of(found.losses).value
    if tuner.loss.needs_original:
        assert divergence is not None
        loss += tuner.loss.divergence * divergence.mean.value
    return HeldBackLoss(loss, perplexity, divergence)


def _objective(task: Task) -> Objective:
    student, original = task.entrance, task.original
    theirs: Head | None = None
    if original is not None and task.tuner.loss.needs_original:
        theirs = original.stored.head(original.entrance.calls.forms, original.entrance.device)
    head = student.stored.head(student.calls.forms, student.device)
    return Objective(task.tuner.loss, head, theirs, vocabulary_size(student.stored.meta_model))


def _by_kind(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {"parameter": {}, "optimizer": {}, "best": {}}
    for full, tensor in tensors.items():
        kind, _, name = full.partition(":")
        found[kind][name] = tensor
    return found
