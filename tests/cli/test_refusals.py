"""Bad input: refused early, with what would work, with exit status 2 and no traceback."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import slimlm
from slimlm.cli.app import app
from slimlm.core.errors import RecipeError
from slimlm.events import Event
from slimlm.storage import checkpoint
from tests.conftest import Line, random_model, save


@pytest.fixture
def spoiled(packed: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(packed, tmp_path / "spoiled"))


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


VERBS = [
    "compress",
    "plan",
    "tune",
    "eval",
    "generate",
    "bench",
    "inspect",
    "verify",
    "methods",
    "recipes",
    "demo",
    "doctor",
    "with",
]


def test_the_verbs_are_these() -> None:
    assert [command.name or command.callback.__name__ for command in app.registered_commands if command.callback] == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(line: Line, verb: str) -> None:
    status, out, _ = line(verb, "--help")
    assert status == 0
    assert f"slimlm {verb}" in out


def test_a_verb_that_is_none_is_refused(line: Line) -> None:
    assert "plann" in line.refused("plann")


def test_an_unknown_recipe_names_the_nearest(line: Line, llama_folder: Path, tmp_path: Path) -> None:
    assert "did you mean 'slim-paper'" in line.refused("compress", llama_folder, "-o", tmp_path / "o", "--recipe", "slim-papr")


def test_an_unknown_method_names_the_nearest(line: Line, llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, '[[steps]]\nquantize = "slim_quan"\n')
    said = line.refused("compress", llama_folder, "-o", tmp_path / "o", "--recipe", recipe)
    assert "no quantizer is called 'slim_quan'; did you mean 'slim_quant'?" in said


def test_a_pattern_that_does_not_divide_a_width_names_the_layer_and_a_way_out(
    line: Line, llama_folder: Path, tmp_path: Path, text_file: Path
) -> None:
    recipe = recipe_file(tmp_path, '[[steps]]\nprune = "wanda"\npattern = "3:7"\n')
    said = line.refused("compress", llama_folder, "-o", tmp_path / "o", "--recipe", recipe, "--data", text_file)
    assert "3:7 needs in_features to be a multiple of 7; model.layers.0.self_attn.q_proj has 48" in said
    assert "exclude" in said


def test_a_model_whose_blocks_have_no_linear_layers_is_refused(
    line: Line, llama_folder: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimlm.models.structure.LINEAR_KINDS", (torch.nn.Conv2d,))
    said = line.refused("compress", llama_folder, "-o", tmp_path / "o", "--data", text_file)
    assert "nothing to compress" in said


def test_text_shorter_than_a_window_says_how_many_tokens_it_has(line: Line, llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("few words")
    said = line.refused("compress", llama_folder, "-o", tmp_path / "o", "--data", tmp_path / "short.txt")
    assert "gives 10 tokens, less than one window of 64" in said


def test_fewer_windows_than_asked_for_are_used_and_reported(
    line: Line, llama_folder: Path, tmp_path: Path, text_file: Path
) -> None:
    more = ["--recipe", "absmax", "--samples", "5000"]
    status, out, _ = line("compress", llama_folder, "-o", tmp_path / "o", "--data", text_file, *more)
    assert status == 0
    assert "asked for 5000" in out


def test_an_output_folder_that_holds_something_is_left_alone(line: Line, llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert "already holds something (mine.txt)" in line.refused("compress", llama_folder, "-o", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(line: Line, tmp_path: Path, text_file: Path, bad: float) -> None:
    model = random_model("llama")
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 5] = bad
    folder = save(model, tmp_path / "bad")
    said = line.refused("compress", folder, "-o", tmp_path / "o", "--data", text_file)
    assert "model.layers.1.mlp.up_proj.weight holds 1 NaN or infinite weights" in said
    assert not (tmp_path / "o").exists()


def test_a_truncated_model_file_is_refused(line: Line, llama_folder: Path, tmp_path: Path, text_file: Path) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "cut"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    said = line.refused("compress", folder, "-o", tmp_path / "o", "--data", text_file)
    assert "damaged or cut short" in said


def test_a_model_that_lacks_a_tensor_is_refused(line: Line, llama_folder: Path, tmp_path: Path, text_file: Path) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "lacking"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = line.refused("compress", folder, "-o", tmp_path / "o", "--data", text_file)
    assert "lacks 1 tensors" in said
    assert "model.layers.0.mlp.up_proj.weight" in said


def test_a_compressed_model_is_not_compressed_again(line: Line, packed: Path, tmp_path: Path, text_file: Path) -> None:
    said = line.refused("compress", packed, "-o", tmp_path / "o", "--data", text_file)
    assert "already quantized (slimlm)" in said


@pytest.mark.parametrize("verb", ["eval", "inspect"])
def test_a_flipped_bit_in_a_shard_is_found(line: Line, spoiled: Path, text_file: Path, verb: str) -> None:
    file = spoiled / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    more = {"eval": ["--text", text_file], "inspect": []}[verb]
    assert "is corrupt: its SHA-256" in line.refused(verb, spoiled, *more)


def test_a_truncated_shard_is_found(line: Line, spoiled: Path) -> None:
    file = spoiled / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert "bytes where" in line.refused("generate", spoiled, "--prompt", "a")


def test_a_missing_shard_is_named(spoiled: Path) -> None:
    (spoiled / "model.safetensors").unlink()
    with pytest.raises(slimlm.SlimlmError, match=r"model\.safetensors"):
        slimlm.load(spoiled)


@pytest.mark.parametrize("file", ["config.json", "slimlm.json"])
def test_a_newer_format_asks_for_an_upgrade(line: Line, spoiled: Path, file: str) -> None:
    data = json.loads((spoiled / file).read_text())
    (data if file == "slimlm.json" else data["quantization_config"])["format"] = 99
    (spoiled / file).write_text(json.dumps(data))
    said = line.refused("generate", spoiled, "--prompt", "a")
    assert "format 99" in said
    assert "newer slimlm" in said


@pytest.mark.parametrize("file", ["config.json", "slimlm.json"])
def test_a_format_of_before_the_first_release_is_refused(line: Line, spoiled: Path, file: str) -> None:
    data = json.loads((spoiled / file).read_text())
    (data if file == "slimlm.json" else data["quantization_config"])["format"] = 1
    (spoiled / file).write_text(json.dumps(data))
    said = line.refused("generate", spoiled, "--prompt", "a")
    assert "checkpoint format 1, of an unreleased version" in said
    assert "Compress the model again" in said


def test_a_shard_outside_the_folder_is_refused(spoiled: Path) -> None:
    data = json.loads((spoiled / "slimlm.json").read_text())
    data["files"]["../other.safetensors"] = data["files"].pop("model.safetensors")
    (spoiled / "slimlm.json").write_text(json.dumps(data))
    with pytest.raises(slimlm.SlimlmError, match="outside the folder"):
        slimlm.load(spoiled)


def test_a_dense_model_is_no_checkpoint(llama_folder: Path) -> None:
    with pytest.raises(slimlm.SlimlmError, match="is not a slimlm checkpoint"):
        slimlm.load(llama_folder)


def test_a_missing_model_is_named(line: Line, tmp_path: Path) -> None:
    assert "no model folder at" in line.refused("compress", tmp_path / "nothing", "-o", tmp_path / "o")


def test_a_missing_text_is_named(line: Line, packed: Path, tmp_path: Path) -> None:
    assert "no text at" in line.refused("eval", packed, "--text", tmp_path / "nothing.txt")


def test_jsonl_without_text_says_which_line_and_what_it_has(line: Line, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('\n{"body": "no"}\n')
    said = line.refused("eval", packed, "--text", tmp_path / "rows.jsonl")
    assert "none of its 1 rows has text; the first, " in said
    assert 'line 2: it has the fields body; expected a field "text" or "content"' in said


def test_the_traceback_appears_only_with_debug(line: Line, tmp_path: Path) -> None:
    status, _, err = line("inspect", tmp_path, "--debug")
    assert status == 2
    assert "Traceback" in err


def test_without_a_network_and_without_data_the_ways_out_are_named(
    line: Line, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = line.refused("compress", llama_folder, "-o", tmp_path / "o")
    for way in ("allenai/c4", "--data", ".txt", "stdlib", "self"):
        assert way in said


def test_transformers_refuses_the_folder_in_words_where_slimlm_is_not_imported(packed: Path) -> None:
    code = (
        "import sys, transformers\n"
        "for name in sys.argv[2:]:\n"
        "    print('CLASS', flush=True)\n"
        "    try:\n        getattr(transformers, name).from_pretrained(sys.argv[1])\n"
        "    except Exception as error:\n        print(error)\n    else:\n        print('LOADED')\n"
    )
    typed = [sys.executable, "-c", code, str(packed), "AutoModelForCausalLM", "LlamaForCausalLM"]
    done = subprocess.run(typed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    _, of_auto, of_llama = done.stdout.split("CLASS\n")
    assert "LOADED" not in done.stdout
    advice = ("pip install slimlm", "'import slimlm' before opening", "Upgrading Transformers does not help")
    assert all(words in of_auto for words in advice) and "MISMATCH" in of_llama


def test_a_folder_with_the_former_sentence_opens(packed: Path, tmp_path: Path) -> None:
    former = Path(shutil.copytree(packed, tmp_path / "former"))
    config = json.loads((former / "config.json").read_text())
    (former / "config.json").write_text(json.dumps({**config, "model_type": checkpoint.FORMER_MODEL_TYPE}))
    ids = torch.arange(9)[None]
    for opened in (slimlm.load, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(opened(former)(ids).logits, opened(packed)(ids).logits)


def test_nan_outside_the_linear_layers_is_named_before_the_work(line: Line, tmp_path: Path, text_file: Path) -> None:
    model = random_model("llama")
    model.get_parameter("model.embed_tokens.weight").data[255, 0] = float("nan")
    folder = save(model, tmp_path / "bad")
    said = line.refused("compress", folder, "-o", tmp_path / "o", "--data", text_file)
    assert "model.embed_tokens.weight holds 1 NaN" in said
    assert "compress 0/" not in said


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ('ignore = ["*.down_porj"]\n', "'*.down_porj' fits no layer"),
        ('ignore = ["*"]\n', "excludes every layer"),
    ],
)
def test_leave_patterns_that_match_nothing_or_everything_are_refused(
    line: Line, llama_folder: Path, tmp_path: Path, text_file: Path, head: str, words: str
) -> None:
    recipe = recipe_file(tmp_path, head + '[[steps]]\nquantize = "absmax"\n')
    assert words in line.refused("compress", llama_folder, "-o", tmp_path / "o", "--recipe", recipe, "--data", text_file)


def test_layers_left_by_the_recipe_stay_dense(llama_folder: Path, tmp_path: Path, text_file: Path) -> None:
    recipe = recipe_file(tmp_path, 'ignore = ["*.down_proj"]\n[[steps]]\nquantize = "absmax"\n')
    result = slimlm.compress(llama_folder, tmp_path / "o", recipe=str(recipe), data=str(text_file), samples=4, length=32)
    assert not any("down_proj" in layer.name for layer in result.record.layers)
    assert result.record.skipped["model.layers.0.mlp.down_proj"] == "ignored by the recipe"
    name = "model.layers.0.mlp.down_proj.weight"
    stored, original = load_file(tmp_path / "o" / "model.safetensors"), load_file(llama_folder / "model.safetensors")
    assert torch.equal(stored[name], original[name])


def test_a_rank_below_one_and_a_repair_of_nothing_are_refused(
    line: Line, llama_folder: Path, tmp_path: Path, text_file: Path
) -> None:
    small = '[[steps]]\nquantize = "absmax"\n[[steps]]\ncompensate = "svd"\nrank = 0.01\n'
    first = '[[steps]]\ncompensate = "svd"\n[[steps]]\nquantize = "absmax"\n'
    for text, words in ((small, "is less than rank 1"), (first, "there is none yet")):
        recipe = recipe_file(tmp_path, text)
        said = line.refused("compress", llama_folder, "-o", tmp_path / "o", "--recipe", recipe, "--data", text_file)
        assert words in said


def test_an_empty_folder_or_a_link_to_one_can_be_written_to(llama_folder: Path, tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("empty", "link"):
        slimlm.compress(llama_folder, tmp_path / name, recipe="absmax", data=str(text_file), samples=4, length=32)
        slimlm.load(tmp_path / name)
    assert (tmp_path / "link").is_symlink()
    assert not list(tmp_path.rglob("*partial*"))


def test_a_run_that_fails_before_its_first_block_is_done_leaves_nothing_behind(
    llama_folder: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slimlm.storage.activations.write_stream", full)
    with pytest.raises(slimlm.SlimlmError, match="No space left"):
        slimlm.compress(llama_folder, tmp_path / "o", recipe="absmax", data=str(text_file), samples=4, length=32)
    assert list(tmp_path.iterdir()) == []


def test_code_that_comes_with_a_model_is_not_run(line: Line, llama_folder: Path, tmp_path: Path, text_file: Path) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "coded"))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "mystery"
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    line.refused("compress", folder, "-o", tmp_path / "o", "--data", text_file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:x"])
def test_a_device_that_is_none_is_refused(line: Line, llama_folder: Path, tmp_path: Path, device: str) -> None:
    assert "device" in line.refused("compress", llama_folder, "-o", tmp_path / "o", "--device", device)


@pytest.mark.parametrize("steps", ['quantize = "absmax"\nbits = 8', 'prune = "wanda"\npattern = "2:4"'])
def test_packed_weights_never_have_the_shape_of_dense_ones(
    llama_folder: Path, tmp_path: Path, text_file: Path, steps: str
) -> None:
    # 8-bit codes, and float16 values of which half stay, fill exactly as many bytes as the dense layer has weights.
    recipe = recipe_file(tmp_path, f"[[steps]]\n{steps}\n")
    slimlm.compress(llama_folder, tmp_path / "o", recipe=str(recipe), data=str(text_file), samples=4, length=32)
    stored = load_file(tmp_path / "o" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].ndim == 1


def test_files_have_the_permissions_that_the_umask_gives(packed: Path) -> None:
    plain = packed.parent / "plain"
    plain.write_text("x")
    assert {file.stat().st_mode for file in packed.iterdir() if file.is_file()} == {plain.stat().st_mode}


def test_a_window_longer_than_the_context_is_refused(line: Line, packed: Path, text_file: Path) -> None:
    said = line.refused("eval", packed, "--text", text_file, "--length", "65")
    assert "--length 65 is more than the model's context of 64 tokens" in said


def test_a_model_s_own_text_is_no_text_to_measure_on(line: Line, packed: Path) -> None:
    assert "'self'" in line.refused("eval", packed, "--text", "self")


def test_no_token_or_home_path_gets_into_a_checkpoint(packed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = "hf_" + "s" * 30
    monkeypatch.setenv("HF_TOKEN", secret)
    model = random_model("llama")
    folder = save(model, tmp_path / "dense")
    (tmp_path / "t.txt").write_text("a b c d e f g h " * 200)
    slimlm.compress(folder, tmp_path / "o", recipe="slim", data=str(tmp_path / "t.txt"), samples=4, length=32)
    for file in (tmp_path / "o").iterdir():
        assert secret.encode() not in file.read_bytes()
        assert str(tmp_path).encode() not in file.read_bytes()


def test_the_dense_class_itself_loads_a_checkpoint_once_slimlm_is_imported(packed: Path) -> None:
    ids = torch.arange(20)[None]
    one = LlamaForCausalLM.from_pretrained(packed)(ids).logits
    assert torch.equal(one, AutoModelForCausalLM.from_pretrained(packed)(ids).logits)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("plan.json", "a recipe's file ends in .toml"),
        ("plan", "a recipe's file ends in .toml"),
        ("there.toml", "it exists already"),
        ("folder.toml", "it exists already"),
        ("nowhere/plan.toml", "there is no such folder"),
        ("there.toml/plan.toml", "there is no such folder"),
    ],
)
def test_a_plan_that_cannot_be_saved_is_refused_before_the_work(line: Line, tmp_path: Path, file: str, words: str) -> None:
    (tmp_path / "there.toml").write_text("precious")
    (tmp_path / "folder.toml").mkdir()
    # There is no model either: the path is looked at before anything is opened.
    said = line.refused("plan", tmp_path / "no-model", "--bits", "4", "--save", tmp_path / file)
    assert "--save" in said and words in said
    assert (tmp_path / "there.toml").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.toml", "there.toml"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--recipe", "slim", "--bits", "4"], "alternation"),
        (["--bits", "1"], "from 1.5 to 8.5"),
        (["--bits", "nan"], "from 1.5 to 8.5"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_before_the_model_is_opened(
    line: Line, tmp_path: Path, more: list[str], words: str
) -> None:
    assert words in line.refused("plan", tmp_path / "no-model", *more)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_dtype_that_is_not_read_is_named_and_not_called_damage(
    line: Line, llama_folder: Path, text_file: Path, tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    odd = next(key for key, tensor in tensors.items() if tensor.ndim == 2)
    tensors[odd] = tensors[odd].to(torch.float8_e4m3fn)
    (folder / "model.safetensors").unlink()
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name, metadata={"format": "pt"})
    said = line.refused("compress", folder, "-o", tmp_path / "o", "--recipe", "absmax", "--data", text_file)
    assert odd in said and "the dtype" in said and "F32" in said and "download" not in said


def test_a_wrong_model_name_with_restart_drops_nothing(line: Line, llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.blocks:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slimlm.compress(llama_folder, tmp_path / "o", recipe="absmax", data=str(text_file), progress=stop)
    kept = sorted(path.name for path in (tmp_path / "o.partial").iterdir())
    assert "no model folder" in line.refused("compress", tmp_path / "typo", "-o", tmp_path / "o", "--restart")
    assert sorted(path.name for path in (tmp_path / "o.partial").iterdir()) == kept


def test_layers_are_ignored_by_a_flag_or_an_argument(line: Line, llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    shared = ("--recipe", "absmax", "--data", text_file, "--samples", 2, "--length", 16)
    ignored = ("--ignore", "*.down_proj", "--ignore", "*.layers.0.*")
    status, _, _ = line("compress", llama_folder, "-o", tmp_path / "typed", *shared, *ignored)
    assert status == 0
    result = slimlm.compress(
        llama_folder,
        tmp_path / "called",
        recipe="absmax",
        data=str(text_file),
        samples=2,
        length=16,
        ignore=("*.down_proj", "*.layers.0.*"),
    )
    names = [row.name for row in result.record.layers]
    assert names and not any(name.endswith("down_proj") or ".layers.0." in name for name in names)
    typed = json.loads((tmp_path / "typed/slimlm.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in typed["layers"]] == names
    assert typed["recipe"]["ignore"] == ["*.down_proj", "*.layers.0.*"]


def test_a_pattern_to_ignore_that_fits_nothing_is_named_by_its_flag(line: Line, llama_folder: Path, tmp_path: Path) -> None:
    said = line.refused("plan", llama_folder, "--recipe", "absmax", "--ignore", "*.down_porj")
    assert "--ignore '*.down_porj' fits no layer" in said
    with pytest.raises(RecipeError, match="`ignore` = 3: give a pattern"):
        slimlm.estimate(llama_folder, recipe="absmax", ignore=3)  # type: ignore[arg-type]
