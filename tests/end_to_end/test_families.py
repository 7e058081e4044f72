"""Every family of this version, from a model folder to a packed one and back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GptOssForCausalLM, PreTrainedModel

import slimlm
from slimlm.calibration.capture import BlockRun, enter, run
from slimlm.inference.generate import generate
from slimlm.models.structure import blocks_of, linears_of
from slimlm.recipe import recipe_from_dict
from slimlm.runtime.linear import CompressedLinear
from tests.conftest import ALL_FAMILIES, FAMILIES, MORE_FAMILIES, Checkpoint, Checkpoints, random_model, save

LENGTH = 48
# float32 addition in another order moves logits of size one by about 1e-6
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in sorted(MORE_FAMILIES)]


@pytest.fixture(scope="module", params=sorted(ALL_FAMILIES))
def squeezed(request: pytest.FixtureRequest, checkpoints: Checkpoints) -> Checkpoint:
    """Every family in bfloat16, and what compression made of it."""
    return checkpoints(request.param, torch.bfloat16)


def squeeze(folder: Path, out: Path, text_file: Path, recipe: object = "slim") -> slimlm.Result:
    return slimlm.compress(folder, out, recipe=recipe, data=str(text_file), samples=8, length=LENGTH)


def put_back(dense: PreTrainedModel, layers: dict[str, CompressedLinear]) -> None:
    """An independent reading: the original class with each weight put back from its parts."""
    named = dict(dense.named_modules())
    for name, layer in layers.items():
        weight = sum(part.dense() for part in layer.parts())
        if name in named:
            transposed = "Conv1D" in type(named[name]).__name__
            named[name].weight.data = weight.T.contiguous() if transposed else weight
            continue
        # ...experts.<number>.<projection>: a share of a fused tensor
        path, number, projection = name.rsplit(".", 2)
        fused = named[path].down_proj if projection == "down_proj" else named[path].gate_up_proj
        own = fused.data[int(number)]
        if projection == "down_proj":
            own.copy_(weight.T if isinstance(dense, GptOssForCausalLM) else weight)
        elif isinstance(dense, GptOssForCausalLM):
            own[:, int(projection == "up_proj") :: 2].copy_(weight.T)
        else:
            half = len(own) // 2
            own[half * (projection == "up_proj") :][:half].copy_(weight)


def test_a_saved_model_gives_the_logits_and_greedy_text_of_the_original_class_with_these_weights(squeezed: Checkpoint) -> None:
    ids = torch.randint(1, 256, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    ours = slimlm.load(squeezed.out, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(squeezed.out, dtype=torch.float32)
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    made = generate(ours, ids[:, :8], max_new_tokens=10, stop_tokens=[]).tokens
    for model in (ours, theirs):
        slimlm.use_kernels(model, "reference")
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    layers = {name: module for name, module in theirs.named_modules() if isinstance(module, CompressedLinear)}
    assert layers.keys() == {layer.name for layer in squeezed.record.layers}
    dense = AutoModelForCausalLM.from_pretrained(squeezed.dense, dtype=torch.float32)
    put_back(dense, layers)
    assert torch.allclose(dense(ids).logits, ours(ids).logits, **CLOSE)
    options = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones(2, 8), "eos_token_id": None}
    expected = dense.generate(ids[:, :8], **options)[:, 8:]
    assert torch.equal(expected, generate(ours, ids[:, :8], max_new_tokens=10, stop_tokens=[]).tokens)
    # Precise kernels, by whatever way slimlm generates.
    assert torch.equal(expected, made)


def test_what_is_not_compressed_stays_bit_for_bit(squeezed: Checkpoint) -> None:
    before = AutoModelForCausalLM.from_pretrained(squeezed.dense, dtype="auto").state_dict()
    after = load_file(squeezed.out / "model.safetensors")
    compressed = {layer.name for layer in squeezed.record.layers}
    stayed = {name for name in after if name.rpartition(".")[0] not in compressed}
    fused = {name for name in before if name.endswith(("experts.gate_up_proj", "experts.down_proj", "_proj_bias"))}
    tied = {name for name in before if name == "lm_head.weight" and name not in after}
    assert before.keys() - {f"{name}.{key}" for name in compressed for key in ("weight", "bias")} - fused - tied == stayed
    for name in stayed:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name]), name
    config = json.loads((squeezed.out / "config.json").read_text())
    original = json.loads((squeezed.dense / "config.json").read_text())
    for key in ("model_type", "_name_or_path"):
        original.pop(key, None)
    assert {key: config[key] for key in original} == original


def test_bits_reported_bits_in_memory_and_bytes_on_disk_agree(squeezed: Checkpoint) -> None:
    record = squeezed.record
    layers = {
        n: m for n, m in slimlm.load(squeezed.out, kernels="reference").named_modules() if isinstance(m, CompressedLinear)
    }
    assert {r.name: r.bits for r in record.layers} == {n: sum(p.storage_bits() for p in m.parts()) for n, m in layers.items()}
    stored = load_file(squeezed.out / "model.safetensors")
    own = [t for n, t in stored.items() if n.rpartition(".")[0] in layers and not n.endswith(".bias")]
    on_disk = sum(t.numel() * t.element_size() for t in own)
    assert on_disk * 8 == sum(r.bits for r in record.layers)


@pytest.mark.parametrize("family", [*sorted(FAMILIES), *MORE])
def test_full_rank_at_eight_bits_without_pruning_leaves_the_logits_alone(family: str, tmp_path: Path, text_file: Path) -> None:
    folder = save(random_model(family), tmp_path / "dense")
    steps = [
        {"quantize": "slim_quant", "bits": 8, "group_size": "per-channel"},
        {"compensate": "slim_lora", "rank": 1.0, "bits": 16},
    ]
    squeeze(folder, tmp_path / "out", text_file, recipe_from_dict({"steps": steps}, source="test"))
    ids = torch.randint(256, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    dense = AutoModelForCausalLM.from_pretrained(folder)(ids).logits.detach()
    # The adapters' float16 rounding acts on the 8-bit error only, about 2^-11 x 2^-8 of a weight.
    assert torch.allclose(dense, slimlm.load(tmp_path / "out")(ids).logits, atol=1e-3 * float(dense.abs().max()))


@pytest.mark.parametrize("family", sorted(ALL_FAMILIES))
def test_blocks_replayed_one_by_one_give_the_model_s_own_hidden_states(family: str) -> None:
    model = random_model(family)
    blocks = blocks_of(model)
    windows = torch.randint(256, (5, LENGTH), generator=torch.Generator().manual_seed(4))
    flow = enter(model, blocks, windows)
    expected: dict[str, torch.Tensor] = {}
    handles = [
        block.register_forward_hook(lambda _m, _i, o, name=name: expected.update({name: o[0] if isinstance(o, tuple) else o}))
        for name, block in blocks.items()
    ]
    with torch.no_grad():
        model(windows, use_cache=False)
    for handle in handles:
        handle.remove()
    for name, block in blocks.items():
        flow.hidden = list(run(BlockRun(block, name, flow, torch.device("cpu"))))
        assert torch.allclose(torch.cat(flow.hidden), expected[name], atol=1e-5), name


def test_sliding_and_full_layers_keep_their_own_masks() -> None:
    model = random_model("qwen2-mixed-attention")
    blocks = blocks_of(model)
    flow = enter(model, blocks, torch.randint(256, (2, LENGTH), generator=torch.Generator().manual_seed(5)))
    masks = [flow.arguments.of(name, 0, 2)[1].get("attention_mask") for name in blocks]
    assert masks[1] is not None
    assert masks[0] is None or not torch.equal(masks[0], masks[1])


def test_only_linear_layers_inside_the_blocks_are_found() -> None:
    model = random_model("opt-projected")
    outside = {name for name in linears_of(model) if not name.startswith("model.decoder.layers.")}
    assert outside == {"lm_head", "model.decoder.project_in", "model.decoder.project_out"}


def test_a_model_that_is_pruned_and_on_the_grid_already_comes_back_unchanged(tmp_path: Path, text_file: Path) -> None:
    # law 21: compression is idempotent, with nothing left for the adapters
    model = random_model("llama")
    generator = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if "proj.weight" in name:
            codes = torch.randint(1, 8, parameter.shape, generator=generator).float()
            codes *= torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            keep = torch.tensor([True, False, False, True]).repeat(parameter.shape[1] // 4)
            parameter.data = codes * keep * 0.05
    folder = save(model, tmp_path / "dense")
    record = squeeze(folder, tmp_path / "out", text_file).record
    assert max(layer.error for layer in record.layers) < 1e-6
    for name, module in slimlm.load(tmp_path / "out").named_modules():
        if isinstance(module, CompressedLinear):
            total = sum(part.dense() for part in module.parts())
            assert torch.allclose(total, model.get_parameter(f"{name}.weight"), atol=1e-7)


def test_tensors_of_several_dtypes_keep_their_own(tmp_path: Path, text_file: Path) -> None:
    model = random_model("llama-tied", torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(7)) + 0.5
    folder = save(model, tmp_path / "dense")
    before = load_file(folder / "model.safetensors")
    assert {t.dtype for t in before.values()} == {torch.bfloat16, torch.float32}
    result = squeeze(folder, tmp_path / "out", text_file)
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name in set(before) - {f"{layer.name}.weight" for layer in result.record.layers}:
        assert before[name].dtype == after[name].dtype, name
        assert torch.equal(before[name], after[name]), name
    assert result.record.original_bytes == sum(t.numel() * t.element_size() for t in before.values())
