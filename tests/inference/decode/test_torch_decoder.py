"""The torch decoder: the logits of the model's own forward."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from slimlm.inference.decode.structure import refuses
from slimlm.inference.decode.torch_decoder import TorchDecoder, attend
from tests.inference.decode.conftest import ROPES, llama


def logits_of_both(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of tokens `[batch, count]` after the fourth, by the torch decoder and by the model's own forward."""
    cache = DynamicCache()
    with torch.no_grad():
        model(tokens[:, :4], past_key_values=cache)
        step = TorchDecoder(model, batch=tokens.shape[0], length=tokens.shape[1])
        step.fill(cache)
        ours = torch.stack([step(column) for column in tokens[:, 4:].unbind(1)], dim=1)
        return ours, model(tokens).logits[:, 4:]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_logits_are_those_of_the_model_s_own_forward(rope: dict[str, Any], batch: int) -> None:
    model = llama(rope_parameters=rope, attention_bias=True, mlp_bias=True)
    tokens = torch.randint(256, (batch, 30), generator=torch.Generator().manual_seed(1))
    assert refuses(model, 30) is None
    ours, theirs = logits_of_both(model, tokens)
    # float32 in another order of addition, logits of size one to ten
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_embeddings_and_norms_of_two_dtypes_give_activations_of_the_wider() -> None:
    model = llama()
    model.get_input_embeddings().to(torch.bfloat16)
    tokens = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(1))
    assert refuses(model, 12) is None
    ours, theirs = logits_of_both(model, tokens)
    assert ours.dtype == torch.float32
    # transformers rounds the first norm's output to the embedding's bfloat16: 2^-9 of one block's input
    assert float((ours - theirs).abs().max()) < 2e-2 * float(theirs.abs().max())


def test_attention_of_one_query_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(2)
    queries, keys, values = (torch.randn(2, n, 4, generator=generator) for n in (3, 5, 5))
    expected = torch.softmax(torch.einsum("hgw,hsw->hgs", queries, keys), -1)
    assert torch.allclose(attend(queries, keys, values), torch.einsum("hgs,hsw->hgw", expected, values), atol=1e-6)
    halves = attend(queries.bfloat16(), keys.bfloat16(), values.bfloat16())
    # bfloat16 keeps 8 bits
    assert torch.allclose(halves.float(), attend(queries, keys, values), atol=3e-2)
