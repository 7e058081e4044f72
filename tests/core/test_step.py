"""What steps declare, and that nobody asks them for more. Common to all methods, which join by existing."""

import ast
import dataclasses
from pathlib import Path

import pytest
import torch

import slimlm
from slimlm.core import registry
from slimlm.core.layer import Layer
from slimlm.core.solvers.low_rank import AdapterFormat
from slimlm.core.statistics.base import Needs, Stats
from slimlm.core.step import Step, StepDefaults, widths_around
from tests.methods.conftest import inputs, layer_of, stats_of

SOURCE = Path(slimlm.__file__).parent
METHODS = [(kind, name) for kind in registry.KINDS for name in registry.names(kind)]
every_method = pytest.mark.parametrize(("kind", "name"), METHODS, ids=[name for _, name in METHODS])


@every_method
def test_what_a_method_declares_is_what_it_does(kind: str, name: str) -> None:
    step = registry.find(kind, name)().brief()
    stats, layer = stats_of(inputs(36)), layer_of(16, 36)
    # A compensator after something to approximate.
    layer = registry.find("quantize", "absmax")()(layer, stats) if kind == "compensate" else layer
    after = step(layer, stats)
    assert (after.mask is not None) == (step.sparsity is not None)
    assert (after.adapter is not None) == (step.adapter is not None and step.adapter.rank_of(layer.shape) > 0)
    assert (after.updated_weight is not None) == step.moves_weights


@every_method
def test_a_trial_is_of_the_same_kind_and_needs_no_original_model(kind: str, name: str) -> None:
    step = registry.find(kind, name)()
    brief = step.brief()
    assert type(brief) is type(step)
    assert brief.brief() == brief and brief.needs <= step.needs
    assert (brief.sparsity, brief.adapter, brief.moves_weights) == (step.sparsity, step.adapter, step.moves_weights)
    assert not any(statistic.source.compares for statistic in brief.needs)


@every_method
def test_another_rank_is_the_same_step_but_for_its_adapter(kind: str, name: str) -> None:
    step = registry.find(kind, name)()
    other = step.with_rank(0.25)
    if step.adapter is None:
        assert other == step
    else:
        assert other.adapter == dataclasses.replace(step.adapter, rank=0.25) and other.with_rank(step.adapter.rank) == step


@every_method
@pytest.mark.parametrize("bits", [2.5, 4.0, 6.0])
def test_the_options_of_a_step_are_steps_of_its_kind(kind: str, name: str, bits: float) -> None:
    step = registry.find(kind, name)()
    for objective in ("size", "speed"):
        options = step.options(bits, objective)  # type: ignore[arg-type]
        assert len(set(options)) == len(options)
        for option in options:
            assert type(option) is type(step) and not option.needs_plan
    assert step.resolved() == step and not step.needs_plan and step.options(None, "size") == ()


def test_what_is_left_to_a_plan_is_offered_and_resolved_within_its_cost() -> None:
    step = registry.find("joint", "alternation")(rank="auto")  # type: ignore[call-arg]
    assert step.needs_plan and not step.resolved().needs_plan
    assert step.adapter == step.resolved().adapter == AdapterFormat(0.1, 4, 128, True)
    offered = step.options(None, "size")
    assert step.resolved() in offered and not any(option.needs_plan for option in offered)


@dataclasses.dataclass(frozen=True)
class _Simple(StepDefaults):
    """The least that a step has to say."""

    needs: Needs = dataclasses.field(default=frozenset(), init=False)

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        return layer


def test_a_simple_step_says_what_it_needs_and_no_more() -> None:
    step: Step = _Simple()
    assert (step.sparsity, step.adapter, step.moves_weights, step.may_fit_codebook, step.needs_plan) == (
        None,
        None,
        False,
        False,
        False,
    )
    assert step.brief() is step.resolved() is step.with_rank(0.3) is step
    assert step.options(4.0, "size") == ()
    layer = Layer.of("a", torch.ones(2, 2))
    assert step(layer, Stats(0)) is layer


@pytest.mark.parametrize("bits", [1.5, 2.0, 3.0, 4.0, 5.5, 8.5])
def test_widths_lie_on_both_sides_of_a_budget_where_there_are_some(bits: float) -> None:
    widths = widths_around(bits)
    assert min(widths) <= max(2.0, bits) and (max(widths) >= bits or widths[-1] == 8)
    assert len(widths) >= 2 or widths == [8]  # nothing is wider


# Reading the source


def trees(*rooms: str) -> list[tuple[str, ast.Module]]:
    """The parsed files of these folders and files of the package."""
    files = [file for room in rooms for file in ([SOURCE / room] if room.endswith(".py") else (SOURCE / room).rglob("*.py"))]
    return [(str(file.relative_to(SOURCE)), ast.parse(file.read_text())) for file in files]


def of_a_step(node: ast.expr) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr == "step") or (isinstance(node, ast.Name) and node.id == "step")


def test_no_step_is_asked_for_an_attribute_by_name() -> None:
    found = [
        f"{file}:{node.lineno}"
        for file, tree in trees(".")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr", "setattr")
        and of_a_step(node.args[0])
    ]
    assert found == []


SHARED = (
    "core",
    "calibration",
    "planner",
    "preflight",
    "run",
    "tuning",
    "storage",
    "models",
    "recipe.py",
    "record.py",
    "pipeline.py",
)


def test_shared_code_names_no_method() -> None:
    """Neither as a value (`method == "alternation"`) nor by importing it; recipes, which may be called like methods, are named
    in sentences alone. The readers of models name formats of files, of which some are called like methods."""
    names = {name for _, name in METHODS}
    formats = {"models/gptq.py", "models/dequantize.py"}
    found = [
        f"{file}:{node.lineno}"
        for file, tree in trees(*SHARED)
        for node in ast.walk(tree)
        if (isinstance(node, ast.Constant) and node.value in names and str(file) not in formats)
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("slimlm.methods"))
    ]
    assert found == []


def test_calibration_names_no_statistic() -> None:
    names = {statistic.__name__ for statistic in registry.statistics()}
    found = [
        f"{file}:{node.lineno}"
        for file, tree in trees("calibration", "planner")
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id in names
    ]
    assert found == []
