"""The bundled model: what it is, and that one-shot damage shows on it and is repaired."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import slimlm
from slimlm.data.windows import tokens_of, windows_of
from slimlm.evaluation.compare import open_any
from slimlm.evaluation.perplexity import perplexity
from slimlm.models.bundled import bundled_model


def test_it_is_a_small_float16_llama_with_widths_that_divide_by_128() -> None:
    folder = bundled_model()
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    assert config["model_type"] == "llama"
    assert 4.5e6 < sum(t.numel() for t in tensors.values()) < 10e6
    assert sum(file.stat().st_size for file in folder.iterdir()) < 20e6
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float16, name
        assert all(side % 128 == 0 for side in tensor.shape), name


def test_pruning_damages_it_and_slim_wins_half_of_that_back_in_less_than_a_third_of_the_size(tmp_path: Path) -> None:
    samples, length = 16, 512  # fewer, and the figures depend on what text is drawn
    original = open_any(str(bundled_model()))
    tokens = tokens_of(original.tokenizer, "stdlib", "evaluation", at_most=samples * length)
    windows = windows_of(tokens, length, source="stdlib")
    dense = perplexity(original.model, windows).value
    rises = {}
    # Magnitude pruning measures nothing.
    for recipe, calibration in (("magnitude", {"samples": 4, "length": 64}), ("slim", {"samples": samples, "length": length})):
        slimlm.compress(bundled_model(), tmp_path / recipe, recipe=recipe, data="stdlib", **calibration)
        rises[recipe] = perplexity(open_any(str(tmp_path / recipe)).model, windows).value - dense
    assert dense < 10
    assert rises["magnitude"] > 0.5 * dense
    assert rises["slim"] < 0.5 * rises["magnitude"]
    assert open_any(str(tmp_path / "slim")).bytes < original.bytes / 3
