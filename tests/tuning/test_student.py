"""The model that is tuned: its gradients are those of the whole model, and its stored form is what is measured."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from slimlm.calibration.backward import in_memory
from slimlm.core.parts.trainable import EVERYTHING, Trains
from slimlm.evaluation.stored_model import stored_checkpoint
from slimlm.inference.load import read_description
from slimlm.storage import checkpoint
from slimlm.storage.mapping import MappedFiles
from slimlm.tuning.entrance import Entrance, last_hidden
from slimlm.tuning.losses import Objective
from slimlm.tuning.optimization import Optimization
from slimlm.tuning.student import Student
from slimlm.tuning.tuner import Loss, Tuner, tuners
from slimlm.tuning.windows import Windows
from tests.conftest import VOCABULARY

CPU = torch.device("cpu")
TOKENS = torch.randint(VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))
EXACT = Trains.SCALES | Trains.NORMS | Trains.BIASES
"""Values whose rounding is nowhere in the forward pass, so that differences are those of a smooth function."""


def student_of(folder: Path, trains: Trains, *, keep_blocks: bool = False) -> Student:
    files = MappedFiles.of(checkpoint.check_files(folder))
    return Student(stored_checkpoint(folder, files, read_description(folder)), trains, CPU, keep_blocks=keep_blocks)


def loss_and_gradients(student: Student, entrance: Entrance, theirs: Tensor, loss: Loss) -> float:
    """The mean loss; its gradients are those of the parameters."""
    inputs = entrance.inputs(TOKENS, 40)
    kept = entrance.chain(inputs, student.block).forward(inputs.hidden)
    head = entrance.stored.head(entrance.calls.forms)
    objective = Objective(loss, head, head, VOCABULARY)
    total, gradients = 0.0, []
    for own, hidden, original in zip(inputs.arguments.batches, kept.outputs, theirs.split(2), strict=True):
        found = objective.gradient(own, hidden, original, 1 / TOKENS[:, 1:].numel())
        total += found.loss
        gradients.append(found.gradient)
    for _ in kept.reverse(gradients):
        pass
    return total


@pytest.mark.parametrize("loss", [Loss(divergence=1.0), Loss(next_token=1.0), Loss(divergence=0.5, next_token=0.3)])
def test_gradients_are_the_finite_differences_of_the_whole_chain(packed: Path, loss: Loss) -> None:  # law 26
    student = student_of(packed, EXACT, keep_blocks=True)
    entrance = Entrance.of(student.stored, CPU)
    hidden = torch.cat(list(last_hidden(entrance, TOKENS, 40, in_memory)))
    theirs = hidden + 0.3 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)) * hidden.std()
    loss_and_gradients(student, entrance, theirs, loss)
    names = list(student.parameters)
    # Cloned, because the gradients of later calls are added to them.
    gradients = {name: gradient.clone() for name in names if (gradient := student.parameters[name].grad) is not None}
    assert len(names) > 20 and list(gradients) == names
    for name in names[:: len(names) // 8]:
        own, gradient = student.parameters[name], gradients[name]
        direction = gradient / gradient.norm()
        size = float(own.detach().norm()) / own.numel() ** 0.5 if own.numel() > 1 else 1.0
        slopes = []
        for step in (0.02 * size, 0.04 * size):
            values = []
            for sign in (1.0, -1.0):
                with torch.no_grad():
                    own.add_(sign * step * direction)
                values.append(loss_and_gradients(student, entrance, theirs, loss))
                with torch.no_grad():
                    own.sub_(sign * step * direction)
            slopes.append((values[0] - values[1]) / (2 * step))
        # The error of a central difference is that of the third derivative, which two of them cancel (Richardson).
        assert (4 * slopes[0] - slopes[1]) / 3 == pytest.approx(float(gradient.norm()), rel=0.02, abs=2e-5), name


def test_blocks_that_are_made_again_hold_the_same_parameters(packed: Path) -> None:
    student = student_of(packed, EVERYTHING & ~Trains.CODES)
    name = student.names[0]
    first, second = student.block(name), student.block(name)
    assert first is not second
    own = [(key, p) for key, p in first.named_parameters() if p.requires_grad]
    assert own and all(second.get_parameter(key) is p is student.parameters[f"{name}.{key}"] for key, p in own)


def test_a_student_that_was_not_moved_has_the_stored_tensors(packed: Path) -> None:  # law 27
    assert student_of(packed, EVERYTHING).changed() == {}


def test_what_moved_is_the_stored_form_of_what_moved(packed: Path) -> None:  # law 27
    student = student_of(packed, Trains.SCALES | Trains.NORMS)
    given = {name: tensor.clone() for name, tensor in student.stored.tensors.items()}
    moved = [name for name in student.parameters if name.startswith(f"{student.names[1]}.")]
    with torch.no_grad():
        for name in moved:
            student.parameters[name].mul_(1.25)
    changed = student.changed()
    assert changed and all(name.startswith(f"{student.names[1]}.") for name in changed)
    for name, tensor in changed.items():
        torch.testing.assert_close(tensor.float(), 1.25 * given[name].float(), rtol=2e-3, atol=0)
        assert tensor.dtype == given[name].dtype
    assert all(torch.equal(tensor, given[name]) for name, tensor in student.stored.tensors.items()), "files are not written to"


def test_the_rates_of_schedules_by_hand() -> None:
    tuner = Tuner(summary="", trains=Trains.SCALES, loss=Loss(next_token=1.0), rate=0.1, schedule="linear", warm_up=0.5)
    parameter = torch.nn.Parameter(torch.full((4,), 2.0))
    found = Optimization({"a": parameter}, tuner, steps=4)
    moved = []
    for done in range(4):
        before = parameter.detach().clone()
        parameter.grad = torch.ones(4)
        found.step(done)
        moved.append(float((before - parameter.detach()).mean()))
    # The first step of Adam is the rate itself, and so are later ones where the gradient is always the same: 0.1 x 2.
    assert moved == pytest.approx([0.0, 0.1, 0.2, 0.1], abs=1e-6)


def test_windows_are_used_once_before_any_is_again_and_depend_on_seed_and_step_alone() -> None:
    text = torch.arange(40 * 4).view(40, 4)
    windows = Windows.drawn(text, steps=20, batch=3, seed=5)
    held = {int(w[0]) for w in windows.held_back}
    assert len(held) == 5 and len(windows.train) == 35 and not held & {int(w[0]) for w in windows.train}
    numbers = [n for step in range(20) for n in windows.numbers(step)]
    assert sorted(numbers[:35]) == list(range(35)) and len(numbers) == 60 and len(set(numbers[35:])) == 25
    assert windows.numbers(13) == Windows.drawn(text, steps=20, batch=3, seed=5).numbers(13)
    assert not torch.equal(windows.train, Windows.drawn(text, steps=20, batch=3, seed=6).train)
    few = Windows.drawn(text, steps=2, batch=3, seed=5)
    assert len(few.train) == 6, "no more windows are kept than steps use"


def test_every_tuner_trains_something_towards_something() -> None:
    assert set(tuners()) == {"end_to_end", "peqa", "slim_peft", "slim_peft_paper"}
    for name, tuner in tuners().items():
        assert tuner.summary and tuner.trains and tuner.rate > 0, name
        assert tuner.loss.divergence + tuner.loss.next_token > 0, name
