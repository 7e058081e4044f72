"""The torch decoder with the position in a tensor, so that a step can be captured in a CUDA graph and replayed.

A replayed step asks the CPU for next to nothing.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from slimlm.inference.decode.snapshot import ModelSnapshot
from slimlm.inference.decode.torch_decoder import Position, Rotary, TorchDecoder, attend

LEAST_ATTENDED = 256
"""Positions that the attention of a captured step goes over at least; further ones are added up to powers of two."""


class CudaGraphDecoder(TorchDecoder):
    """A torch decoder whose steps are the same operations on the same memory every time, captured in CUDA graphs on a GPU.

    Attention goes over the first 256, 512, 1024 ... positions, those to come masked; each of these numbers has a graph.

    Args:
        model: a model that `structure.refuses` accepts.
        batch: number of texts.
        length: number of positions.
        least_attended: the smallest number of positions that attention goes over.
    """

    path = "fast decode with torch, replayed from a CUDA graph"

    def __init__(self, model: PreTrainedModel, *, batch: int, length: int, least_attended: int = LEAST_ATTENDED) -> None:
        self.least_attended = least_attended
        # It may be kept, and what is made in inference mode could not be written to outside.
        with torch.inference_mode(False), torch.no_grad():
            super().__init__(model, batch=batch, length=length)
            device = self.keys.device
            self.here = torch.zeros(1, dtype=torch.long, device=device)
            """The position, `[1]`."""
            self.tokens = torch.zeros(batch, dtype=torch.long, device=device)
            self.numbers = torch.arange(length, device=device)
            """The numbers of all positions, `[length]`."""
            self.slots = (torch.zeros_like(self.keys[0, :, 0]), torch.zeros_like(self.keys[0, :, 0]))
            """A position's keys and values, `[batch x key heads, head_dim]` each."""
        self.replays: dict[int, Callable[[], Tensor]] = {}
        """The graphs, by the number of positions that attention goes over."""
        self.captured_from: ModelSnapshot | None = None
        """The state of the model when it computed the first prompt."""

    def prefill(self, prompt: Tensor) -> Tensor:
        """Compute prompts `[batch, tokens]` by the model's own forward; gives the logits `[batch, vocabulary]` after them."""
        logits, model = super().prefill(prompt), self._model()
        if self.captured_from is None and model is not None:
            self.captured_from = ModelSnapshot.of(model)
        return logits

    def fill(self, cache: DynamicCache) -> None:
        """Start after the positions of a cache, which must hold every position from the first."""
        super().fill(cache)
        # The attention weight of a masked position is 0, and 0 times what an earlier text left there must be 0, not NaN.
        self.keys[:, :, self.position :] = 0
        self.values[:, :, self.position :] = 0

    def warm_up(self) -> None:
        """Capture the next step now, unless that is done; there must be room for it."""
        self.here.fill_(self.position)
        with torch.no_grad():
            self._replay()

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits `[batch, vocabulary]` after one more token `[batch]` of each text."""
        self.here.fill_(self.position)
        self.tokens.copy_(tokens)
        replay = self._replay()
        self.position += 1
        return replay()

    def _replay(self) -> Callable[[], Tensor]:
        """The captured step for the position `here`."""
        attended = min(self.length, max(self.least_attended, 1 << self.position.bit_length()))
        if attended not in self.replays:
            self.replays[attended] = capture(partial(self._step, attended), self.keys.device)
        return self.replays[attended]

    def _step(self, attended: int) -> Tensor:
        """The logits after `tokens` at the position `here`; writes that position's keys and values and nothing else."""
        count = len(self.blocks)
        mask = torch.zeros(attended, dtype=self.dtype, device=self.here.device)
        mask = mask.masked_fill_(self.numbers[:attended] > self.here, float("-inf"))[None, None]

        def attend_here(i: int, queries: Tensor) -> Tensor:
            for cache, slot in zip((self.keys[i], self.values[i]), self.slots, strict=True):
                cache.index_copy_(1, self.here, slot[:, None])
            return attend(queries, self.keys[i, :, :attended], self.values[i, :, :attended], mask)

        position = Position(
            [self.slots[0]] * count,
            [self.slots[1]] * count,
            self._rotary_here(self.query_rotary),
            self._rotary_here(self.key_rotary),
            attend_here,
        )
        return self.logits(self.tokens, position)

    def _rotary_here(self, rotary: Rotary) -> Rotary:
        return Rotary(rotary.cos.index_select(0, self.here), rotary.signed_sin.index_select(0, self.here))


def capture(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A CUDA graph of a call, on a GPU; elsewhere the call itself.

    Args:
        call: gives a tensor `[...]`; must do the same on the same memory every time.
        device: where it computes.

    Returns:
        A function that replays the graph and gives a copy of its result.
    """
    if device.type != "cuda":
        return call
    graph = torch.cuda.CUDAGraph()
    # A stream of another GPU than the call's would capture nothing, and report that by a warning at most.
    with torch.cuda.device(device):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        # What compiles or allocates once does so before the capture.
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream(device).wait_stream(side)
        with torch.cuda.graph(graph, stream=side):
            result = call()

    def replay() -> Tensor:
        graph.replay()
        return result.clone()

    return replay
