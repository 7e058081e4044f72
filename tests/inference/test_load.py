"""`slimlm.load` gives what transformers gives, holds nothing twice, and packs one layer at a time."""

import gc
import json
import os
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import slimlm
from slimlm.core.errors import CheckpointError, KernelError
from slimlm.core.mask import Pattern, choose
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.pack import Parts
from slimlm.core.parts.pruned import Pruned
from slimlm.core.parts.uniform import Uniform
from slimlm.inference.generate import generate
from slimlm.kernels import native
from slimlm.models.structure import blocks_of, linears_of
from slimlm.runtime.backends import Stored, cpu
from slimlm.runtime.cpu.bindings import LAYOUT
from slimlm.runtime.dense import DenseLinear
from slimlm.runtime.linear import CompressedLinear
from slimlm.runtime.whole_model import describe, packed_layers
from slimlm.storage import checkpoint
from slimlm.storage.entries import Description
from slimlm.storage.kernel_cache import cache_path
from tests.conftest import ENDS, FAMILIES, Checkpoints, needs_kernels, random_model, save
from tests.memory import MIB, needs_smaps, resident

IDS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(3))
DTYPES = ["auto", "float32", torch.bfloat16, torch.float16, torch.float64]


# Stored dtypes are no matter of the family: two families have both.
BOTH = ("gpt2", "llama")
STORED = [*((name, "bfloat16") for name in sorted(FAMILIES)), *((name, "float32") for name in BOTH)]
SLOW = [pytest.param((name, "float32"), marks=pytest.mark.slow) for name in sorted(FAMILIES) if name not in BOTH]


@pytest.fixture(scope="module", params=[*STORED, *SLOW], ids="-".join)
def out(request: pytest.FixtureRequest, checkpoints: Checkpoints) -> Path:
    """Every family's checkpoint, from two dtypes."""
    family, stored = request.param
    return checkpoints(family, getattr(torch, stored)).out


@pytest.fixture(scope="module")
def pruned_alone(llama_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no kernel takes: pruned, and not quantized."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    recipe = out.with_name("alone.toml")
    recipe.write_text('name = "alone"\nsummary = "pruned"\n[[steps]]\nprune = "magnitude"\npattern = "2:4"\n')
    slimlm.compress(llama_folder, out, recipe=str(recipe), data=str(text_file), samples=4, length=32)
    return out


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A copy to add to or to damage."""
    return Path(shutil.copytree(packed, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache")))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of layers of random parts, 0.4 to 1.7 MB each, and embeddings of 8 MB in bfloat16."""
    width, inner = 1024, 4096
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=3,
        num_attention_heads=8,
        vocab_size=4096,
        dtype="bfloat16",
        **ENDS,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)

    def uniform(rows: int, columns: int) -> Uniform:
        codes = torch.randint(-7, 8, (rows, columns), generator=generator, dtype=torch.int8)
        return Uniform(codes, (0.01 + 0.01 * torch.rand(rows, 1, generator=generator)).half(), 4, "per-channel")

    layers = {}
    for block, module in blocks_of(model).items():
        for name, linear in linears_of(module).items():
            rows, columns = linear.weight.shape
            keep = choose(torch.rand(rows, columns, generator=generator), Pattern.parse("2:4"))
            parts = Pruned(uniform(rows, columns), keep, "2:4"), LowRank(uniform(32, rows), uniform(32, columns))
            layers[f"{block}.{name}"] = CompressedLinear.from_parts(Parts(*parts), None)
    tensors = {f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in layer.state_dict().items()}
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in layers:
            tensors[name] = torch.randn(parameter.shape, generator=generator).bfloat16()
    folder = tmp_path_factory.mktemp("wide")
    checkpoint.write_weights(folder, tensors)
    description = Description({name: layer.describe() for name, layer in layers.items()})
    checkpoint.write_config(folder, config.to_dict(), description)
    checkpoint.write_record(folder, {})
    return folder


def compressed(model: PreTrainedModel) -> dict[str, CompressedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def shard(folder: Path) -> Path:
    return folder / "model.safetensors"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_loaded_model_is_bit_for_bit_the_one_that_transformers_loads(out: Path, dtype: torch.dtype | str) -> None:
    ours = slimlm.load(out, dtype=dtype, kernels="reference")
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
    slimlm.use_kernels(theirs, "reference")
    assert type(ours) is type(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    mine, other = ({**model.state_dict(), **dict(model.named_buffers())} for model in (ours, theirs))
    assert mine.keys() == other.keys()
    for name, tensor in other.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_a_loaded_model_describes_itself_as_the_one_that_transformers_loads(out: Path) -> None:
    ours, theirs = slimlm.load(out, kernels="reference"), AutoModelForCausalLM.from_pretrained(out)
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.config.name_or_path == ours.name_or_path == theirs.name_or_path
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert type(ours.hf_quantizer) is type(theirs.hf_quantizer)
    assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())


def test_tied_weights_stay_tied(tmp_path: Path, text_file: Path) -> None:
    folder = save(random_model("llama-tied"), tmp_path / "dense")
    slimlm.compress(folder, tmp_path / "out", recipe="absmax", data=str(text_file), samples=4, length=32)
    for dtype in ("auto", "float64", "bfloat16"):
        model = slimlm.load(tmp_path / "out", dtype=dtype)
        assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_generation_settings_come_from_their_own_file_where_there_is_one(copy: Path) -> None:
    GenerationConfig(max_new_tokens=7, temperature=0.5, do_sample=True, eos_token_id=3).save_pretrained(copy)
    ours, theirs = slimlm.load(copy), AutoModelForCausalLM.from_pretrained(copy)
    assert ours.generation_config.max_new_tokens == 7
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    (copy / "generation_config.json").unlink()
    ours, theirs = slimlm.load(copy), AutoModelForCausalLM.from_pretrained(copy)
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


def test_a_loaded_model_saves_what_was_loaded(packed: Path, tmp_path: Path) -> None:
    slimlm.load(packed).save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(IDS).logits, slimlm.load(packed, dtype=torch.float32)(IDS).logits)


def test_several_shards_are_one_model(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = slimlm.load(copy, kernels="reference")
    record = checkpoint.read_record(copy)
    shard(copy).unlink()
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    checkpoint.write_weights(copy, model.state_dict())
    checkpoint.write_record(copy, {key: value for key, value in record.items() if key != "files"})
    assert len(checkpoint.check_files(copy)) > 1
    assert torch.equal(slimlm.load(copy, kernels="reference")(IDS).logits, model(IDS).logits)
    theirs = AutoModelForCausalLM.from_pretrained(copy)
    slimlm.use_kernels(theirs, "reference")
    assert torch.equal(theirs(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("change", ["lost", "dtype", "shape", "unknown"])
def test_a_description_that_the_tensors_do_not_fit_is_refused(copy: Path, change: str) -> None:
    from safetensors.torch import load_file, save_file

    name = "model.layers.0.mlp.up_proj.weight_scale"
    tensors = load_file(shard(copy))
    if change == "lost":
        del tensors[name]
    elif change == "unknown":
        tensors["model.layers.0.mlp.nobody.weight"] = torch.zeros(3)
        name = "model.layers.0.mlp.nobody.weight"
    else:
        tensors[name] = tensors[name].double() if change == "dtype" else tensors[name].flatten()[None].repeat(2, 1)
    save_file(tensors, shard(copy), metadata={"format": "pt"})
    record = checkpoint.read_record(copy)
    checkpoint.write_record(copy, {key: value for key, value in record.items() if key != "files"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        slimlm.load(copy)


@needs_smaps
def test_loading_reads_next_to_nothing_and_every_stored_tensor_is_a_view_of_the_file(wide: Path) -> None:
    model = slimlm.load(wide, kernels="reference")
    assert resident(shard(wide)) < 2 * MIB
    before = resident(shard(wide))
    tensors = [tensor for tensor in model.state_dict().values() if tensor.numel() * tensor.element_size() > MIB // 2]
    for tensor in tensors:
        tensor.view(torch.uint8).max()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert size > 20 * MIB
    # Only the pages at the ends of small tensors may be missing or be there already.
    assert resident(shard(wide)) - before > 0.95 * size


@needs_smaps
def test_a_cast_leaves_no_page_of_what_was_cast_in_memory(wide: Path) -> None:
    model = slimlm.load(wide, dtype="float32")
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert resident(shard(wide)) < 2 * MIB


@needs_kernels
def test_kernels_give_the_reference_s_logits_and_the_second_load_packs_nothing(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(out, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache")))
    expected = slimlm.load(folder, dtype=torch.float32, kernels="reference")(IDS).logits
    first = slimlm.load(folder)
    assert describe(first).endswith(f"precise; {len(compressed(first))} of {len(compressed(first))} layers")
    # Activations of 16 bits; adapters and the head add in another order.
    assert float((first(IDS).logits - expected).abs().max()) < 1e-3 * float(expected.abs().max())
    monkeypatch.setattr(cpu, "pack", None)
    again = slimlm.load(folder)
    assert torch.equal(again(IDS).logits, first(IDS).logits)
    fast = slimlm.load(folder, kernels="fast")(IDS).logits
    assert 0 < float((fast - expected).abs().max()) < 0.1 * float(expected.abs().max())


@needs_kernels
def test_without_keep_nothing_is_written(copy: Path) -> None:
    model = slimlm.load(copy, keep=False)
    assert "precise; 14 of 14 layers" in describe(model)
    assert not (copy / ".cache").exists()


@needs_kernels
def test_without_a_dtype_activations_are_float32_and_tensors_as_stored(out: Path) -> None:
    stored = AutoModelForCausalLM.from_pretrained(out).state_dict()
    model = slimlm.load(out)
    assert model(IDS).logits.dtype == torch.float32
    assert all(torch.equal(tensor, stored[name].to(tensor.dtype)) for name, tensor in model.state_dict().items())
    head = model.get_output_embeddings()
    assert head.weight.dtype == stored["lm_head.weight"].dtype
    assert isinstance(head, DenseLinear) == (head.weight.dtype != torch.float32)


@needs_kernels
def test_a_head_of_16_bits_is_tied_as_before_and_multiplied_exactly(tmp_path: Path, text_file: Path) -> None:
    folder = save(random_model("llama-tied", torch.bfloat16), tmp_path / "dense")
    slimlm.compress(folder, tmp_path / "out", recipe="absmax", data=str(text_file), samples=4, length=32)
    model = slimlm.load(tmp_path / "out")
    head = model.get_output_embeddings()
    assert isinstance(head, DenseLinear) and head.weight is model.get_input_embeddings().weight
    x = torch.randn(40, 48, generator=torch.Generator().manual_seed(0))
    # Float32 sums of 48 terms, by the kernels (few rows) and by torch (many).
    for rows in (1, 5, 40):
        torch.testing.assert_close(head(x[:rows]), x[:rows] @ head.weight.float().T, rtol=1e-5, atol=1e-5)
    made = generate(model, IDS[:1], max_new_tokens=10, stop_tokens=[])
    assert made.decode_path == "fast decode in the CPU kernels, all blocks in one call"


@needs_kernels
def test_layers_that_no_kernel_takes_are_told_once_and_run_all_the_same(pruned_alone: Path) -> None:
    told: list[str] = []
    model = slimlm.load(pruned_alone, notify=told.append)
    [line] = told
    # The fifteenth is the head, of 16 bits.
    assert line.startswith("14 of 15 layers, model.layers.0.self_attn.q_proj among them, run without kernels: its base is")
    assert describe(model).startswith("reference; 14 of 14 layers; its base is pruned but not quantized")
    expected = slimlm.load(pruned_alone, dtype=torch.float32, kernels="reference")(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)  # float32, other order of addition


@needs_kernels
def test_what_is_told_is_logged_where_nobody_listens(pruned_alone: Path, caplog: pytest.LogCaptureFixture) -> None:
    slimlm.load(pruned_alone)
    [found] = caplog.records
    assert (found.name, found.levelname) == ("slimlm", "WARNING")
    assert "run without kernels: its base is pruned" in found.getMessage()


@needs_kernels
def test_kernels_asked_for_by_name_that_do_not_take_a_layer_are_refused(pruned_alone: Path) -> None:
    with pytest.raises(KernelError, match=r"q_proj: the fast kernels were asked for, but its base is pruned.*\"auto\""):
        slimlm.load(pruned_alone, kernels="fast")
    with pytest.raises(KernelError, match="`kernels='quick'`: give one of 'auto', 'precise'"):
        slimlm.load(pruned_alone, kernels="quick")  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a card")
def test_a_card_that_is_not_there_is_refused_in_words(pruned_alone: Path) -> None:
    with pytest.raises(slimlm.SlimlmError, match='`device="cuda:3"`: torch finds no CUDA device here; `device="cpu"` would do'):
        slimlm.load(pruned_alone, device="cuda:3")


@needs_kernels
@needs_smaps
@pytest.mark.parametrize("keep", [True, False])
def test_at_most_one_layer_s_stored_tensors_are_in_memory_while_packing(
    wide: Path, tmp_path: Path, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(wide, tmp_path / "wide", ignore=shutil.ignore_patterns(".cache")))
    pack, found = cpu.pack, []

    def watched(stored: Stored) -> Tensor:
        blob = pack(stored)
        found.append(resident(shard(folder)))
        return blob

    monkeypatch.setattr(cpu, "pack", watched)
    model = slimlm.load(folder, kernels="precise", keep=keep)
    layers = packed_layers(model).values()
    sizes = [sum(t.numel() * t.element_size() for t in layer.stored().tensors.values()) for layer in layers]
    # Around what is read the system maps up to 64 kB that it has at hand, here around eight tensors.
    assert len(found) == len(sizes) and max(found) < max(sizes) + 1.5 * MIB
    assert resident(shard(folder)) < 1.5 * MIB
    assert sum(sizes) > 18 * MIB
    # What was stored can be read all the same.
    layer = next(iter(compressed(model).values()))
    assert layer.parts().base.shape == (layer.out_features, layer.in_features)


@needs_kernels
@needs_smaps
def test_casts_and_moves_to_the_same_place_keep_the_mapped_bytes(wide: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(wide, tmp_path / "wide", ignore=shutil.ignore_patterns(".cache")))
    model = slimlm.load(folder)
    before = {name: layer.prepare().blob.data_ptr() for name, layer in packed_layers(model).items()}
    x = torch.randint(4096, (1, 8), generator=torch.Generator().manual_seed(0))
    expected = model(x).logits
    # Transformers refuses to cast quantized models; torch does not.
    for move in (model.to, lambda place: torch.nn.Module.to(model, place, torch.float32)):
        move("cpu")
        assert {name: layer.prepare().blob.data_ptr() for name, layer in packed_layers(model).items()} == before
        torch.testing.assert_close(model(x).logits, expected, rtol=1e-4, atol=1e-3)  # float32 sums of 1024 terms
    assert resident(cache_path(folder, LAYOUT)) > 0


@needs_kernels
def test_a_copy_of_a_model_gives_the_same_and_a_move_elsewhere_forgets_the_bytes(copy: Path) -> None:
    model = slimlm.load(copy)
    twin = deepcopy(model)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
    twin.to("meta")
    assert all(layer.stored().blob is None for layer in compressed(twin).values())


@needs_kernels
def test_other_weights_are_packed_again(copy: Path) -> None:
    slimlm.load(copy)
    record = checkpoint.read_record(copy)
    record["files"]["model.safetensors"]["sha256"] = "0" * 64
    (copy / checkpoint.RECORD).write_text(json.dumps(record))
    told: list[str] = []
    slimlm.load(copy, notify=told.append)
    assert len(told) == 1 and "was made from another checkpoint" in told[0]


@needs_kernels
def test_kept_packings_are_no_part_of_the_checkpoint(copy: Path) -> None:
    size, shards, print_ = checkpoint.stored_bytes(copy), checkpoint.check_files(copy), checkpoint.fingerprint(copy)
    slimlm.load(copy)
    assert cache_path(copy, LAYOUT).stat().st_size > 0
    assert (checkpoint.stored_bytes(copy), checkpoint.check_files(copy), checkpoint.fingerprint(copy)) == (size, shards, print_)
    checkpoint.verify_files(copy)
    record = checkpoint.read_record(copy)
    checkpoint.write_record(copy, {key: value for key, value in record.items() if key != "files"})
    assert checkpoint.read_record(copy)["files"].keys() == record["files"].keys()


@needs_kernels
def test_a_model_that_transformers_loads_runs_on_kernels_too(copy: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
    assert torch.equal(model(IDS).logits, slimlm.load(copy, dtype=torch.float32)(IDS).logits)
    assert "precise; 14 of 14 layers" in describe(model)
    slimlm.use_kernels(model, "reference")
    assert describe(model) == "reference; 14 of 14 layers"


@needs_kernels
def test_a_choice_made_later_packs_nothing_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = slimlm.load(copy)
    precise = model(IDS).logits
    monkeypatch.setattr(cpu, "pack", None)
    slimlm.use_kernels(model, "fast")
    assert not torch.equal(model(IDS).logits, precise)
    slimlm.use_kernels(model, "reference")
    torch.testing.assert_close(model(IDS).logits, precise, rtol=1e-3, atol=1e-2)  # activations of 16 bits in "precise"
    slimlm.use_kernels(model, "precise")
    assert torch.equal(model(IDS).logits, precise)


def test_without_a_library_everything_runs_by_the_reference_and_says_so(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.OVERRIDE, "/nowhere/slimlm_cpu.so")
    told: list[str] = []
    model = slimlm.load(copy, notify=told.append)
    assert len(told) == 1 and "there are no CPU kernels" in told[0]
    assert describe(model).startswith("reference; 14 of 14 layers; there are no CPU kernels")
    assert torch.equal(model(IDS).logits, slimlm.load(copy, kernels="reference")(IDS).logits)


def test_a_hub_name_is_loaded_from_the_hub_s_cache(packed: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--me--tiny"
    shutil.copytree(packed, cache / "snapshots" / "abc123")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc123")
    code = "import slimlm; print(sum(p.numel() for p in slimlm.load('me/tiny').parameters()))"
    there = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=there)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(parameter.numel() for parameter in slimlm.load(packed).parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "`dtype='int8'`: activations are floating-point numbers; give \"auto\" or one of float32"),
        ({"dtype": torch.int8}, "`dtype='int8'`: activations are floating-point"),
        ({"dtype": "half"}, "`dtype='half'`: activations"),
        ({"device": "gpu0"}, '`device="gpu0"`: give "cpu", "cuda" or "cuda:N"'),
        ({"device": 3.5}, '`device="3.5"`: give "cpu"'),
        ({"kernels": "quick"}, "`kernels='quick'`: give one of 'auto', 'precise', 'fast', 'gpu', 'reference'"),
    ],
)
def test_arguments_that_are_none_of_the_choices_are_named(packed: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(slimlm.SlimlmError, match=message):
        slimlm.load(packed, **options)


def test_a_path_that_is_not_there_is_no_name_on_the_hub(tmp_path: Path) -> None:
    for path in (tmp_path / "none", Path("no/such/checkpoint"), Path("none")):
        with pytest.raises(CheckpointError, match=f"there is no folder {path}"):
            slimlm.load(path)


@needs_kernels
@needs_smaps
@pytest.mark.parametrize("keep", [True, False])
def test_without_mapping_no_file_is_used_after_opening(copy: Path, keep: bool) -> None:
    """A file that is cut in place ends a process that has it mapped."""
    expected = slimlm.load(copy)(IDS).logits
    model = slimlm.load(copy, mmap=False, keep=keep)
    gc.collect()
    assert str(copy) not in Path("/proc/self/maps").read_text()
    for path in copy.rglob("*.safetensors"):
        with path.open("r+b") as file:
            file.truncate(16)
    assert torch.equal(model(IDS).logits, expected)
    assert all(layer.parts().dense().isfinite().all() for layer in compressed(model).values())


@needs_kernels
def test_a_changed_bias_is_added_from_then_on(packed: Path) -> None:
    for kernels in ("auto", "reference"):
        model = slimlm.load(packed, kernels=kernels)
        layer = compressed(model)["model.layers.0.mlp.up_proj"]
        x = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
        before = layer(x)
        with torch.no_grad():
            layer.bias.add_(0.5)
        torch.testing.assert_close(layer(x), before + 0.5, rtol=1e-3, atol=1e-3)  # a bias of 16 bits
        layer.bias = torch.nn.Parameter(torch.zeros_like(layer.bias), requires_grad=False)
        assert not torch.equal(layer(x), before)
