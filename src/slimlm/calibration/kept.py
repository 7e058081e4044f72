"""Passes of a block that keep what later passes would compute again, within a limit of memory.

Where the layers of a block are compressed stage by stage, the block is run for every stage until the stage's inputs are
computed, and once more for its output. `KeptOutputs` keeps what the block's modules gave, as long as it cannot change:
everything that a pass computes before it first calls a layer that is yet to be compressed depends on finished layers alone, so
it is the same in every later pass. Of modules within one another the outermost is kept. `KeptOriginal` runs the original
block, of which nothing changes, once per batch, and keeps the inputs of its layers and its output.

A call is replayed only where that cannot be told from calling the module again. A module that is given or gives anything
other than tensors, plain values and tuples of them, that writes to its arguments, or whose attributes change while it runs (a
cache, a state that another module reads) is called again in every pass; so is one whose output is written to later. Blocks are
in evaluation mode and draw no random numbers.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from slimlm.calibration.calls import PLAIN_TYPES, hidden_of
from slimlm.calibration.capture import BlockRun, EachPass, Passes, captured, forward

Place = tuple[str, int]
"""A call of a module within a pass: the module's name within the block, and how many calls of it come before."""


@dataclass
class Room:
    """The memory that kept tensors may take."""

    limit: int | None
    """The most bytes; None: there is no limit."""
    when_full: Callable[[], None] = lambda: None
    """Called the first time that something does not fit."""
    used: int = 0
    """Bytes that are taken."""
    refused: bool = field(default=False, init=False)
    """Whether anything did not fit."""

    def take(self, size: int) -> bool:
        """Take so many bytes, unless they do not fit."""
        if self.limit is not None and self.used + size > self.limit:
            if not self.refused:
                self.refused = True
                self.when_full()
            return False
        self.used += size
        return True


@dataclass(frozen=True)
class _Kept:
    """What a call gave."""

    output: Any
    """A tensor, a plain value, or a tuple of them."""
    versions: list[int]
    """How often each tensor of it had been written to."""
    calls: Counter[str]
    """How often each module was called meanwhile, itself included."""
    bytes: int
    """The memory that it holds."""

    @property
    def written_to(self) -> bool:
        """Whether a tensor of the output was written to since."""
        return _versions(_tensors_of(self.output) or []) != self.versions


class KeptOutputs(Passes):
    """The passes of a block while its layers are compressed: calls that cannot change any more are replayed."""

    def __init__(self, layers: Iterable[str], room: Room) -> None:
        """Keep nothing yet.

        Args:
            layers: The layers that are to be compressed, by their names within the block.
            room: The memory for what is kept.
        """
        self._layers = frozenset(layers)
        self._open = set(self._layers)
        self._room = room
        self._held: dict[int, dict[Place, _Kept]] = {}
        self._excluded: set[str] = set()

    def inputs_of(self, block_run: BlockRun, batch: int, hidden: Tensor, linears: dict[str, nn.Module]) -> dict[str, Tensor]:
        with self._replaying(block_run.block, batch):
            return captured(block_run, batch, hidden, linears)

    def output(self, block_run: BlockRun, batch: int, hidden: Tensor) -> Tensor:
        with self._replaying(block_run.block, batch):
            found = hidden_of(forward(block_run, batch, hidden))
        if not self._open:
            self._drop(batch, list(self._held.get(batch, {})))
        return found

    def finished(self, layers: Iterable[str]) -> None:
        self._open.difference_update(layers)

    def forget(self) -> None:
        for batch, held in self._held.items():
            self._drop(batch, list(held))

    @contextmanager
    def _replaying(self, block: nn.Module, batch: int) -> Iterator[None]:
        """Within this context, in which the block is run once, calls are replayed and kept."""
        held = self._held.setdefault(batch, {})
        this = _Pass(self, batch, held, frozenset(id(block.get_submodule(layer)) for layer in self._layers))
        instead: dict[nn.Module, Callable[..., Any]] = {}
        for name, module in block.named_modules():
            if name in self._open:
                instead[module] = this.reaching(module.forward)
            elif name and self._takes_long(name, module):
                instead[module] = this.replaying(name, module)
        with _calling(instead):
            yield
        written = [place for place, kept in held.items() if kept.written_to]
        self._excluded.update(name for name, _ in written)
        self._drop(batch, written)

    def _takes_long(self, name: str, module: nn.Module) -> bool:
        """Whether a module has a matrix, packed or not; what others compute takes about as long as reading what they gave."""
        return _has_matrix(module) or any(f"{layer}.".startswith(f"{name}.") for layer in self._layers)

    def keeps(self, name: str) -> bool:
        """Whether outputs of this module may be kept: there will be another pass, and it has not been found unsafe."""
        return bool(self._open) and name not in self._excluded

    def keep(self, batch: int, place: Place, kept: _Kept, before: Counter[str]) -> None:
        """Keep what a call gave, in place of what calls within it gave, if it fits.

        Args:
            batch: The number of the batch.
            place: The call.
            kept: What it gave.
            before: How often each module had been called before it.
        """
        held = self._held[batch]
        inner = [(name, before[name] + i) for name, count in kept.calls.items() for i in range(count)]
        replaced = {each: held[each] for each in inner if each in held}
        self._drop(batch, list(replaced))
        if self._room.take(kept.bytes):
            held[place] = kept
            return
        held.update(replaced)
        self._room.used += sum(each.bytes for each in replaced.values())

    def _drop(self, batch: int, places: Iterable[Place]) -> None:
        for place in places:
            self._room.used -= self._held[batch].pop(place).bytes


@dataclass
class _Pass:
    """One forward pass of a block."""

    owner: KeptOutputs
    """Keeps outputs."""
    batch: int
    """The number of the batch."""
    held: dict[Place, _Kept]
    """What earlier passes of the batch kept."""
    layers: frozenset[int]
    """The ids of the modules that stand for the layers; slimlm's own select their kernels when they first multiply."""
    calls: Counter[str] = field(default_factory=Counter)
    """How often each module has been called in this pass."""
    reached: bool = False
    """Whether a layer that is yet to be compressed has been called."""

    def reaching(self, given: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a layer that is yet to be compressed: nothing that is computed from here on is kept."""

        def instead(*args: Any, **kwargs: Any) -> Any:
            self.reached = True
            return given(*args, **kwargs)

        return instead

    def replaying(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """The forward of a module whose calls are replayed where they are kept, and kept where that is safe."""
        given = module.forward

        def instead(*args: Any, **kwargs: Any) -> Any:
            place = name, self.calls[name]
            if (kept := self.held.get(place)) is not None:
                self.calls.update(kept.calls)
                return kept.output
            before = Counter(self.calls)
            self.calls[name] += 1
            arguments = None if self.reached or not self.owner.keeps(name) else _tensors_of((*args, *kwargs.values()))
            if arguments is None:
                return given(*args, **kwargs)
            versions, state = _versions(arguments), _state_of(module, self.layers)
            output = given(*args, **kwargs)
            found = _tensors_of(output)
            # Compared last and first, because all modules of a block together have thousands of attributes.
            same = not self.reached and found is not None and _versions(arguments) == versions
            if same and found is not None and _is_same(state, _state_of(module, self.layers)):
                kept = _Kept(output, _versions(found), self.calls - before, _bytes_of(found))
                self.owner.keep(self.batch, place, kept, before)
            return output

        return instead


class KeptOriginal(Passes):
    """The passes of the original block: once per batch, as far as there is room for what later passes need."""

    def __init__(self, layers: Iterable[str], room: Room, *, measured: bool) -> None:
        """Keep nothing yet.

        Args:
            layers: The layers that are to be compressed, by their names within the block.
            room: The memory for what is kept.
            measured: Whether these layers' inputs are measured, or the block's output alone.
        """
        self._open = set(layers)
        self._measured = measured
        self._room = room
        self._each = EachPass()
        self._inputs: dict[int, dict[str, Tensor]] = {}
        self._outputs: dict[int, Tensor] = {}
        self._fits = True

    def inputs_of(self, block_run: BlockRun, batch: int, hidden: Tensor, linears: dict[str, nn.Module]) -> dict[str, Tensor]:
        if batch not in self._inputs and self._measured and self._fits:
            self._run(block_run, batch, hidden)
        if (held := self._inputs.get(batch)) is not None:
            return {layer: x for layer, x in held.items() if layer in linears}
        return self._each.inputs_of(block_run, batch, hidden, linears)

    def output(self, block_run: BlockRun, batch: int, hidden: Tensor) -> Tensor:
        if (held := self._outputs.get(batch)) is not None:
            return held
        found = self._each.output(block_run, batch, hidden)
        if self._open and self._room.take(_bytes_of([found])):
            self._outputs[batch] = found
        return found

    def finished(self, layers: Iterable[str]) -> None:
        self._open.difference_update(layers)
        for batch, held in self._inputs.items():
            rest = {layer: x for layer, x in held.items() if layer in self._open}
            self._room.used -= _bytes_of(held.values()) - _bytes_of(rest.values())
            self._inputs[batch] = rest

    def forget(self) -> None:
        self._room.used -= sum(_bytes_of(held.values()) for held in self._inputs.values())
        self._room.used -= sum(_bytes_of([output]) for output in self._outputs.values())
        self._inputs, self._outputs = {}, {}

    def _run(self, block_run: BlockRun, batch: int, hidden: Tensor) -> None:
        """Run the whole block and keep the inputs of all open layers, and its output, if they fit and it is safe.

        It is not where a layer is called twice, or its input is written to after the call: a pass that ends when the inputs of
        one stage are captured would find others.
        """
        seen: dict[str, Tensor] = {}
        versions: dict[str, int] = {}
        again = False

        def hook_for(layer: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                nonlocal again
                again |= layer in seen
                seen[layer], versions[layer] = args[0], args[0]._version

            return hook

        handles = [block_run.block.get_submodule(layer).register_forward_pre_hook(hook_for(layer)) for layer in self._open]
        try:
            output = hidden_of(forward(block_run, batch, hidden))
        finally:
            for handle in handles:
                handle.remove()
        written = any(x._version != versions[layer] for layer, x in seen.items())
        size = _bytes_of(seen.values()) + _bytes_of([output])
        self._fits = not again and not written and self._room.take(size)
        if self._fits:
            self._inputs[batch], self._outputs[batch] = seen, output


@contextmanager
def _calling(instead: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within this context these modules' forwards are other functions; their hooks still run."""
    former = {module: vars(module)["forward"] for module in instead if "forward" in vars(module)}
    for module, function in instead.items():
        # An attribute of the object comes before the method of its class.
        vars(module)["forward"] = function
    try:
        yield
    finally:
        for module in instead:
            del vars(module)["forward"]
            if module in former:
                vars(module)["forward"] = former[module]


def _has_matrix(module: nn.Module) -> bool:
    return any(tensor.ndim > 1 for own in (module.parameters(), module.buffers()) for tensor in own)


def _tensors_of(value: Any) -> list[Tensor] | None:
    """The tensors in a value; None where it holds anything but tensors, plain values and tuples of them."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else [value]
    if isinstance(value, tuple):
        found = [_tensors_of(each) for each in value]
        return None if any(each is None for each in found) else [tensor for each in found for tensor in each or []]
    return [] if value is None or isinstance(value, PLAIN_TYPES) else None


def _versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often each tensor of any shape `[...]`, or one that shares its memory, has been written to."""
    return [tensor._version for tensor in tensors]


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    """The memory that tensors of any shape `[...]` hold, shared memory counted once."""
    return sum({(own := tensor.untyped_storage()).data_ptr(): own.nbytes() for tensor in tensors}.values())


def _state_of(module: nn.Module, apart: frozenset[int]) -> list[Any]:
    """All that the attributes of a module and of those within it refer to, but for the modules with these ids."""
    found: list[Any] = []
    for own in module.modules():
        if id(own) not in apart:
            for key, value in vars(own).items():
                found += (key, value, *_items_of(value))
    return found


def _items_of(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor):
        yield -1 if value.is_inference() else value._version
    elif isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield each
            yield from _items_of(each) if isinstance(each, Tensor) else ()
    elif isinstance(value, list | tuple | set):
        yield from value


def _is_same(one: list[Any], other: list[Any]) -> bool:
    """Whether two states refer to the same objects; whole numbers and names may be equal copies."""
    return len(one) == len(other) and all(
        ours is theirs or (isinstance(ours, int | str) and type(ours) is type(theirs) and ours == theirs)
        for ours, theirs in zip(one, other, strict=True)
    )
