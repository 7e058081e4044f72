"""Layers called together or directly."""

import torch
from torch import nn

from slimlm.inference.decode.grouped import direct_call, grouped_call


def test_layers_called_together_or_directly_give_what_they_give_one_by_one() -> None:
    torch.manual_seed(3)
    layers = [nn.Linear(6, out, bias=out > 2) for out in (2, 3, 4)]
    x = torch.randn(2, 6)
    for count in (1, 2, 3):
        for together, layer in zip(grouped_call(layers[:count])(x), layers[:count], strict=True):
            assert torch.equal(together, layer(x))
    doubled = nn.Sequential(layers[0])
    assert torch.equal(direct_call(doubled)(x), layers[0](x))
