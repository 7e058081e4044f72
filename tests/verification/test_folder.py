"""`slimlm verify` finds what is wrong with a folder and names it; compressing compares what it reads back."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import slimlm
import slimlm.verification.folder
from slimlm.calibration.samples import Calibration, draw_samples
from slimlm.core.errors import CheckpointError
from slimlm.evaluation.perplexity import perplexity
from slimlm.models.dense import open_dense
from slimlm.models.lazy import open_lazy
from slimlm.record import Compared, Record, quality_warning
from slimlm.run import assemble
from slimlm.storage import checkpoint
from tests.conftest import Line, random_model, save

LAYER = "model.layers.1.mlp.down_proj"
OPTIONS: dict[str, Any] = {"recipe": "slim", "samples": 6, "length": 32}


@pytest.fixture(scope="module")
def packed(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with biases, its embedding and head packed, in several shards, with 2:4 masks and adapters."""
    folder = tmp_path_factory.mktemp("verify")
    save(random_model("llama", torch.float16), folder / "dense")
    with mock.patch.object(checkpoint, "SHARD_BYTES", 30_000):
        slimlm.compress(folder / "dense", folder / "out", data=str(text_file), embedding_bits=8, **OPTIONS)
    return folder / "out"


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def change(folder: Path, name: str, to: Callable[[Tensor], Tensor]) -> None:
    """Change a tensor where it lies, and let sizes and checksums be those of what lies there now."""
    [path] = [path for path in folder.glob("*.safetensors") if name in load_file(path)]
    tensors = load_file(path)
    save_file({**tensors, name: to(tensors[name].clone()).contiguous()}, path, metadata={"format": "pt"})
    resum(folder)


def resum(folder: Path) -> None:
    record = checkpoint.read_record(folder)
    checkpoint.write_record(folder, {key: value for key, value in record.items() if key != "files"})


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def set_at(index: Any, value: Any) -> Callable[[Tensor], Tensor]:
    def to(tensor: Tensor) -> Tensor:
        tensor[index] = value
        return tensor

    return to


def test_a_sound_folder_is_found_sound(packed: Path) -> None:
    found = slimlm.verify(packed)
    assert (found.problems, found.notes, found.skipped, found.checksums) == ((), (), (), "tensors")
    assert (found.compressed, found.embeddings, found.shards) == (15, 1, len(list(packed.glob("*.safetensors"))))
    assert found.shards > 1 and found.measured is None
    assert found.recorded is not None and found.recorded["tokens"] == 6 * 31


def test_every_tensor_has_its_checksum_and_the_record_others_than_the_shard(packed: Path) -> None:
    files = checkpoint.recorded_files(packed)
    for name, entry in files.items():
        assert entry["tensors"].keys() == load_file(packed / name).keys()
    again = checkpoint.read_record(packed)
    checkpoint.write_record(packed, {key: value for key, value in again.items() if key != "files"})
    assert checkpoint.recorded_files(packed) == files


def test_a_flipped_bit_is_found_in_its_tensor(copy: Path) -> None:
    [path] = [path for path in copy.glob("*.safetensors") if f"{LAYER}.weight" in load_file(path)]
    tensors = load_file(path)
    raw = bytearray(path.read_bytes())
    at = raw.find(tensors[f"{LAYER}.weight"].numpy().tobytes())
    raw[at + 3] ^= 4
    path.write_bytes(raw)
    first, second = slimlm.verify(copy).problems
    assert f"{LAYER}.weight in {path.name} is not what was written" in first
    assert f"{path} is corrupt" in second


@pytest.mark.parametrize(
    ("name", "to", "words"),
    [
        ("weight_mask", set_at((2, 0), 0b0111), "weight_mask does not fit 2:4: in row 2, inputs 0 to 3, 3 stay, not 2"),
        ("weight_scale", set_at((0, 0), float("nan")), "weight_scale holds 1 values of 1 that are NaN or infinite"),
        ("adapter_left_scale", set_at((0, 0), float("inf")), "adapter_left_scale holds 1 values"),
    ],
)
def test_what_packing_never_gives_is_named(copy: Path, name: str, to: Callable[[Tensor], Tensor], words: str) -> None:
    change(copy, f"{LAYER}.{name}", to)
    [problem] = slimlm.verify(copy).problems
    assert problem.startswith(f"{LAYER}: ") and words in problem


def test_bits_beyond_a_row_s_end_are_named(tmp_path: Path, text_file: Path) -> None:
    recipe = tmp_path / "three.toml"
    recipe.write_text('[[steps]]\nprune = "magnitude"\npattern = 0.3\n[[steps]]\nquantize = "absmax"\nbits = 3\n')
    folder = save(random_model("gpt2"), tmp_path / "dense")
    out = slimlm.compress(folder, tmp_path / "out", data=str(text_file), **{**OPTIONS, "recipe": str(recipe)}).path
    assert slimlm.verify(out).sound
    name = "transformer.h.0.attn.c_proj"
    # 34 of 48 inputs stay in a row: 102 bits in 13 bytes.
    change(out, f"{name}.weight", set_at(12, 0b1000_0000))
    assert slimlm.verify(out).problems == (f"{name}: weight has bits set beyond the end of 1 rows, the first of them 0",)


def test_a_tensor_left_over_or_missing_is_named(copy: Path) -> None:
    change(copy, "model.norm.weight", lambda tensor: tensor)
    [path] = [path for path in copy.glob("*.safetensors") if "model.norm.weight" in load_file(path)]
    tensors = load_file(path)
    tensors["model.norm.other"] = tensors.pop("model.norm.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    resum(copy)
    problems = " ".join(slimlm.verify(copy).problems)
    assert "model.norm.weight is missing" in problems and "model.norm.other is unexpected" in problems
    assert "the index says 'nothing of it'" in problems
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        slimlm.load(copy, kernels="reference")


def test_a_linear_layer_that_nobody_accounts_for_is_named(packed: Path, tmp_path: Path, text_file: Path) -> None:
    out = slimlm.compress(packed.parent / "dense", tmp_path / "o", data=str(text_file), **OPTIONS).path
    assert slimlm.verify(out).skipped == ("lm_head",)
    rewrite(out / "slimlm.json", lambda record: record["skipped"].pop("lm_head"))
    assert slimlm.verify(out).problems == ("lm_head is a linear layer that is neither compressed nor recorded as skipped",)


def test_a_record_that_says_something_else_is_told(copy: Path) -> None:
    def other(record: dict[str, Any]) -> None:
        record["layers"][0]["rank"] += 1

    rewrite(copy / "slimlm.json", other)
    [problem] = slimlm.verify(copy).problems
    assert problem == "model.layers.0.self_attn.q_proj: rank 4, and the record says 5"


def test_an_index_that_names_another_shard_is_told(copy: Path) -> None:
    def other(index: dict[str, Any]) -> None:
        index["weight_map"][f"{LAYER}.weight"] = "../elsewhere.safetensors"

    rewrite(copy / checkpoint.INDEX, other)
    [problem] = slimlm.verify(copy).problems
    assert f"{LAYER}.weight is in model-" in problem and "the index says '../elsewhere.safetensors'" in problem


def test_a_folder_of_an_older_version_is_told_so_and_passes(copy: Path) -> None:
    def older(record: dict[str, Any]) -> None:
        del record["perplexity"]
        for entry in record["files"].values():
            del entry["tensors"]

    rewrite(copy / "slimlm.json", older)
    found = slimlm.verify(copy)
    assert found.sound and found.checksums == "shards" and "older slimlm" in found.notes[0] and found.recorded is None


def test_no_more_than_a_block_is_made_at_a_time(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = slimlm.verification.folder.StoredModel.block

    def watched(self: Any, name: str, device: torch.device) -> torch.nn.Module:
        held = [t for t in self.meta_model.state_dict().values() if t.untyped_storage().nbytes() > 8]
        assert not held
        made.append(name)
        return real(self, name, device)

    monkeypatch.setattr(slimlm.verification.folder.StoredModel, "block", watched)
    assert slimlm.verify(packed).sound
    assert made == ["model.layers.0", "model.layers.1"]


def test_a_streamed_perplexity_is_that_of_the_loaded_model(packed: Path) -> None:
    windows = torch.randint(256, (5, 24), generator=torch.Generator().manual_seed(0))
    measured = slimlm.verify(packed, windows).measured
    assert measured is not None
    whole = perplexity(slimlm.load(packed, kernels="reference", dtype=torch.float32), windows)
    assert measured["value"] == pytest.approx(whole.value, rel=1e-5)


def test_perplexities_before_and_after_are_recorded(packed: Path, text_file: Path) -> None:
    recorded = Record.from_dict(checkpoint.read_record(packed)).perplexity
    assert recorded is not None
    original = open_lazy(str(packed.parent / "dense"), packed.parent / "none", pytest.fail)
    chosen = draw_samples(original, Calibration(str(text_file), OPTIONS["samples"], OPTIONS["length"]), pytest.fail).samples
    dense = perplexity(open_dense(str(packed.parent / "dense")).model, chosen)
    after = perplexity(slimlm.load(packed, kernels="reference", dtype=torch.float32), chosen)
    assert recorded.tokens == dense.tokens
    assert (recorded.dense, recorded.compressed) == (pytest.approx(dense.value, rel=1e-5), pytest.approx(after.value, rel=1e-5))


def test_an_exploded_perplexity_is_a_warning_that_names_the_worst_layers(packed: Path) -> None:
    record = Record.from_dict(checkpoint.read_record(packed))
    assert quality_warning(record) is None
    data = record.to_dict() | {"perplexity": {"dense": 10.0, "compressed": 20.5, "tokens": 100}}
    words = quality_warning(Record.from_dict(data))
    assert words is not None and "rose from 10 to 20.5" in words
    worst = max(record.layers, key=lambda row: row.error)
    assert f"exclude them (`ignore`): {worst.name} (" in words
    assert not Compared(10.0, float("inf"), 1).ok and Compared(10.0, 20.0, 1).ok


def test_a_failed_quality_check_is_told_recorded_and_apart_from_whether_the_folder_is_sound(
    packed: Path, tmp_path: Path, text_file: Path
) -> None:
    told: list[str] = []
    with mock.patch("slimlm.record._MOST_GROWTH", 0.1):
        result = slimlm.compress(packed.parent / "dense", tmp_path / "o", data=str(text_file), notify=told.append, **OPTIONS)
        assert any("quality check failed: the perplexity rose from" in words for words in told)
        assert result.record.quality == checkpoint.read_record(result.path)["quality"] == "failed"
        end = json.loads((tmp_path / "o.log.jsonl").read_text().splitlines()[-1])
        assert (end["event"], end["quality"]) == ("end", "failed")
        found = slimlm.verify(result.path)
        assert found.sound and found.quality == "failed" and found.to_dict()["quality"] == "failed"
        assert any("quality check failed: the perplexity rose" in words for words in found.notes)
    assert slimlm.verify(result.path).quality == "ok"


def test_without_a_notify_function_warnings_are_logged(
    packed: Path, tmp_path: Path, text_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with mock.patch("slimlm.record._MOST_GROWTH", 0.1):
        slimlm.compress(packed.parent / "dense", tmp_path / "o", data=str(text_file), **OPTIONS)
    warnings = [record.getMessage() for record in caplog.records if (record.name, record.levelname) == ("slimlm", "WARNING")]
    assert any("the quality check failed" in words for words in warnings)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_line_ends_with_a_code_of_its_own_after_a_failed_quality_check(
    line: Line, packed: Path, tmp_path: Path, text_file: Path, as_json: bool
) -> None:
    asked = ["--recipe", "absmax", "--data", text_file, "--samples", 4, "--length", 32, *(["--json"] if as_json else [])]
    with mock.patch("slimlm.record._MOST_GROWTH", 0.1):
        code, out, err = line("compress", packed.parent / "dense", "--out", tmp_path / "o", *asked)
    assert code == 3 and "note: the quality check failed: the perplexity rose from" in err and "--samples" in err
    if as_json:
        assert json.loads(out)["quality"] == "failed"
    else:
        assert f"written; quality check failed (see the note above): {tmp_path / 'o'}" in out and "verified" not in out
    with mock.patch("slimlm.record._MOST_GROWTH", 0.1):
        code, out, _ = line("verify", tmp_path / "o")
    assert code == 0 and re.search(r"integrity +sound", out) and re.search(r"quality +failed, as the run measured it", out)


@pytest.mark.parametrize(("part", "words"), [("block", "outputs of the blocks"), ("head", "logits of the model")])
def test_compress_fails_where_what_is_read_back_gives_other_logits(
    packed: Path, tmp_path: Path, text_file: Path, part: str, words: str
) -> None:
    real = assemble.StoredModel

    def other(skeleton: Any, tensors: dict[str, Tensor], *rest: Any) -> Any:
        # Of the model that is read back, which is made first.
        if not made:
            name = f"{LAYER}.bias" if part == "block" else "model.norm.weight"
            tensors = {**tensors, name: tensors[name] + 1}
        made.append(part)
        return real(skeleton, tensors, *rest)

    made: list[str] = []
    with mock.patch.object(assemble, "StoredModel", other), pytest.raises(CheckpointError, match=words):
        slimlm.compress(packed.parent / "dense", tmp_path / "o", data=str(text_file), **OPTIONS)
    assert not (tmp_path / "o").exists()
    assert torch.is_grad_enabled(), "what fails half-way switches nothing off"


def test_the_verb_prints_what_it_found(packed: Path, text_file: Path, line: Line) -> None:
    status, out, _ = line("verify", packed, "--text", text_file, "--tokens", 100)
    assert status == 0
    assert "15 compressed, 0 dense" in out and "tokens of the text" in out and re.search(r"integrity +sound", out)
    status, out, _ = line("verify", packed, "--json")
    assert status == 0 and json.loads(out)["sound"] is True


def test_the_verb_fails_in_words(copy: Path, line: Line) -> None:
    change(copy, f"{LAYER}.weight_scale", set_at((0, 0), float("nan")))
    status, out, err = line("verify", copy, "--json")
    said = " ".join(err.split())
    assert status == 2 and "NaN" in json.loads(out)["problems"][0]
    assert f"failed: {LAYER}: weight_scale holds" in said
    assert line("verify", copy.parent)[0] == 2


def test_a_run_that_verifies_leaves_files_alone(packed: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in packed.rglob("*")}
    slimlm.verify(packed)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in packed.rglob("*")} == before


def test_a_config_that_was_changed_is_a_problem_and_other_small_files_are_named(copy: Path) -> None:
    rewrite(copy / "config.json", lambda config: config.update(rms_norm_eps=0.5))
    (copy / "generation_config.json").write_text('{"top_k": 7}')
    found = slimlm.verify(copy)
    assert found.problems == ("config.json is not what was written: its SHA-256 differs",)
    assert "generation_config.json was changed since it was written" in found.notes
    (copy / "generation_config.json").unlink()
    assert "generation_config.json is missing" in slimlm.verify(copy).problems


def test_small_files_that_do_not_open_are_problems(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    (copy / "generation_config.json").write_text('{"top_k": ')
    problems = slimlm.verify(copy).problems
    assert any(words.startswith("the tokenizer of") for words in problems)
    assert any(words.startswith("generation_config.json in") for words in problems)


def test_a_folder_without_their_checksums_is_read_and_says_so(copy: Path) -> None:
    rewrite(copy / "slimlm.json", lambda record: record.pop("beside"))
    found = slimlm.verify(copy)
    assert found.sound
    assert any("no checksums of its config" in note for note in found.notes)


def test_a_folder_with_zeros_is_sound_opens_on_kernels_and_damage_is_named(text_file: Path, tmp_path: Path) -> None:
    dense = save(random_model("llama", torch.float16), tmp_path / "dense")
    out = slimlm.compress(dense, tmp_path / "out", data=str(text_file), **{**OPTIONS, "recipe": "gptq-zero"}).path
    assert slimlm.verify(out).sound
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        law, found = (slimlm.load(out, kernels=k, dtype=torch.float32)(ids).logits for k in ("reference", "auto"))
    assert (found - law).norm() < 1e-3 * law.norm()
    name = f"{LAYER}.weight_zero"
    change(out, name, lambda tensor: torch.cat([tensor, tensor[:1]]))
    assert "weight_zero" in " ".join(slimlm.verify(out).problems)
