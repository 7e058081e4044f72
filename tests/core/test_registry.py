"""Methods of other packages, registered by entry points: as where such a package is installed beside slimlm."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import slimlm
from slimlm.core import registry
from slimlm.core.errors import RecipeError
from slimlm.inference.load import read_description
from slimlm.planner.options import methods_with_options
from slimlm.recipe import open_recipe, recipe_from_dict
from tests.conftest import Line

METHOD = """
from dataclasses import dataclass
from typing import ClassVar

from slimlm.core.layer import Layer
from slimlm.core.statistics.base import Batch, Mean, Needs, Sizes, Stats
from slimlm.core.step import StepDefaults
from slimlm.methods.quantize.absmax import AbsMax


class MeanRoot(Mean):
    @classmethod
    def shape(cls, sizes: Sizes) -> tuple[int, ...]:
        return (sizes.inputs,)

    def of(self, batch: Batch):
        return batch.inputs.abs().sqrt().sum(dim=0)


@dataclass(frozen=True)
class Mine(StepDefaults):
    #

    bits: int = 3
    needs: ClassVar[Needs] = frozenset({MeanRoot})

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        assert stats[MeanRoot].shape == (layer.shape[1],)
        return AbsMax(bits=self.bits)(layer, stats)
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """A function that installs a package with entry points of slimlm's group, for one test."""

    def forget() -> None:
        for function in (registry.names, registry.find, registry._entry_points):
            function.cache_clear()

    def install(package: str, *lines: str, code: str = METHOD) -> None:
        (tmp_path / f"{package}.py").write_text(code)
        about = tmp_path / f"{package}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text("\n".join(["[slimlm.methods]", *lines, ""]))
        forget()

    monkeypatch.syspath_prepend(tmp_path)
    yield install
    monkeypatch.undo()
    forget()


def test_a_method_of_another_package_is_listed_and_compresses(
    install: Install, llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    install("their_methods", "quantize.mine = their_methods:Mine")
    assert "mine" in registry.names("quantize") and registry.find("quantize", "mine").__module__ == "their_methods"
    steps = {"steps": [{"quantize": "mine", "bits": 5}]}
    found = slimlm.compress(llama_folder, tmp_path / "o", recipe=steps, data=text_file, samples=4, length=32)
    assert found.record.recipe["steps"] == [{"quantize": "mine", "bits": 5}]
    assert all("5-bit" in entry.parts.summary() for entry in read_description(tmp_path / "o").layers.values())


def test_a_module_with_one_method_can_be_named_in_place_of_its_class(install: Install) -> None:
    install("module_methods", "quantize.mine = module_methods")
    assert registry.find("quantize", "mine").__name__ == "Mine"


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("absmax", "quantize.absmax = clashing:Mine", "slimlm and the package clashing each have a quantizer 'absmax'"),
        (
            "mine",
            "quantize.mine = no_such_module:Mine",
            "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        (
            "mine",
            "quantize.mine = clashing:Other",
            "cannot be imported: AttributeError: module 'clashing' has no attribute 'Other'",
        ),
        ("mine", "quantize.mine = clashing:Layer.of", "which is no method; name a frozen dataclass"),
        ("mine", "quantize.mine = clashing:MeanRoot", "which is no method; name a frozen dataclass"),
        (
            "mine",
            "mine = clashing:Mine",
            "the package clashing registers 'mine' as a method of slimlm; the name must be",
        ),
        ("mine", "quantise.mine = clashing:Mine", "one of these kinds: quantize, prune, compensate, joint"),
    ],
)
def test_what_is_wrong_with_a_registered_method_is_said(install: Install, name: str, line: str, said: str) -> None:
    install("clashing", line)
    with pytest.raises(RecipeError, match=re.escape(said)):
        registry.find("quantize", name)


@pytest.mark.parametrize(
    ("entry", "code", "listed"),
    [
        ("mine = broken:Mine", METHOD, "mine cannot be used: the package broken registers 'mine' as a method"),
        (
            "quantize.mine = broken:Mine",
            "def (",
            "quantize.mine cannot be used: the package broken .* SyntaxError: ",
        ),
        ("quantize.mine = broken:Mine", "1 / 0", "quantize.mine cannot be used: the package broken .* ZeroDivisionError: div"),
    ],
)
def test_one_method_that_cannot_be_used_keeps_no_other_from_being_used(
    install: Install, line: Line, entry: str, code: str, listed: str
) -> None:
    install("broken", entry, code=code)
    assert open_recipe("best-24").steps and methods_with_options()
    status, out, _ = line("methods")
    assert status == 0 and re.search(listed, " ".join(out.split()))
    assert any(name in ("mine", "quantize.mine") for name in json.loads(line("methods", "--json")[1])["unusable"])
    assert re.search("the package broken registers", line.refused("methods", "mine"))
    with pytest.raises(RecipeError, match="the package broken registers"):
        recipe_from_dict({"steps": [{"quantize": "mine"}]}, source="recipe")


def test_two_packages_with_one_name_are_refused_where_it_is_used(install: Install) -> None:
    install("first", "prune.mine = first:Mine")
    install("second", "prune.mine = second:Mine")
    assert registry.find("quantize", "absmax").__name__ == "AbsMax"
    with pytest.raises(RecipeError, match=r"the package \w+ and the package \w+ each have a pruner 'mine'"):
        registry.find("prune", "mine")
