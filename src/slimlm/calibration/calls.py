"""How a model calls its blocks: with which arguments, and what a block's output looks like.

A block is called with its hidden states and other arguments: masks, rotary tables, positions. `observe` runs a model on a few
tokens, and then again with its blocks skipped. Arguments that are the same in both passes do not depend on what blocks compute,
so they can be captured for any text without running a block. Those that differ between two texts (embeddings of the tokens
that every block is given) are captured again for each batch, and kept for one block at a time where they are small: a run that
is resumed needs nothing but its samples. A model whose blocks use what earlier ones compute in another way than
through the hidden states is refused.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from slimlm.core.errors import ModelError, NumericsError, first_line, is_out_of_memory
from slimlm.core.profiling import profiled

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""A block's positional and keyword arguments, the hidden states left out (None in their place)."""

_TRIAL_SAMPLES, _TRIAL_LENGTH = 2, 12
"""The samples, and the tokens of each, that a model is observed on."""
_SAME = 1e-4
"""The relative difference that two runs of a block on the same values may have: rounding in another order of addition."""
MOST_KEPT = 2**28
"""The most bytes of captured arguments that are kept while a block is worked on."""
PLAIN_TYPES = (bool, int, float, complex, str, torch.dtype, torch.device, slice)
"""Types of arguments that have no state."""
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError)
"""What the forward pass of a model raises where it does not work."""


@dataclass(frozen=True)
class OutputForm:
    """The form of a block's output: the hidden states alone, or a tuple or list that begins with them."""

    kind: type[tuple[Any, ...]] | type[list[Any]] | None
    """The type of the output; None: the hidden states alone."""
    length: int = 1
    """The number of values."""

    @classmethod
    def of(cls, output: Any) -> "OutputForm":
        """The form of an output; raises ModelError where slimlm does not find hidden states in it."""
        hidden_of(output)
        if isinstance(output, Tensor):
            return cls(None)
        return cls(list if isinstance(output, list) else tuple, len(output))

    def around(self, hidden: Tensor) -> Any:
        """An output of this form with these hidden states, `[samples, length, width]`, and None for all other values."""
        return hidden if self.kind is None else self.kind((hidden, *[None] * (self.length - 1)))


@dataclass(frozen=True)
class Calls:
    """How a model calls its blocks."""

    forms: dict[str, OutputForm]
    """The form of each block's output, by name and in order."""
    text_dependent: frozenset[str]
    """The blocks with arguments, other than hidden states, that depend on the text."""


@dataclass(frozen=True)
class Observed:
    """The result of running a model on a few tokens."""

    calls: Calls
    """How it calls its blocks."""
    tokens: Tensor
    """The tokens, `[samples, length]`."""
    hidden: Tensor
    """The last block's output for them, `[samples, length, width]`."""
    logits: Tensor | None
    """The model's logits, `[samples, length, vocabulary]`; None where it was not run to its end."""


@dataclass(frozen=True)
class BlockArguments:
    """The arguments of every block other than its hidden states."""

    shared: Mapping[tuple[str, int], Arguments]
    """Those that are the same for any text, by block name and number of samples in the batch."""
    batches: Sequence[Tensor] = ()
    """The token ids `[samples, length]` of every batch."""
    text_dependent: frozenset[str] = frozenset()
    """The blocks whose arguments depend on the text."""
    capture: Callable[[str, Tensor], Arguments] | None = None
    """Captures the arguments of a block for a batch of tokens; needed where some depend on the text."""
    kept: "KeptArguments" = field(default_factory=lambda: KeptArguments())
    """The captured arguments of the block that is worked on."""

    def holds_one(self, name: str) -> bool:
        """Whether the arguments of a block are known for a single sample."""
        return name not in self.text_dependent and (name, 1) in self.shared

    def of(self, name: str, batch: int, count: int) -> Arguments:
        """The arguments of a block for a batch, of which the number and the number of its samples are given."""
        if name not in self.text_dependent:
            return self.shared[name, count]
        assert self.capture is not None, "arguments that depend on the text are captured from it"
        tokens = self.batches[batch]
        assert len(tokens) == count, "the arguments of another batch"
        return self.kept.of(name, batch, partial(self.capture, name, tokens))


class KeptArguments:
    """The captured arguments of one block, kept for its further passes as far as they take at most `MOST_KEPT` bytes."""

    def __init__(self) -> None:
        self._block = ""
        self._held: dict[int, Arguments] = {}
        self._bytes = 0

    def of(self, name: str, batch: int, capture: Callable[[], Arguments]) -> Arguments:
        """The arguments of a block for the batch of this number, captured unless they are kept."""
        if name != self._block:
            self._block, self._held, self._bytes = name, {}, 0
        if batch not in self._held:
            found = capture()
            size = _bytes_of(found)
            if self._bytes + size > MOST_KEPT:
                return found
            self._held[batch], self._bytes = found, self._bytes + size
        return self._held[batch]


@dataclass(frozen=True)
class Call:
    """A call of a block."""

    hidden: Tensor
    """Its hidden states, `[samples, length, width]`."""
    arguments: Arguments
    """Its other arguments."""


class StopHereError(Exception):
    """Raised by a hook that has captured everything, so that the rest of the model is not run."""


def observe(
    model: nn.Module, blocks: dict[str, nn.Module], *, whole: bool = False, shown: Mapping[str, nn.Module] | None = None
) -> Observed:
    """Run a model on a few random tokens, and find out how it calls its blocks.

    Args:
        model: The model.
        blocks: Its blocks by full name, in order.
        whole: Whether the model is run to its end, for its logits.
        shown: Blocks of the same names whose `forward` names the arguments; None: these.

    Raises:
        NumericsError: A block's inputs or outputs hold NaN.
        ModelError: The model fails on plain text, computes something between two blocks, or its blocks use what earlier ones
            compute in another way than through the hidden states.
    """
    tokens, others = trial_tokens(model)
    calls, outputs, logits = _plain_pass(model, blocks, tokens, whole=whole)
    forms = {name: OutputForm.of(output) for name, output in outputs.items()}
    first, second = (_skipping_pass(model, blocks, forms, text) for text in (tokens, others))
    for name, block in (shown or blocks).items():
        if differing := list(_differences(calls[name].arguments, first[name], block)):
            skipping = Call(calls[name].hidden, first[name])
            _refuse_used(model, name, blocks[name], skipping, hidden_of(outputs[name]), differing)
    dependent = frozenset(name for name, block in blocks.items() if any(_differences(first[name], second[name], block)))
    last = hidden_of(outputs[next(reversed(blocks))])
    return Observed(Calls(forms, dependent), tokens, last, logits)


def trial_tokens(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Two texts of random tokens, int64 `[samples, length]`, without those that the config names (images, padding).

    The second has the end of a document within it, where the config names the token.
    """
    config = getattr(model, "config", None)
    text = config.get_text_config() if isinstance(config, PreTrainedConfig) else None
    vocabulary = int(getattr(text, "vocab_size", None) or 1)
    special = {token for own in (config, text) if own is not None for token in _named_tokens(own)}
    ordinary = torch.tensor([token for token in range(vocabulary) if token not in special] or [0])
    length = min(_TRIAL_LENGTH, int(getattr(text, "max_position_embeddings", None) or _TRIAL_LENGTH))
    drawn = torch.randint(len(ordinary), (2, _TRIAL_SAMPLES, length), generator=torch.Generator().manual_seed(0))
    one, other = ordinary[drawn]
    # So that arguments which depend on where a document ends are found.
    for own in (text, config):
        for token in _tokens_of(getattr(own, "eos_token_id", None)):
            if 0 <= token < vocabulary:
                other[:, length // 2] = token
    return one, other


def _named_tokens(config: PreTrainedConfig) -> Iterator[int]:
    """The tokens that a config names, as `pad_token_id` or `image_token_index`."""
    for key, value in config.to_dict().items():
        if key.endswith(("token_id", "token_index", "token_ids")):
            yield from _tokens_of(value)


def _tokens_of(value: Any) -> list[int]:
    """The tokens of an entry of a config: one, several, or none."""
    return [token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)]


def shared_arguments(
    model: nn.Module, blocks: dict[str, nn.Module], calls: Calls, batches: Iterable[Tensor]
) -> dict[tuple[str, int], Arguments]:
    """The arguments of every block other than its hidden states, for batches of these sizes; no block is run.

    Args:
        model: The model; its blocks need no values.
        blocks: Its blocks by full name, in order.
        calls: How it calls them.
        batches: Token ids `[samples, length]`; one batch of each size is used.

    Returns:
        The arguments by block name and number of samples in the batch, of blocks where they do not depend on the text.
    """
    found: dict[tuple[str, int], Arguments] = {}
    for batch in {len(batch): batch for batch in batches}.values():
        seen = _skipping_pass(model, blocks, calls.forms, batch)
        found |= {(name, len(batch)): own for name, own in seen.items() if name not in calls.text_dependent}
    return found


def arguments_within(model: nn.Module, forms: Mapping[str, OutputForm], name: str, tokens: Tensor) -> Arguments:
    """The arguments of one block for tokens `[samples, length]`, captured without running a block."""
    before = {each: model.get_submodule(each) for each in forms}
    with _skipped(before, forms):
        return copied(call_of(model, before[name], tokens).arguments, _apart)


def _apart(tensor: Tensor) -> Tensor:
    """A tensor `[...]` that does not hold the memory of a larger one, of which it may be a part."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _bytes_of(arguments: Arguments) -> int:
    """The memory of all tensors in a block's arguments."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    copied(arguments, note)
    return sum(sizes.values())


@profiled("calibration forward")
def call_of(model: nn.Module, block: nn.Module, tokens: Tensor) -> Call:
    """The call of a block for tokens `[samples, length]`; the model is run until then."""
    caught: list[Call] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(_split(args, kwargs))
        raise StopHereError

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with suppress(StopHereError), torch.no_grad():
            model(tokens, use_cache=False)
    finally:
        handle.remove()
    if not caught:
        raise ModelError(f"{type(model).__name__} did not call a block on plain text; slimlm cannot calibrate it")
    name = next((name for name, module in model.named_modules() if module is block), "a block")
    _refuse_shape(model, name, caught[0], tokens)
    return caught[0]


def _refuse_shape(model: nn.Module, name: str, called: Call, tokens: Tensor) -> None:
    """Raise ModelError where a block is given other hidden states than `[samples, length, width]`."""
    if called.hidden.ndim != 3 or called.hidden.shape[:2] != tokens.shape:
        raise ModelError(
            f"{name} of {type(model).__name__} is given activations {list(called.hidden.shape)} for {list(tokens.shape)} "
            "tokens; slimlm supports blocks that are given [samples, length, width]"
        )


def _refuse_nan(hidden: Tensor, whose: str) -> None:
    """Raise NumericsError where activations `[samples, length, width]` hold NaN."""
    if bool(hidden.isnan().any()):
        raise NumericsError(
            f"{whose} hold NaN on random tokens, in float32: the weights up to there do not fit its class, or are damaged"
        )


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output; raises ModelError where there are none."""
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, Tensor):
        raise ModelError(f"a block gives a {type(hidden).__name__} where activations were expected; slimlm cannot run it")
    return hidden


def call(block: Callable[..., Any], hidden: Tensor, arguments: Arguments) -> Any:
    """The output of a block, or of its forward, for hidden states `[samples, length, width]` and other arguments."""
    args, kwargs = arguments
    return block(hidden, *args[1:], **kwargs) if args else block(**{**kwargs, "hidden_states": hidden})


@contextmanager
def explaining_failures(model: nn.Module) -> Iterator[None]:
    """Within this context, in which the model is run, its failures are ModelErrors."""
    try:
        yield
    except _FAILURES as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{type(model).__name__} fails where its blocks are read one at a time, on plain text: {first_line(error)}"
        ) from error


@profiled("calibration forward")
def _plain_pass(
    model: nn.Module, blocks: dict[str, nn.Module], tokens: Tensor, *, whole: bool
) -> tuple[dict[str, Call], dict[str, Any], Tensor | None]:
    """The calls of all blocks, their outputs by name, and the logits, in a plain forward pass."""
    final = next(reversed(blocks))
    calls: dict[str, Call] = {}
    outputs: dict[str, Any] = {}

    def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own = _split(args, kwargs)
        _refuse_shape(model, name, own, tokens)
        _refuse_nan(own.hidden, f"the activations that {type(model).__name__} gives to {name}")
        if outputs and not torch.equal(hidden_of(outputs[last := next(reversed(outputs))]), own.hidden):
            raise ModelError(
                f"{type(model).__name__} changes the activations between {last} and {name}; slimlm passes them "
                "from block to block unchanged and cannot calibrate it"
            )
        # Blocks may add to their hidden states in place, and to lists and dictionaries that they share.
        calls[name] = Call(own.hidden.clone(), copied(own.arguments))

    def after(name: str, output: Any) -> None:
        _refuse_nan(hidden_of(output), f"the outputs of {name} of {type(model).__name__}")
        outputs[name] = copied(output)
        if name == final and not whole:
            raise StopHereError

    handles = []
    for name, block in blocks.items():
        handles += [
            block.register_forward_pre_hook(lambda _, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True),
            block.register_forward_hook(lambda _, __, output, name=name: after(name, output)),
        ]
    logits = None
    try:
        with explaining_failures(model), suppress(StopHereError), torch.no_grad():
            logits = model(tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    _refuse_missed(model, blocks, calls)
    return calls, outputs, logits


@profiled("calibration forward")
def _skipping_pass(
    model: nn.Module, blocks: dict[str, nn.Module], forms: Mapping[str, OutputForm], tokens: Tensor
) -> dict[str, Arguments]:
    """The arguments of every block, by name, in a forward pass in which each gives back its hidden states."""
    final = next(reversed(blocks))
    seen: dict[str, Arguments] = {}

    def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[name] = copied(_split(args, kwargs).arguments)
        if name == final:
            raise StopHereError

    handles = [
        block.register_forward_pre_hook(lambda _, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True)
        for name, block in blocks.items()
    ]
    try:
        with _skipped(blocks, forms), suppress(StopHereError), torch.no_grad():
            model(tokens, use_cache=False)
    except _FAILURES as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{type(model).__name__} uses more of its blocks' outputs than their hidden states ({first_line(error)}); slimlm "
            "runs blocks one at a time and passes on hidden states alone, so it cannot compress this model"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    _refuse_missed(model, blocks, seen)
    return seen


@contextmanager
def _skipped(blocks: Mapping[str, nn.Module], forms: Mapping[str, OutputForm]) -> Iterator[None]:
    """Within this context each block gives back its hidden states, in the form of its output, and computes nothing."""

    def skip(form: OutputForm) -> Callable[..., Any]:
        return lambda *args, **kwargs: form.around(_split(args, kwargs).hidden)

    for name, block in blocks.items():
        # An attribute of the object comes before the method of its class; hooks still run.
        vars(block)["forward"] = skip(forms[name])
    try:
        yield
    finally:
        for block in blocks.values():
            del vars(block)["forward"]


def _refuse_missed(model: nn.Module, blocks: Iterable[str], called: Mapping[str, object]) -> None:
    if missed := [name for name in blocks if name not in called]:
        raise ModelError(f"{type(model).__name__} did not run its block {missed[0]} on plain text; slimlm cannot calibrate it")


def _refuse_used(model: nn.Module, name: str, block: nn.Module, skipping: Call, expected: Tensor, differing: list[str]) -> None:
    """Raise ModelError where a block's output depends on arguments that earlier blocks computed.

    Args:
        model: The model.
        name: The block's name.
        block: The block.
        skipping: Its call with the arguments that it is given where earlier blocks are skipped.
        expected: The hidden states of its output in a plain pass, `[samples, length, width]`.
        differing: The names of the arguments that differ between the two.
    """
    try:
        with torch.no_grad():
            # Twice, because an argument with a state may be another after the first time.
            arguments = skipping.arguments
            found = [hidden_of(call(block, skipping.hidden.clone(), copied(arguments))) for _ in range(2)]
    except (*_FAILURES, ModelError) as error:
        if is_out_of_memory(error):
            raise
        found = []
    if found and all(same_values(each, expected) for each in found):
        return
    raise ModelError(
        f"{name} of {type(model).__name__} is given {' and '.join(dict.fromkeys(differing))}, which earlier blocks compute; "
        "slimlm compresses blocks one at a time and passes on hidden states alone, so its inputs would be wrong. What works: a "
        "model in which blocks do not share computed states (in its config, layers that share keys and values or indices)"
    )


def same_values(one: Tensor, other: Tensor, tolerance: float = _SAME) -> bool:
    """Whether two results `[...]` are the same up to a share of the largest; NaN and infinity are the same as themselves."""
    if one.shape != other.shape:
        return False
    finite = other[other.isfinite()]
    size = float(finite.abs().max()) if len(finite) else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=tolerance * max(size, 1e-30), equal_nan=True)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    if args and isinstance(args[0], Tensor):
        return Call(args[0], ((None, *args[1:]), dict(kwargs)))
    if not args and isinstance(kwargs.get("hidden_states"), Tensor):
        return Call(kwargs["hidden_states"], ((), {**kwargs, "hidden_states": None}))
    raise ModelError("a block's first argument is not its activations, nor is one named hidden_states; slimlm cannot run it")


def copied(value: Any, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Any:
    """A value in containers of its own, which blocks may fill, with every tensor in them changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        items = [copied(each, change) for each in value]
        # A named tuple is made of its items one by one.
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, MutableMapping):
        own = copy.copy(value)
        for key in own:
            own[key] = copied(own[key], change)
        return own
    return value


def _differences(one: Arguments, other: Arguments, block: nn.Module) -> Iterator[str]:
    """The names of the arguments of a block that differ between two calls."""
    named = list(inspect.signature(type(block).forward).parameters)[1:]
    for place, (ours, theirs) in enumerate(zip(one[0], other[0], strict=True)):
        if _differs(ours, theirs):
            yield named[place] if place < len(named) else f"argument {place + 1}"
    for key in {**one[1], **other[1]}:
        if _differs(one[1].get(key), other[1].get(key)):
            yield key


def _differs(one: Any, other: Any) -> bool:
    """Whether two values of an argument differ; objects other than tensors, containers and plain values do if they are two."""
    if one is other:
        return False
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape != other.shape or one.dtype != other.dtype or not torch.equal(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) != len(other) or any(map(_differs, one, other))
    if isinstance(one, MutableMapping) and isinstance(other, MutableMapping):
        return one.keys() != other.keys() or any(_differs(one[key], other[key]) for key in one)
    return not (isinstance(one, PLAIN_TYPES) and isinstance(other, PLAIN_TYPES) and one == other)
