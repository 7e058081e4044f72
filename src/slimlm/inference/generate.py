"""Text from a model: the prompt at once, then a token at a time, with the keys and values kept in a cache of fixed size.

Llama-like models are taken through by `runtime/lean.py`; all others, and those of which something is not understood, by
their own forward. Either way the greedy tokens are those of transformers' `generate`.
"""

import inspect
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, StaticCache

from slimlm.core.errors import DataError, NumericsError, SlimlmError
from slimlm.data.windows import refuse_unknown_tokens
from slimlm.inference.decode import lean
from slimlm.models.structure import context_length

Step = Callable[[Tensor], Tensor]
"""From one token of each text `[batch]` to the logits `[batch, vocabulary]` of the next."""
_UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Generated:
    """What was written, and how fast."""

    tokens: Tensor
    """[batch, new] on the CPU, without the prompt; a text that ended before the others repeats its end token"""
    batch: int
    prompt_tokens: int
    """of each text"""
    prompt_seconds: float
    """from the prompt to the first new token; on a card also what captures the next ones, if that was not done before"""
    new_seconds: float
    """from the first new token to the last"""
    stopped: Literal["end", "length", "context"]
    """every text came to an end token; as many tokens as were asked for; the model's context is full"""
    way: str
    """what made the tokens after the first, in words"""

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second, all texts together."""
        return self.batch * self.prompt_tokens / self.prompt_seconds

    @property
    def new_rate(self) -> float | None:
        """New tokens per second, all texts together, from the second on (the first comes with the prompt); None: only one."""
        steps = self.tokens.shape[1] - 1
        return self.batch * steps / self.new_seconds if steps else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: counts, seconds and rates, without the tokens."""
        return {
            "batch": self.batch,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.tokens.shape[1],
            "prompt_seconds": self.prompt_seconds,
            "new_seconds": self.new_seconds,
            "prompt_tokens_per_second": self.prompt_rate,
            "new_tokens_per_second": self.new_rate,
            "stopped": self.stopped,
            "way": self.way,
        }


def generate(
    model: PreTrainedModel,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    ends: Sequence[int] | None = None,
    each: Callable[[list[int]], None] | None = None,
) -> Generated:
    """Go on from prompts of equal length `[batch, prompt]`: the likeliest token each time, or drawn at a temperature.

    Writes until every text has come to one of `ends` (None: those of the model's generation config), `max_new_tokens` are
    written or the context is full. `each` is called with every step's tokens, one of each text. Before a Llama-like
    model writes for the first time, the way through it is compared with its own forward on 8 tokens. On a card memory and
    captured steps are kept for the model's next text of about this length (lean.keep).
    Raises SlimlmError for options out of range, DataError for prompts that are empty, fill the context or hold tokens that the
    model does not have, NumericsError for logits that are not finite.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise SlimlmError(f"at least 1 new token and a temperature of 0 or more; got {max_new_tokens} and {temperature}")
    length = prompt.shape[1]
    if length < 1 or prompt.shape[0] < 1:
        raise DataError("the prompt is empty; a model goes on from at least one token")
    refuse_unknown_tokens(prompt, model)
    room = room_for(model, length)
    count = min(max_new_tokens, room)
    stops = torch.tensor(end_tokens(model) if ends is None else ends, dtype=torch.long, device=prompt.device)
    choose = _chooser(temperature, seed, prompt.device)
    reason = lean.refuses(model, length + count - 1) or lean.disagrees(model)
    written: list[Tensor] = []
    ended = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)

    def write(chosen: _Chosen) -> bool:
        """Keep a step's tokens; whether every text has ended. What Python has to know of them is waited for once."""
        nonlocal ended
        tokens = chosen.tokens
        if written and len(stops) and len(tokens) > 1:
            tokens = torch.where(ended, written[-1], tokens)
        if len(stops):
            ended = ended | torch.isin(tokens, stops)
        *told, finite, done = torch.cat((tokens, torch.stack((chosen.finite, ended.all())))).tolist()
        if not finite:
            raise NumericsError(chosen.otherwise)
        written.append(tokens)
        if each is not None:
            each(told)
        return bool(done)

    began = time.perf_counter()
    logits, step, way = _read(model, prompt, count, reason)
    done = write(choose(logits))
    read = time.perf_counter()
    with torch.inference_mode() if reason is None else torch.no_grad():
        while not done and len(written) < count:
            done = write(choose(step(written[-1])))
    finished = time.perf_counter()
    if reason is None:
        lean.keep(model, step)
    stopped: Literal["end", "length", "context"] = "end" if done else "length" if count == max_new_tokens else "context"
    tokens = torch.stack(written, dim=1).cpu()
    return Generated(tokens, prompt.shape[0], length, read - began, finished - read, stopped, way())


def end_tokens(model: PreTrainedModel) -> list[int]:
    """The tokens that end a text, by the model's generation config, else its config."""
    for config in (getattr(model, "generation_config", None), model.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


def room_for(model: PreTrainedModel, prompt_tokens: int) -> int:
    """How many tokens the model's context has room for after a prompt; raises DataError where there is none."""
    context = context_length(model)
    if context is not None and prompt_tokens >= context:
        raise DataError(f"the prompt has {prompt_tokens} tokens; the model's context holds {context}, so nothing can follow")
    return sys.maxsize if context is None else context - prompt_tokens


class Pieces:
    """Text out of tokens as they come; the pieces join to the whole text, and no character is torn.

    Tokens are decoded with those of the piece before, on which a space at the edge may depend; tokens that end within a
    character wait for the rest of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.before: list[int] = []
        self.waiting: list[int] = []

    def put(self, tokens: list[int]) -> str:
        """The text that these tokens complete; may be empty."""
        self.waiting += tokens
        text = self._decode(self.before + self.waiting)
        return "" if text.endswith(_UNFINISHED) else self._take(text)

    def end(self) -> str:
        """The text of what still waits, complete or not."""
        return self._take(self._decode(self.before + self.waiting)) if self.waiting else ""

    def _take(self, text: str) -> str:
        piece = text[len(self._decode(self.before)) :]
        self.before, self.waiting = self.waiting, []
        return piece

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _read(model: PreTrainedModel, prompt: Tensor, count: int, reason: str | None) -> tuple[Tensor, Step, Callable[[], str]]:
    """The logits `[batch, vocabulary]` after the prompt, what goes on from there, and what its name is by then."""
    length = prompt.shape[1] + count - 1
    if reason is None:
        step = lean.stepper(model, batch=prompt.shape[0], length=length)
        logits = step.read(prompt)
        if count > 1 and isinstance(step, lean.StaticStep):
            step.warm_up()
        return logits, step, lambda: step.way
    cache, kind = _cache(model, length)
    logits = _forward(model, prompt, cache)
    way = f"the model's forward with {kind} ({reason})"
    return logits, lambda tokens: _forward(model, tokens[:, None], cache), lambda: way


def _cache(model: PreTrainedModel, length: int) -> tuple[Any, str]:
    """A cache of fixed size where transformers has one for this model, else one that grows; and its name."""
    if getattr(model.config, "alibi", False):
        # Falcon adds distances for the tokens there are to a mask for all of a static cache.
        return DynamicCache(config=model.config), "a growing cache, as its alibi does not fit a static one"
    if getattr(model, "_can_compile_fullgraph", False):
        return StaticCache(config=model.config, max_cache_len=length), "a static cache"
    return DynamicCache(config=model.config), "a growing cache, as transformers has no static one for it"


@torch.no_grad()
def _forward(model: PreTrainedModel, tokens: Tensor, cache: Any) -> Tensor:
    """The logits `[batch, vocabulary]` after these tokens `[batch, count]`, by the model's own forward."""
    known = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    # A cache under another name than the model's own would be passed over in silence.
    name = next((name for name in _CACHES if name in known), None)
    if name is None:
        raise SlimlmError(
            f"{type(model).__name__} takes no cache by the name of {' or '.join(_CACHES)}; slimlm cannot write with it"
        )
    return model(tokens, **{name: cache}, use_cache=True, **last).logits[:, -1]


_CACHES = ("past_key_values", "cache_params")
"""What transformers' classes call the cache that they are given."""


@dataclass(frozen=True)
class _Chosen:
    """Tokens of which it is not yet known whether they count."""

    tokens: Tensor
    """[batch]"""
    finite: Tensor
    """whether the logits were that the tokens come from, bool without dimensions"""
    otherwise: str
    """what to say where they were not"""


def _chooser(temperature: float, seed: int, device: torch.device) -> Callable[[Tensor], _Chosen]:
    """From logits `[batch, vocabulary]` to tokens: the likeliest, or drawn with a generator of its own."""
    if temperature == 0:
        return _likeliest
    generator = torch.Generator(device).manual_seed(seed)
    otherwise = f"nothing can be drawn at temperature {temperature}: the model's logits are not finite"

    def draw(logits: Tensor) -> _Chosen:
        shares = torch.softmax(logits.float() / temperature, dim=-1)
        finite = shares.isfinite().all()
        # To draw from what is not finite is an error of its own, on a card one that cannot be recovered from.
        tokens = torch.multinomial(torch.where(finite, shares, 1.0), 1, generator=generator)[:, 0]
        return _Chosen(tokens, finite, otherwise)

    return draw


def _likeliest(logits: Tensor) -> _Chosen:
    tokens = logits.argmax(dim=-1)
    # NaN counts as the largest, so that it is enough to look at what was chosen.
    finite = logits.gather(-1, tokens[:, None]).isfinite().all()
    return _Chosen(tokens, finite, "there is no likeliest token: the model's logits are not finite")
