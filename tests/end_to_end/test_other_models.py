"""Models of no family that is tested in full: they work as they are found, or are refused by the name of what is unknown."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import slimlm
from benchmarks import tiny_models
from slimlm.core.errors import ModelError
from slimlm.inference.generate import generate
from slimlm.models.experts import fused_in, take_apart
from slimlm.models.structure import linears_of, put_weight
from slimlm.recipe import recipe_from_dict
from tests.conftest import ALL_FAMILIES, save

WORK = {name: made for name, made in tiny_models.FAMILIES.items() if name not in ALL_FAMILIES}
"""Families that have a name and are not tested in full."""


def quick(**more: Any) -> Any:
    steps = [{"quantize": "absmax", "bits": 8, "group_size": "per-channel"}]
    return recipe_from_dict({"steps": steps, **more}, source="test")


def options(text: Path, **more: Any) -> dict[str, Any]:
    return {"recipe": quick(), "data": str(text), "samples": 8, "length": 32, **more}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORK)
# Some classes say that a faster implementation of theirs is missing.
@pytest.mark.filterwarnings("default")
def test_it_is_compressed_opened_and_written_with(name: str, tmp_path: Path, text_file: Path) -> None:
    folder = save(tiny_models.random_model(WORK[name]), tmp_path / "dense")
    told: list[str] = []
    record = slimlm.compress(folder, tmp_path / "out", **options(text_file), notify=told.append).record
    assert record.coverage > 0.9 and not any("loaded as a whole" in text for text in told)
    ids = torch.randint(1, 256, (2, 32), generator=torch.Generator().manual_seed(3))
    ours = slimlm.load(tmp_path / "out", kernels="reference")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    slimlm.use_kernels(theirs, "reference")
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    # The original with each weight put back from its parts; test_experts.py has that experts taken apart compute the same.
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    for fused in fused_in(dense):
        take_apart(dense, fused)
    for layer in record.layers:
        put_weight(dense.get_submodule(layer.name), ours.get_submodule(layer.name).parts().dense())
    assert torch.allclose(dense(ids).logits, ours(ids).logits, atol=1e-4, rtol=1e-4)
    options_of = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = ours.generate(ids[:, :8], attention_mask=torch.ones(2, 8, dtype=torch.long), **options_of)[:, 8:]
    assert torch.equal(generate(ours, ids[:, :8], max_new_tokens=8, stop_tokens=[]).tokens, written)


REFUSED: dict[str, str] = {
    "bart": r"weight of model\.decoder\.layers\.0\.encoder_attn\.k_proj \(one of 8 layers\).*\*\.encoder_attn\.k_proj",
    "mamba": r"weight of backbone\.layers\.0\.mixer\.dt_proj \(one of 2 layers\).*\*\.mixer\.dt_proj",
    "jetmoe": r"JetMoeForCausalLM are in no linear layer.*JetMoeParallelExperts",
    "rwkv": r"RwkvForCausalLM fails where its blocks are read one at a time",
    "gemma3n_text": r"layers\.0 of Gemma3nForCausalLM is given activations \[4, ",
    "llama4_text": r"Llama4ForCausalLM are in no linear layer.*experts.*Llama4TextExperts",
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("default")
def test_it_is_refused_with_the_name_of_what_is_not_understood(name: str, tmp_path: Path, text_file: Path) -> None:
    folder = save(tiny_models.tiny_model(name), tmp_path / "dense")
    with pytest.raises(ModelError, match=REFUSED[name]):
        slimlm.compress(folder, tmp_path / "out", **options(text_file))
    assert not (tmp_path / "out").exists()


def test_a_layer_that_is_more_than_linear_is_not_compressed() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class Split(nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(x), x

    class Written(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T + (0 if self.bias is None else self.bias)

    kinds = {"plain": nn.Linear, "doubled": Doubled, "split": Split, "written": Written}
    block = nn.ModuleDict({f"{name}-{bias}": kind(8, 4, bias=bias) for name, kind in kinds.items() for bias in (True, False)})
    assert set(linears_of(block)) == {"plain-True", "plain-False", "written-True", "written-False"}
    assert block["written-True"].weight.shape == (4, 8)


def test_what_is_left_out_lets_a_model_be_compressed(tmp_path: Path, text_file: Path) -> None:
    folder = save(tiny_models.tiny_model("mamba"), tmp_path / "dense")
    recipe = quick(ignore=["*.dt_proj"])
    slimlm.compress(folder, tmp_path / "out", **options(text_file, recipe=recipe))
    ids = torch.randint(1, 256, (2, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        found = slimlm.load(tmp_path / "out", kernels="reference")(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 0.1
