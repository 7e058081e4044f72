"""The decoder whose steps are captured: the logits of the torch decoder, from as few graphs as that takes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slimlm.inference.decode import cuda_graph
from slimlm.inference.decode.cuda_graph import CudaGraphDecoder, capture
from slimlm.inference.decode.torch_decoder import TorchDecoder
from tests.fake_cuda import FakeCuda
from tests.inference.decode.conftest import llama


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_decoder_whose_position_is_a_tensor_gives_what_the_torch_decoder_gives(dtype: torch.dtype) -> None:
    model, tokens = llama().to(dtype), torch.randint(5, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    steps = [
        TorchDecoder(model, batch=2, length=12),
        CudaGraphDecoder(model, batch=2, length=12, least_attended=4),
    ]
    for _ in range(2):  # a second text after the first: nothing of it is left
        first, second = (step.prefill(tokens[:, :3]) for step in steps)
        assert torch.equal(first, second)
        for column in tokens[:, 3:].unbind(1):
            with torch.no_grad():
                expected, found = (step(column) for step in steps)
            torch.testing.assert_close(found, expected, rtol=0, atol={torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype])
    assert isinstance(steps[1], CudaGraphDecoder) and sorted(steps[1].replays) == [4, 8, 12]


def test_a_step_is_captured_once_for_as_many_positions_and_runs_the_same_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []

    def counted(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        made.append(device)
        return capture(call, device)

    monkeypatch.setattr(cuda_graph, "capture", counted)
    step, token = CudaGraphDecoder(llama(max_position_embeddings=300), batch=1, length=300), torch.tensor([7])
    with torch.no_grad():
        for position in (0, 1, 255):
            step.position = position
            step(token)
        assert made == [torch.device("cpu")] and list(step.replays) == [256]
        step.position = 256
        step(token)
    assert list(step.replays) == [256, 300]


def test_off_a_gpu_what_is_captured_is_the_call_itself() -> None:
    def call() -> Tensor:
        return torch.zeros(1)

    assert capture(call, torch.device("cpu")) is call


@pytest.mark.parametrize("index", [0, 1])
def test_a_call_is_captured_on_its_own_gpu_whichever_is_the_current_one(index: int, fake_cuda: FakeCuda) -> None:
    where, number = torch.device("cuda", index), torch.zeros(1)
    replay = capture(fake_cuda.on(where, lambda: number * 2), where)
    for value in (3.0, 5.0):
        number.fill_(value)
        assert float(replay()) == 2 * value
    assert fake_cuda.used == [where] and fake_cuda.current == torch.device("cuda", 0)
