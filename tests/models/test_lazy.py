"""A lazy model gives what an open one gives, and no more than one block of it is in memory."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import slimlm
from slimlm import pipeline
from slimlm.calibration.calls import shared_arguments
from slimlm.calibration.capture import batches_of, enter, first_inputs
from slimlm.cli.options import bytes_of
from slimlm.core.errors import ModelError, SlimlmError
from slimlm.models.dense import open_dense
from slimlm.models.files import weight_files
from slimlm.models.lazy import LazyModel, open_lazy, prefetched
from slimlm.models.structure import blocks_of
from slimlm.preflight.rehearsal import rehearse
from slimlm.run.assemble import source_of
from slimlm.run.block import BlockTask
from slimlm.storage.streams import write_stream
from tests.conftest import ALL_FAMILIES, MIXTURES, random_model, save

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"recipe": "slim", "samples": 6, "length": 32}


def opened(folder: Path) -> LazyModel:
    return open_lazy(str(folder), folder / "converted", pytest.fail)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lazy_model_has_the_weights_names_and_inputs_of_an_open_one(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save(random_model(family, dtype), tmp_path / "m")
    lazy, dense = opened(folder), open_dense(str(folder))
    assert (lazy.dtypes, lazy.bytes, lazy.config) == (dense.dtypes, dense.bytes, dense.config)
    state = dense.model.state_dict()
    assert list(lazy.weights) == list(state)
    for name, tensor in lazy.weights.items():
        assert tensor.dtype == dtype and torch.equal(tensor.float(), state[name])
    blocks, theirs = blocks_of(lazy.model), blocks_of(dense.model)
    assert list(blocks) == list(theirs)
    windows = torch.randint(256, (5, 16), generator=torch.Generator().manual_seed(0))
    calls = rehearse(lazy, blocks)
    with lazy.outer_tensors_filled(blocks):
        arguments = shared_arguments(lazy.model, blocks, calls, batches_of(windows))
        hidden = list(first_inputs(lazy.model, blocks, batches_of(windows)))
    expected = enter(dense.model, theirs, windows)
    assert all(torch.equal(ours, own) for ours, own in zip(hidden, expected.hidden, strict=True))
    assert arguments.keys() == expected.arguments.shared.keys()
    for name, block in theirs.items():
        own = lazy.block(name, CPU).state_dict()
        assert all(torch.equal(tensor, own[key]) for key, tensor in block.state_dict().items())
    # Nothing was left in the meta model.
    assert all(tensor.untyped_storage().nbytes() <= 8 for tensor in lazy.model.state_dict().values())


def test_only_one_block_is_filled_at_a_time(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(random_model("llama"), tmp_path / "m")
    filled: list[int] = []
    real = LazyModel.fill

    def counted(self: LazyModel, module: torch.nn.Module, name: str) -> None:
        real(self, module, name)
        held = [t for t in self.model.state_dict().values() if t.untyped_storage().nbytes() > 8]
        filled.append(sum(t.numel() for t in held) + sum(p.numel() for p in module.parameters()))

    monkeypatch.setattr(LazyModel, "fill", counted)
    slimlm.compress(folder, tmp_path / "o", data=str(text_file), **OPTIONS)
    model = random_model("llama")
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    outside = model.model.embed_tokens.weight.numel() + model.model.norm.weight.numel()
    # While arguments are captured the block that runs is the meta model's own, and counted twice; the head is never there.
    assert max(filled) <= 2 * block + outside


def test_activations_on_the_disk_give_the_same_bytes(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimlm.calibration.capture.TOKENS_AT_ONCE", 4 * 32)
    folder = save(random_model("llama"), tmp_path / "m")
    options: Any = {**OPTIONS, "recipe": "best-24-matched", "data": str(text_file)}
    told: list[str] = []
    slimlm.compress(folder, tmp_path / "memory", **options, memory=2**30, notify=told.append)
    assert not any("stay on the disk" in text for text in told)
    seen: list[str] = []
    real = pipeline.compress_block

    def watched(task: BlockTask) -> Any:
        seen.append(type(task.inputs.hidden).__name__)
        return real(task)

    monkeypatch.setattr(pipeline, "compress_block", watched)
    slimlm.compress(folder, tmp_path / "disk", **options, memory=1000, notify=told.append)
    assert any("activations (110.59 kB) stay on the disk" in text for text in told)
    assert seen[1:] == ["FileBatches"]
    for file in (tmp_path / "memory").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "disk" / file.name).read_bytes()


def test_what_needs_the_whole_model_is_refused_over_the_limit(tmp_path: Path) -> None:
    folder = save(random_model("llama"), tmp_path / "m")
    with pytest.raises(ModelError, match=r"whole model has to be in memory, .* more than the `memory` of 100\.00 kB"):
        slimlm.compress(folder, tmp_path / "o", **{**OPTIONS, "data": "self"}, memory=100_000)
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.partial").exists()


@pytest.mark.parametrize("family", MIXTURES)
def test_an_expert_s_weight_is_a_view_of_the_files(family: str, tmp_path: Path) -> None:
    lazy = opened(save(random_model(family, torch.bfloat16), tmp_path / "m"))
    inside = [tensor for name, tensor in lazy.weights.items() if ".experts." in name and name.endswith("weight")]
    assert lazy.experts and len(inside) == 3 * sum(len(lazy.model.get_submodule(name)) for name in lazy.experts)
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in inside}
    assert sum(sizes.values()) == sum(tensor.numel() * 2 for tensor in inside)
    assert lazy.bytes == sum(t.numel() * 2 for t in load_file(tmp_path / "m" / "model.safetensors").values())


def test_experts_that_the_files_hold_in_one_tensor_are_the_same(tmp_path: Path) -> None:
    apart = save(random_model("qwen3-moe"), tmp_path / "apart")
    joined = save(random_model("qwen3-moe"), tmp_path / "joined")
    state = {name: tensor.contiguous() for name, tensor in random_model("qwen3-moe").state_dict().items()}
    assert "model.layers.1.mlp.experts.gate_up_proj" in state
    save_file(state, joined / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = opened(joined), opened(apart)
    assert list(ours.weights) == list(theirs.weights) and ours.experts == theirs.experts == ["model.layers.1.mlp.experts"]
    assert all(torch.equal(tensor, theirs.weights[name]) for name, tensor in ours.weights.items())


def test_files_that_lack_an_expert_are_refused(tmp_path: Path) -> None:
    folder = save(random_model("qwen3-moe"), tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError):
        open_lazy(str(folder), folder / "converted", lambda _: None)


def test_tensors_that_transformers_makes_are_made_once_one_at_a_time_and_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(random_model("mixtral", torch.bfloat16), tmp_path / "m")
    expected = opened(folder)
    monkeypatch.setattr("slimlm.models.stacked_experts._stacks", lambda converter: False)
    found = opened(folder)
    assert list(found.weights) == list(expected.weights) and found.dtypes == expected.dtypes
    assert all(torch.equal(tensor, expected.weights[name]) for name, tensor in found.weights.items())
    assert found.bytes == expected.bytes and found.became.keys() == expected.became.keys()
    first = "model.layers.0.mlp.experts.1.up_proj.weight"
    source = next(name for name, names in expected.became.items() if first in names)
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    assert found.became[source] == (fused,) and first in found.taken_apart[fused]
    made = folder / "converted" / "made.safetensors"
    written = made.stat().st_mtime_ns
    again = opened(folder)
    assert made.stat().st_mtime_ns == written
    assert all(torch.equal(tensor, expected.weights[name]) for name, tensor in again.weights.items())


def test_stacks_that_are_made_as_a_whole_are_written_once_and_named_once(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(random_model("mixtral", torch.bfloat16), tmp_path / "m")
    expected = opened(folder)
    assert not expected.taken_apart
    written: list[Path] = []

    def counted(path: Path, *args: Any) -> str:
        written.append(path)
        return write_stream(path, *args)

    # The down projections are made in any case; those of gate and up, because a layer would be no view of the files.
    monkeypatch.setattr("slimlm.models.stacked_experts._stacks", lambda converter: len(converter.source_patterns) == 2)
    monkeypatch.setattr("slimlm.models.stacked_experts.Stack.share", lambda *_: None)
    monkeypatch.setattr("slimlm.models.lazy.write_stream", counted)
    found = opened(folder)
    assert len(written) == 1
    again = opened(folder)
    assert len(written) == 1, "a run that is resumed writes nothing again"
    for lazy in (found, again):
        assert all(torch.equal(tensor, expected.weights[name]) for name, tensor in lazy.weights.items())
    source = source_of(found, {})
    parts = [name for fused in source.taken_apart for name in source.taken_apart[fused]]
    assert len(parts) == len(set(parts)) == sum(".experts." in name for name in found.weights)
    assert all(len(names) == 1 for names in source.became.values()), "each tensor names only what it is a part of"
    assert source.names_of("model.layers.0.block_sparse_moe.experts.1.w2.weight") == tuple(
        f"model.layers.0.mlp.experts.{i}.down_proj.weight" for i in range(3)
    )
    record = slimlm.compress(folder, tmp_path / "o", **OPTIONS, data=str(text_file)).record
    assert record.source is not None and record.source.taken_apart == source.taken_apart
    assert slimlm.verify(tmp_path / "o").problems == ()


def test_several_shards_and_files_beside_them(tmp_path: Path, text_file: Path) -> None:
    model = random_model("llama")
    one, many = save(model, tmp_path / "one"), save(model, tmp_path / "many")
    (many / "model.safetensors").unlink()
    model.save_pretrained(many, max_shard_size="40KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    # A second copy of the weights, as some repositories have it; the index does not name it.
    save_file({"tok_embeddings.weight": torch.zeros(3)}, many / "consolidated.safetensors")
    for folder in (one, many):
        slimlm.compress(folder, tmp_path / f"{folder.name}-out", data=str(text_file), **OPTIONS)
    ours, theirs = (load_file(tmp_path / f"{folder.name}-out" / "model.safetensors") for folder in (one, many))
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = save(random_model("llama"), tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside the folder"):
        opened(folder)


def as_bin(folder: Path, *, zipped: bool) -> Path:
    state = load_file(folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_old_bin_files_give_what_safetensors_give(tmp_path: Path, text_file: Path, zipped: bool) -> None:
    one = save(random_model("llama", torch.bfloat16), tmp_path / "one")
    old = as_bin(save(random_model("llama", torch.bfloat16), tmp_path / "old"), zipped=zipped)
    for folder in (one, old):
        slimlm.compress(folder, tmp_path / f"{folder.name}-out", data=str(text_file), **OPTIONS)
    ours, theirs = (tmp_path / f"{name}-out" / "model.safetensors" for name in ("one", "old"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_a_bin_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(tmp_path / "ran"), "w")

    folder = save(random_model("llama"), tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Harm()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="more than tensors"):
        opened(folder)
    assert not (tmp_path / "ran").exists()


def test_norms_in_float32_beside_weights_in_bfloat16_stay_so(tmp_path: Path, text_file: Path) -> None:
    folder = save(random_model("llama", torch.bfloat16), tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    state = {name: tensor.float() + 1e-6 if "norm" in name else tensor for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    slimlm.compress(folder, tmp_path / "o", data=str(text_file), **OPTIONS)
    stored = load_file(tmp_path / "o" / "model.safetensors")
    for name in (name for name in state if "norm" in name):
        assert stored[name].dtype == torch.float32 and torch.equal(stored[name], state[name])


@pytest.mark.parametrize(("text", "size"), [("8GiB", 2**33), ("500 MB", 5 * 10**8), ("2.5G", 25 * 10**8), ("1000", 1000)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "8 apples", "0", "1e3"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SlimlmError, match="8GB"):
        bytes_of(text)


def test_the_next_block_is_made_while_one_is_worked_on_and_never_two_ahead() -> None:
    made: list[str] = []
    second = threading.Event()

    def make(name: str) -> str:
        made.append(name)
        if name == "b":
            second.set()
        return name.upper()

    coming = prefetched(make, ["a", "b", "c"])
    assert made == [], "nothing is made before it is asked for"
    assert next(coming) == "A"
    assert second.wait(10), "b is made without being asked for"
    assert made == ["a", "b"]
    assert list(coming) == ["B", "C"] and made == ["a", "b", "c"]
    assert list(prefetched(make, [])) == []


def test_what_fails_ahead_fails_where_it_is_wanted() -> None:
    def make(name: str) -> str:
        if name == "b":
            raise ModelError("b is damaged")
        return name

    coming = prefetched(make, ["a", "b"])
    assert next(coming) == "a"
    with pytest.raises(ModelError, match="b is damaged"):
        next(coming)


def test_blocks_that_come_in_turn_are_the_blocks(tmp_path: Path) -> None:
    lazy = opened(save(random_model("llama"), tmp_path / "m"))
    names = list(blocks_of(lazy.model))
    for name, block in zip(names, lazy.iterate_blocks(names, CPU), strict=True):
        alone = lazy.block(name, CPU).state_dict()
        assert all(torch.equal(tensor, alone[key]) for key, tensor in block.state_dict().items())


@pytest.mark.parametrize("embedding_bits", [None, 8])
def test_a_head_that_differs_from_the_embedding_it_should_be_tied_to_stays_itself(
    embedding_bits: int | None, tmp_path: Path, text_file: Path
) -> None:
    folder = save(random_model("llama-tied"), tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    own = torch.randn(state["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(5))
    save_file(state | {"lm_head.weight": own}, folder / "model.safetensors", metadata={"format": "pt"})
    lazy, dense = opened(folder), open_dense(str(folder))
    assert torch.equal(lazy.weights["lm_head.weight"], own)
    assert (lazy.dtypes, lazy.bytes, lazy.config) == (dense.dtypes, dense.bytes, dense.config)
    assert lazy.config["tie_word_embeddings"] is False
    slimlm.compress(
        folder, tmp_path / "o", **{**OPTIONS, "recipe": "absmax"}, data=str(text_file), embedding_bits=embedding_bits
    )
    tokens = torch.arange(20)[None]
    expected = dense.model(tokens).logits
    for model in (
        slimlm.load(tmp_path / "o", kernels="reference", dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(tmp_path / "o", dtype=torch.float32),
    ):
        found = model(tokens).logits.float()
        # Four bits a weight leave this much; another head would be as far away as it is large.
        assert (found - expected).norm() < 0.5 * expected.norm()
    if embedding_bits is None:
        assert torch.equal(model.lm_head.weight, own)


def test_a_head_that_is_stored_twice_and_the_same_is_tied(tmp_path: Path) -> None:
    folder = save(random_model("llama-tied"), tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    twice = state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    save_file(twice, folder / "model.safetensors", metadata={"format": "pt"})
    lazy = opened(folder)
    assert lazy.bytes == open_dense(str(folder)).bytes == sum(tensor.nbytes for tensor in state.values())
    assert lazy.config["tie_word_embeddings"] is True


def test_a_tensor_without_dimensions_that_nothing_uses_is_stored_as_it_is(tmp_path: Path) -> None:
    folder = save(random_model("llama"), tmp_path / "m")
    expected = opened(folder)
    state = load_file(folder / "model.safetensors")
    stray = {"model.scale": torch.tensor(1.5), "steps": torch.tensor(3)}
    save_file(state | stray, folder / "model.safetensors", metadata={"format": "pt"})
    slimlm.compress(folder, tmp_path / "o", recipe="absmax", data="self", samples=2, length=8)
    found = open_lazy(str(folder), folder / "converted", lambda _: None)
    assert list(found.weights) == list(expected.weights)
    assert all(torch.equal(tensor, expected.weights[name]) for name, tensor in found.weights.items())
    after = load_file(tmp_path / "o" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in stray.items())


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_single_file_is_read_before_an_index_left_over_beside_it_which_is_told(tmp_path: Path, kind: str) -> None:
    folder = save(random_model("llama"), tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    stem = "model" if kind == "safetensors" else "pytorch_model"
    if kind == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
    old = {name: tensor + 1 for name, tensor in state.items()}
    shard = f"{stem}-00001-of-00001.{kind}"
    if kind == "bin":
        torch.save(old, folder / shard)
    else:
        save_file(old, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(old, shard)}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    told: list[str] = []
    found = open_lazy(str(folder), folder / "converted", told.append)
    dense = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, state[name]) and torch.equal(tensor, dense[name]) for name, tensor in found.weights.items())
    assert len(told) == 1 and f"both {stem}.{kind} and {stem}.{kind}.index.json" in told[0]
    (folder / f"{stem}.{kind}").unlink()
    assert weight_files(folder) == [folder / shard]


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path, prefix: str) -> None:
    folder = save(random_model("llama-tied"), tmp_path / "m")
    state = {name.replace("model.", prefix): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    odd = f"{prefix}layers.1.mlp.up_proj.weight"
    save_file(state | {odd: state[odd][:80].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    asked = rf"{odd} in the files of .* has the shape \[80, 48\]; .* LlamaForCausalLM has it in the shape \[88, 48\]\. "
    with pytest.raises(ModelError, match=asked):
        opened(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.uint32])
def test_a_dtype_that_is_not_read_matters_only_where_the_model_takes_the_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save(random_model("llama"), tmp_path / "m")
    expected = opened(folder)
    state = load_file(folder / "model.safetensors")
    save_file(state | {"odd.scale": torch.zeros(4).to(dtype)}, folder / "model.safetensors", metadata={"format": "pt"})
    told: list[str] = []
    found = open_lazy(str(folder), folder / "converted", told.append)
    assert list(found.weights) == list(expected.weights) and ["1 of odd (odd.scale)" in text for text in told] == [True]
    assert all(torch.equal(tensor, expected.weights[name]) for name, tensor in found.weights.items())
    taken = "model.layers.1.mlp.up_proj.weight"
    save_file(state | {taken: state[taken].to(dtype)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{taken} in the files of .* has the dtype .*; slimlm reads F64, F32") as refused:
        opened(folder)
    assert ("dequantized to bf16" in str(refused.value)) == (dtype == torch.float8_e4m3fn)
    every = {name: tensor.to(dtype) for name, tensor in state.items()}
    save_file(every, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="has the dtype"):
        opened(folder)


@pytest.mark.parametrize(
    ("under", "words"),
    [
        ("state_dict", r"the keys 'state_dict', 'step': the tensors are under 'state_dict', .*\['state_dict'\], file\)"),
        ("module", r"the keys 'module', 'step': the tensors are under 'module'"),
        (None, "holds no tensors by name, but nothing; download it again"),
    ],
)
def test_a_bin_file_that_holds_its_tensors_deeper_says_where_they_are(tmp_path: Path, under: str | None, words: str) -> None:
    folder = save(random_model("llama"), tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({} if under is None else {under: state, "step": 3}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=words):
        opened(folder)
    assert not list(folder.glob("converted/*"))
    if under is not None:
        torch.save(torch.load(folder / "pytorch_model.bin", weights_only=True)[under], folder / "pytorch_model.bin")
        assert opened(folder).weights.keys() == state.keys()
