"""What the passes of a block keep for later ones: the same values, computed once, within a limit of memory."""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimlm
from slimlm.calibration.calls import BlockArguments
from slimlm.calibration.capture import BlockInputs, BlockRun, EachPass, Passes, enter, layer_inputs, run
from slimlm.calibration.kept import KeptOriginal, KeptOutputs, Room
from slimlm.calibration.stages import stages_of
from slimlm.models.structure import blocks_of, linears_of, swap, weight_of
from slimlm.run import block as run_block
from slimlm.run import prepare
from tests.conftest import random_model

CPU = torch.device("cpu")
FAMILIES = ["llama", "qwen3", "mistral-window", "opt", "gpt2", "mixtral"]


def smaller(linear: nn.Module) -> nn.Linear:
    """A layer as it could be after compression."""
    out, width = weight_of(linear).shape
    made = nn.Linear(width, out)
    made.weight.data, made.bias.data = 0.5 * weight_of(linear), torch.zeros(out)
    return made.requires_grad_(False)


def passes_of(block_run: BlockRun, stages: list[list[str]]) -> Iterator[dict[str, Tensor]]:
    """What a sequential compression sees: each stage's inputs when the stages before it are compressed, then the outputs."""
    block, linears = block_run.block, linears_of(block_run.block)
    for stage in stages:
        seen = [dict(found) for found in layer_inputs(block_run, {layer: linears[layer] for layer in stage})]
        yield {f"{batch} {layer}": x.clone() for batch, found in enumerate(seen) for layer, x in found.items()}
        for layer in stage:
            swap(block, layer, smaller(linears[layer]))
        block_run.passes.finished(stage)
    yield {str(batch): output for batch, output in enumerate(run(block_run))}


def same(block: nn.Module, flow: BlockInputs, name: str = "b", limit: int | None = None) -> Room:
    """Assert that passes which keep outputs see what passes that keep nothing see, bit for bit; gives the room they had."""
    stages = stages_of(BlockRun(block, name, flow, CPU), linears_of(block))
    room = Room(limit)
    kept = KeptOutputs(linears_of(block), room)
    twin = copy.deepcopy(block)
    expected = passes_of(BlockRun(twin, name, copy.deepcopy(flow), CPU), stages)
    for ours, theirs in zip(passes_of(BlockRun(block, name, flow, CPU, kept), stages), expected, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert room.used == 0  # nothing is kept after the outputs
    return room


def flow_of(family: str) -> tuple[nn.Module, str, BlockInputs]:
    model = random_model(family)
    blocks = blocks_of(model)
    name = next(iter(blocks))
    samples = torch.randint(256, (3, 32), generator=torch.Generator().manual_seed(0))
    return blocks[name], name, enter(model, blocks, samples, tokens_at_once=64)


@contextmanager
def counted(block: nn.Module) -> Iterator[Counter[str]]:
    """How often each module of a block is computed, by name; replays are not counted."""
    counts: Counter[str] = Counter()

    def counting(name: str, module: nn.Module) -> Any:
        given = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return given(*args, **kwargs)

        return forward

    modules = dict(block.named_modules())
    for name, module in modules.items():
        vars(module)["forward"] = counting(name, module)
    try:
        yield counts
    finally:
        for module in modules.values():
            del vars(module)["forward"]


@pytest.mark.parametrize("limit", [None, 0, 20_000], ids=["no limit", "no room", "little room"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_outputs_are_those_of_another_pass_bit_for_bit(family: str, limit: int | None) -> None:
    block, name, flow = flow_of(family)
    room = same(block, flow, name, limit)
    assert room.refused == (limit is not None)


def test_a_block_that_is_compressed_stage_by_stage_computes_each_layer_once_per_batch() -> None:
    block, name, flow = flow_of("llama")
    batches = len(flow.hidden)
    stages = stages_of(BlockRun(block, name, flow, CPU), linears_of(block))
    kept = KeptOutputs(linears_of(block), Room(None))
    calls: Counter[str] = Counter()
    real = nn.functional.linear
    with pytest.MonkeyPatch.context() as patch:

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            calls[str(tuple(weight.shape))] += 1
            return real(x, weight, bias)

        patch.setattr(nn.functional, "linear", linear)
        for _ in passes_of(BlockRun(block, name, flow, CPU, kept), stages):
            pass
    layers = Counter(str(tuple(weight_of(layer).shape)) for layer in linears_of(block).values())
    # Compressed ones only, but for those that are measured together and called before the last of them: q and k, gate.
    again = Counter(
        str(tuple(weight_of(linears_of(block)[layer]).shape))
        for layer in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")
    )
    assert calls == Counter({shape: batches * (count + again[shape]) for shape, count in layers.items()})


def test_the_attention_is_computed_until_its_output_is_kept_and_not_again() -> None:
    block, name, flow = flow_of("llama")
    batches = len(flow.hidden)
    stages = stages_of(BlockRun(block, name, flow, CPU), linears_of(block))
    for passes, expected in ((EachPass(), 5), (KeptOutputs(linears_of(block), Room(None)), 3)):
        twin = copy.deepcopy(block)
        with counted(twin) as counts:
            for _ in passes_of(BlockRun(twin, name, flow, CPU, passes), stages):
                pass
        # For q, k and v; for o, of which it computes the inputs; and for gate and up, from which on it is replayed.
        assert counts["self_attn"] == expected * batches


def test_the_original_block_is_run_once_per_batch() -> None:
    block, name, flow = flow_of("llama")
    linears = linears_of(block)
    stages = stages_of(BlockRun(block, name, flow, CPU), linears)
    room = Room(None)
    kept = BlockRun(block, name, flow, CPU, KeptOriginal(linears, room, measured=True))
    plain = BlockRun(block, name, flow, CPU)
    for stage in stages:
        own = {layer: linears[layer] for layer in stage}
        expected = list(layer_inputs(plain, own))
        with counted(block) as counts:
            found = list(layer_inputs(kept, own))
        assert counts[""] == (len(flow.hidden) if stage is stages[0] else 0)
        for ours, theirs in zip(found, expected, strict=True):
            assert list(ours) == list(theirs) and all(torch.equal(ours[layer], theirs[layer]) for layer in theirs)
            # Layers that share an input still do.
            assert len({id(x) for x in ours.values()}) == len({id(x) for x in theirs.values()})
        kept.passes.finished(stage)
    expected_outputs = list(run(plain))
    with counted(block) as counts:
        outputs = list(run(kept))
    assert not counts and all(map(torch.equal, outputs, expected_outputs))
    kept.passes.forget()
    assert room.used == 0


@pytest.mark.parametrize("limit", [0, 100_000])
def test_an_original_block_that_does_not_fit_is_run_again(limit: int) -> None:
    block, name, flow = flow_of("llama")
    linears, told = linears_of(block), list[str]()
    room = Room(limit, lambda: told.append("full"))
    kept = BlockRun(block, name, flow, CPU, KeptOriginal(linears, room, measured=True))
    plain = BlockRun(block, name, flow, CPU)
    for stage in stages_of(plain, linears):
        own = {layer: linears[layer] for layer in stage}
        for ours, theirs in zip(layer_inputs(kept, own), layer_inputs(plain, own), strict=True):
            assert list(ours) == list(theirs) and all(torch.equal(ours[layer], theirs[layer]) for layer in theirs)
        assert room.used <= limit
        kept.passes.finished(stage)
    assert all(map(torch.equal, run(kept), run(plain)))
    assert told == ["full"]
    kept.passes.forget()
    assert room.used == 0


# Modules that cannot be replayed


class Inner(nn.Module):
    """A layer, and something that a replay would leave out."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.how = how
        self.state: Any = None
        self.shared: list[Tensor] = []

    def forward(self, x: Tensor, notes: dict[str, Tensor] | None = None) -> Any:
        out = self.layer(x)
        if self.how == "writes to its argument":
            x.add_(out)
        if self.how == "sets an attribute":
            self.state = out.mean()
        if self.how == "appends to an attribute":
            self.shared.append(out.mean())
        if notes is not None:
            notes["seen"] = out.mean()
        return {"out": out} if self.how == "gives a dictionary" else out


class Unsafe(nn.Module):
    """A block of two layers in which the first module does something besides giving its output."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.last = how, Inner(how), nn.Linear(8, 8)
        self.middle = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.clone()
        notes: dict[str, Tensor] = {}
        found = self.first(x, notes) if self.how == "fills a dictionary that it is given" else self.first(x)
        out = found["out"] if isinstance(found, dict) else found
        out = out + sum(notes.values())
        if self.how == "sets an attribute":
            out = out + self.first.state
        if self.how == "appends to an attribute":
            out = out + self.first.shared.pop()
        if self.how == "its output is written to later":
            found.mul_(3)
            out = out + found
        if self.how == "is called twice":
            out = out + self.first(out)
        y = self.middle(out + x)
        if self.how == "is called after another layer":
            y = y + self.first.layer(y)
        return self.last(y)


@pytest.mark.parametrize(
    "how",
    [
        "nothing",
        "writes to its argument",
        "sets an attribute",
        "appends to an attribute",
        "fills a dictionary that it is given",
        "gives a dictionary",
        "its output is written to later",
        "is called twice",
        "is called after another layer",
    ],
)
def test_a_module_that_a_replay_would_change_is_called_again(how: str) -> None:
    torch.manual_seed(0)
    block = Unsafe(how).eval().requires_grad_(False)
    arguments = BlockArguments({("b", 2): ((None,), {})})
    same(block, BlockInputs([torch.randn(2, 5, 8), torch.randn(2, 5, 8)], arguments))
    assert not any("forward" in vars(module) for module in block.modules())


def test_a_layer_that_is_called_again_later_is_not_taken_for_its_first_call() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer = nn.Sequential(nn.Linear(8, 8))
            self.middle = nn.Linear(8, 8)

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.outer[0](self.middle(self.outer(hidden_states)))

    torch.manual_seed(0)
    block = Block().eval().requires_grad_(False)
    same(block, BlockInputs([torch.randn(2, 5, 8)], BlockArguments({("b", 2): ((None,), {})})))


# Whole runs


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


ONE_ROUND = {"joint": "alternation", "bits": 4, "group_size": 32, "pattern": "2:4", "rank": 0.1, "adapter_bits": 4}
RECIPES: dict[str, str | dict[str, Any]] = {
    "slim": "slim",
    "gptq": "gptq",
    # As `best-24`, in little time: one round, and of one block only.
    "best-24": {
        "name": "best-24",
        "summary": "best-24",
        "sequential": True,
        "ignore": ["model.layers.[!0].*"],
        "steps": [{**ONE_ROUND, "rounds": 1, "descent_rounds": 0}],
    },
}


# Slow: three compressions; the two that are not sequential keep little.
@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=() if name == "best-24" else pytest.mark.slow) for name in RECIPES]
)
def test_a_checkpoint_is_the_same_whatever_its_passes_keep(
    recipe: str, llama_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def made(name: str) -> dict[str, bytes]:
        options: dict[str, Any] = {"data": str(text_file), "samples": 4, "length": 48, "device": "cpu"}
        slimlm.compress(llama_folder, tmp_path / name, recipe=RECIPES[recipe], notify=told.append, **options)
        return weights(tmp_path / name)

    kept = made("kept")
    assert not any("in common" in words for words in told)
    room_of = prepare._room_of
    with monkeypatch.context() as patch:

        def no_room(*args: Any) -> Room:
            return Room(0, room_of(*args).when_full)

        patch.setattr(prepare, "_room_of", no_room)
        assert made("no-room") == kept
    assert sum("in common" in words for words in told) == (recipe == "best-24")

    def each(*_: object, **__: object) -> Passes:
        return EachPass()

    monkeypatch.setattr(run_block, "KeptOutputs", each)
    monkeypatch.setattr(run_block, "KeptOriginal", each)
    assert made("each") == kept
