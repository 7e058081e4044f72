"""Every file beside a model's weights is copied, or named with the reason why it is left out."""

from pathlib import Path

import pytest

import slimlm
from slimlm.record import COPIED
from tests.conftest import random_model, save

COPIES = {
    "LICENSE": "MIT", "NOTICE.txt": "x", "preprocessor_config.json": "{}", "processor_config.json": "{}",
    "tokenizer.model": "x", "chat_template.json": "{}", "special.tiktoken": "x",
}  # fmt: skip
LEFT = {
    "README.md": "description", "model.py": "Python", "optimizer.pt": "training", "trainer_state.json": "training",
    ".gitattributes": "hidden", "consolidated.00.pth": "weights", "pytorch_model.bin": "weights", "model.onnx": "weights",
    "flax_model.msgpack": "weights", "notes.docx": "not a kind of file",
}  # fmt: skip


def test_licence_and_processor_are_copied_and_everything_else_is_named(tmp_path: Path, text_file: Path) -> None:
    folder = save(random_model("llama"), tmp_path / "m")
    for name, text in {**COPIES, **dict.fromkeys(LEFT, "x")}.items():
        (folder / name).write_text(text)
    (folder / "1_Pooling").mkdir()
    (folder / "gone.json").symlink_to("nowhere.json")
    out = slimlm.compress(folder, tmp_path / "o", recipe="absmax", samples=2, length=16, data=str(text_file))
    source = out.record.source
    assert source is not None and source.files.keys() == {path.name for path in folder.iterdir()}
    for name, text in COPIES.items():
        assert source.files[name] == COPIED and (out.path / name).read_text() == text
    for name, reason in {**LEFT, "1_Pooling": "a folder", "gone.json": "leads nowhere"}.items():
        assert reason in source.files[name] and not (out.path / name).exists()
    assert sorted(source.files_left_out) == sorted([*LEFT, "1_Pooling", "gone.json"])
    assert source.files["config.json"] == source.files["tokenizer.json"] == "replaced by the checkpoint's own"
    assert slimlm.verify(out.path).sound
    (out.path / "LICENSE").unlink()
    assert slimlm.verify(out.path).problems == ("LICENSE is missing",)


@pytest.mark.parametrize("name", ["config.json", "slimlm.json", "model.safetensors"])
def test_a_file_of_the_original_never_replaces_one_of_the_checkpoint(name: str, tmp_path: Path, text_file: Path) -> None:
    folder = save(random_model("llama"), tmp_path / "m")
    if not (folder / name).exists():
        (folder / name).write_text("not a record")
    out = slimlm.compress(folder, tmp_path / "o", recipe="absmax", samples=2, length=16, data=str(text_file)).path
    assert slimlm.verify(out).sound
