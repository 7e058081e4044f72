"""Text generation: prefill of the prompt, then one token at a time, with the keys and values in a cache of fixed size.

Models that are built like Llama use the fast decoder (decode/selection.py); all others use their own forward. Either way the
greedy tokens are those of transformers' `generate`.
"""

import inspect
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, StaticCache

from slimlm.core import arguments
from slimlm.core.errors import DataError, NumericsError, SlimlmError
from slimlm.data.windows import refuse_unknown_tokens
from slimlm.inference.decode import selection
from slimlm.inference.decode.cuda_graph import CudaGraphDecoder
from slimlm.models.structure import context_length
from slimlm.runtime.arguments import refuse_no_module, token_ids

NextLogits = Callable[[Tensor], Tensor]
"""A function from one token of each text `[batch]` to the logits `[batch, vocabulary]` of the next."""
_UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Generated:
    """Generated tokens and their timing."""

    tokens: Tensor
    """The tokens `[batch, new]` on the CPU, without the prompt; a text that ended before the others repeats its end token."""
    batch: int
    """The number of texts."""
    prompt_tokens: int
    """The prompt tokens of each text."""
    prompt_seconds: float
    """The time from the prompt to the first new token; on a GPU including a graph's capture, unless that was done before."""
    new_seconds: float
    """The time from the first new token to the last."""
    stopped: Literal["end", "length", "context"]
    """Why it stopped: every text has ended, as many tokens as were asked for, or the model's context is full."""
    decode_path: str
    """The decoder of the tokens after the first, such as "fast decode with torch"; otherwise with the reason."""

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
            "decode_path": self.decode_path,
        }


def generate(
    model: PreTrainedModel,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop_tokens: Sequence[int] | None = None,
    each: Callable[[list[int]], None] | None = None,
) -> Generated:
    """Continue prompts of equal length: with the likeliest token each time, or one that is drawn at a temperature.

    Generation ends when every text has a stop token, `max_new_tokens` are generated or the context is full. Before a model that
    is built like Llama generates for the first time, its fast decoder is compared with its own forward on 8 tokens. On a GPU
    the decoder's memory and captured graphs are reused for the model's next text of about this length.

    Args:
        model: a causal language model, on the device of the prompts.
        prompt: token ids `[batch, prompt]`.
        max_new_tokens: at least 1.
        temperature: of the distribution that tokens are drawn from; 0: the likeliest token is used.
        seed: of the generator that tokens are drawn with.
        stop_tokens: tokens that end a text; None: those of the model's generation config.
        each: a function that is called with every step's tokens, one of each text.

    Returns:
        The tokens and their timing.

    Raises:
        SlimlmError: options are out of range.
        DataError: prompts are empty, fill the context or hold tokens that the model does not have.
        NumericsError: logits are not finite.
    """
    refuse_no_module(model, PreTrainedModel)
    prompt = token_ids(prompt, "prompt")
    max_new_tokens = arguments.whole_number(max_new_tokens, "max_new_tokens", least=None, example=64, refusal=SlimlmError)
    temperature = float(arguments.real_number(temperature, "temperature", example=0.8, refusal=SlimlmError))
    seed = arguments.whole_number(seed, "seed", least=None, example=0, refusal=SlimlmError)
    if each is not None:
        arguments.function(each, "each", "the tokens of a step")
    if max_new_tokens < 1 or temperature < 0:
        raise SlimlmError(f"at least 1 new token and a temperature of 0 or more; got {max_new_tokens} and {temperature}")
    batch, length = prompt.shape
    if length < 1 or batch < 1:
        raise DataError("the prompt is empty; a model continues at least one token")
    refuse_unknown_tokens(prompt, model)
    count = min(max_new_tokens, room_for(model, length))
    stops = stop_tokens_of(model) if stop_tokens is None else _stop_tokens(stop_tokens)
    choose = _chooser(temperature, seed, prompt.device)
    reason = selection.refuses(model, length + count - 1)
    texts = _Texts(batch, torch.tensor(stops, dtype=torch.long, device=prompt.device), each)
    began = time.perf_counter()
    logits, step, path = _prefill(model, prompt, count, reason)
    texts.add(choose(logits))
    prefilled = time.perf_counter()
    with torch.inference_mode() if reason is None else torch.no_grad():
        while not texts.done and len(texts.columns) < count:
            texts.add(choose(step(texts.columns[-1])))
    finished = time.perf_counter()
    if reason is None:
        selection.KEPT.keep(model, step)
    stopped: Literal["end", "length", "context"] = "end" if texts.done else "length" if count == max_new_tokens else "context"
    tokens = torch.stack(texts.columns, dim=1).cpu()
    return Generated(tokens, batch, length, prefilled - began, finished - prefilled, stopped, path())


def _stop_tokens(given: object) -> list[int]:
    """Token ids that a user gives; raises SlimlmError for anything else."""
    if not isinstance(given, list | tuple | set | frozenset):
        raise SlimlmError(f"`stop_tokens` is of type {type(given).__name__}; give a list of token ids")
    return [arguments.whole_number(token, "stop_tokens", least=0, example=2, refusal=SlimlmError) for token in given]


class _Texts:
    """The tokens that were generated so far, and whether every text has ended."""

    def __init__(self, batch: int, stops: Tensor, each: Callable[[list[int]], None] | None) -> None:
        self.columns: list[Tensor] = []
        """The tokens of each step, `[batch]`."""
        self.done = False
        self._stops, self._each = stops, each
        self._ended = torch.zeros(batch, dtype=torch.bool, device=stops.device)

    def add(self, chosen: "_Chosen") -> None:
        """Append a step's tokens; all values that Python needs are read from the device at once."""
        tokens = chosen.tokens
        if self.columns and len(self._stops) and len(tokens) > 1:
            tokens = torch.where(self._ended, self.columns[-1], tokens)
        if len(self._stops):
            self._ended = self._ended | torch.isin(tokens, self._stops)
        *values, finite, done = torch.cat((tokens, torch.stack((chosen.finite, self._ended.all())))).tolist()
        if not finite:
            raise NumericsError(chosen.otherwise)
        self.columns.append(tokens)
        self.done = bool(done)
        if self._each is not None:
            self._each(values)


def stop_tokens_of(model: PreTrainedModel) -> list[int]:
    """The tokens that end a text, by the model's generation config, else by its config."""
    for config in (getattr(model, "generation_config", None), model.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


def room_for(model: PreTrainedModel, prompt_tokens: int) -> int:
    """The number of tokens for which the model's context has room after a prompt.

    Raises:
        DataError: there is room for none.
    """
    context = context_length(model)
    if context is not None and prompt_tokens >= context:
        raise DataError(f"the prompt has {prompt_tokens} tokens; the model's context holds {context}, so nothing can follow")
    return sys.maxsize if context is None else context - prompt_tokens


class TextStream:
    """Decodes tokens to text as they are generated: the pieces make up the whole text, and no character is split.

    Tokens are decoded together with those of the previous piece, on which a space between them may depend; tokens that end
    within a character are held back until the rest of it is there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.before: list[int] = []
        self.waiting: list[int] = []

    def put(self, tokens: list[int]) -> str:
        """The text that these tokens complete, which may be empty."""
        self.waiting += tokens
        text = self._decode(self.before + self.waiting)
        return "" if text.endswith(_UNFINISHED) else self._take(text)

    def end(self) -> str:
        """The text of tokens that are still held back, complete or not."""
        return self._take(self._decode(self.before + self.waiting)) if self.waiting else ""

    def _take(self, text: str) -> str:
        piece = text[len(self._decode(self.before)) :]
        self.before, self.waiting = self.waiting, []
        return piece

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _prefill(
    model: PreTrainedModel, prompt: Tensor, count: int, reason: str | None
) -> tuple[Tensor, NextLogits, Callable[[], str]]:
    """The logits `[batch, vocabulary]` after the prompt, a function for further tokens, and one that names the decoder.

    reason: Why fast decode cannot be used; None: it can.
    """
    length = prompt.shape[1] + count - 1
    if reason is None:
        decoder = selection.decoder_for(model, batch=prompt.shape[0], length=length)
        logits = decoder.prefill(prompt)
        if count > 1 and isinstance(decoder, CudaGraphDecoder):
            decoder.warm_up()
        # The native decoder's path may change while it runs.
        return logits, decoder, lambda: decoder.path
    given, kind = _cache(model, length)
    logits, cache = _forward(model, prompt, given, 0)
    path = f"the model's forward with {kind} ({reason})"
    positions = itertools.count(prompt.shape[1])
    return logits, lambda tokens: _forward(model, tokens[:, None], cache, next(positions))[0], lambda: path


def _cache(model: PreTrainedModel, length: int) -> tuple[Any, str]:
    """A cache of fixed size where transformers has one for this model, else a growing one; and its name.

    None where the model makes one of a kind of its own with the first tokens.
    """
    if not model._supports_default_dynamic_cache():
        return None, "the model's own kind of cache"
    if getattr(model.config, "alibi", False):
        # Falcon adds distances between the tokens so far to a mask over all positions of a static cache.
        return DynamicCache(config=model.config), "a growing cache, as its alibi does not fit a static one"
    if getattr(model, "_can_compile_fullgraph", False):
        return StaticCache(config=model.config, max_cache_len=length), "a static cache"
    return DynamicCache(config=model.config), "a growing cache, as transformers has no static one for it"


@torch.no_grad()
def _forward(model: PreTrainedModel, tokens: Tensor, cache: Any, first: int) -> tuple[Tensor, Any]:
    """The logits `[batch, vocabulary]` after these tokens `[batch, count]`, by the model's own forward, and its cache.

    first: The position of the first of the tokens in its text.
    """
    known = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    # A cache under another name than the model's own would be ignored in silence.
    name = next((name for name in _CACHES if name in known), None)
    if name is None:
        raise SlimlmError(
            f"{type(model).__name__} takes no cache by the name of {' or '.join(_CACHES)}; slimlm cannot generate with it"
        )
    outputs = model(tokens, **{name: cache}, use_cache=True, **last, **_positions(model, tokens, first))
    return outputs.logits[:, -1], outputs[name] if cache is None else cache


def _positions(model: PreTrainedModel, tokens: Tensor, first: int) -> dict[str, Tensor]:
    """The positions of the tokens `[batch, count]` as an argument, for models with rotary embeddings.

    Not every class counts the tokens in its cache (Bamba does not). Models that learn positions may number them in their own
    way, so those are given none.
    """
    rotary = getattr(model.config.get_text_config(), "rope_parameters", None)
    if not rotary or "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
    return {"position_ids": positions.expand(len(tokens), -1)}


_CACHES = ("past_key_values", "cache_params")
"""The names under which transformers' classes take their cache."""


@dataclass(frozen=True)
class _Chosen:
    """Chosen tokens, with a check that is not read from the device yet."""

    tokens: Tensor
    """The tokens `[batch]`."""
    finite: Tensor
    """Whether the logits were finite, bool `[]`."""
    otherwise: str
    """The error message where they were not."""


def _chooser(temperature: float, seed: int, device: torch.device) -> Callable[[Tensor], _Chosen]:
    """A function from logits `[batch, vocabulary]` to tokens: the likeliest, or drawn with a generator of its own."""
    if temperature == 0:
        return _likeliest
    generator = torch.Generator(device).manual_seed(seed)
    otherwise = f"nothing can be drawn at temperature {temperature}: the model's logits are not finite"

    def draw(logits: Tensor) -> _Chosen:
        shares = torch.softmax(logits.float() / temperature, dim=-1)
        finite = shares.isfinite().all()
        # Drawing from values that are not finite is an error, on a GPU one that cannot be recovered from.
        tokens = torch.multinomial(torch.where(finite, shares, 1.0), 1, generator=generator)[:, 0]
        return _Chosen(tokens, finite, otherwise)

    return draw


def _likeliest(logits: Tensor) -> _Chosen:
    tokens = logits.argmax(dim=-1)
    # NaN counts as the largest, so that it is enough to check what was chosen.
    finite = logits.gather(-1, tokens[:, None]).isfinite().all()
    return _Chosen(tokens, finite, "there is no likeliest token: the model's logits are not finite")
