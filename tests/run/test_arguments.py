"""Arguments of any type are accepted or refused by name: nothing but slimlm's errors comes out."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import slimlm
from slimlm.core import arguments
from slimlm.core.errors import SlimlmError
from slimlm.evaluation.perplexity import perplexity
from slimlm.inference.generate import generate
from slimlm.run.config import RunConfig

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**70,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "a\0b",
    "x" * 5000,
    "\udc80",
    b"x",
    [],
    [1],
]
ODD += [
    {},
    {"a": 1},
    {1: 2},
    set(),
    object(),
    torch.nn.Linear(2, 2),
    torch.tensor([1.0, 2.0]),
    numpy.array([1, 2]),
    1j,
    range(3),
]
ODD += [iter([1]), torch.float32, ..., slimlm, Path("no-such"), "cpu:7", "meta", torch.device("cpu"), numpy.float32(2.5)]
OPTIONS = ("recipe", "bits", "objective", "embedding_bits", "data", "samples", "length", "seed", "device", "memory")


def only_slimlm_errors(function: Any, *given: Any, **named: Any) -> None:
    """Call a function, which may succeed or refuse."""
    try:
        function(*given, **named)
    except SlimlmError as error:
        assert str(error)


@pytest.mark.parametrize("option", [*OPTIONS, "notify", "model", "out"])
def test_a_configuration_takes_or_refuses_every_value(option: str, llama_folder: Path, text_file: Path) -> None:
    given = {"model": llama_folder, "recipe": "absmax", "data": str(text_file), "samples": 2, "length": 16}
    for value in ODD:
        if option == "notify":
            only_slimlm_errors(slimlm.estimate, llama_folder, notify=value if not callable(value) else print, recipe="absmax")
        else:
            only_slimlm_errors(RunConfig.of, **{**given, option: value})


@pytest.mark.parametrize("option", ["restart", "progress", "notify", "model", "out", "data"])
def test_compress_takes_or_refuses_every_value(option: str, llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    for i, value in enumerate(value for value in ODD if not callable(value) and value is not True):
        given = {"model": llama_folder, "out": tmp_path / f"o{i}", "recipe": "absmax", "data": str(text_file)}
        given |= {"samples": 2, "length": 16, "restart": 7, option: value}  # refused in any case, so that it is quick
        with pytest.raises(SlimlmError):
            slimlm.compress(**given)
        assert not (tmp_path / f"o{i}").exists()


def test_what_opens_and_runs_a_model_takes_or_refuses_every_value(packed: Path) -> None:
    model, tokens = slimlm.load(packed), torch.tensor([[1, 2, 3]])
    for value in ODD:
        only_slimlm_errors(slimlm.open_recipe, value)
        only_slimlm_errors(slimlm.verify, value)
        only_slimlm_errors(slimlm.use_kernels, model, value)
        only_slimlm_errors(generate, model, value, max_new_tokens=2)
        only_slimlm_errors(perplexity, model, value)
        if value is not None:
            with pytest.raises(SlimlmError):
                slimlm.verify(packed, value)
        for option in ("dtype", "kernels", "keep", "device"):
            only_slimlm_errors(
                slimlm.load, value if option == "dtype" else packed, **{} if option == "dtype" else {option: value}
            )
        for option in ("max_new_tokens", "temperature", "seed", "stop_tokens"):
            only_slimlm_errors(generate, model, tokens, **{"max_new_tokens": 2, option: value})
        if not isinstance(value, torch.nn.Module):
            with pytest.raises(SlimlmError, match="give an opened model"):
                slimlm.use_kernels(value, "auto")
            with pytest.raises(SlimlmError, match="give an opened model"):
                slimlm.prepare(value)
            with pytest.raises(SlimlmError, match="give an opened model"):
                generate(value, tokens, max_new_tokens=1)


def test_a_model_in_memory_is_refused_with_what_would_work(tmp_path: Path) -> None:
    with pytest.raises(SlimlmError, match=r"`model` is of type Linear; give the folder .* save_pretrained\(folder\)"):
        slimlm.compress(torch.nn.Linear(2, 2), tmp_path / "o")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    with pytest.raises(SlimlmError, match="`source` is of type int"):
        slimlm.load(42)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_token_ids_may_be_whole_numbers_of_any_size(dtype: torch.dtype, packed: Path) -> None:
    model, ids = slimlm.load(packed), torch.arange(32).view(2, 16)
    written = generate(model, ids, max_new_tokens=3).tokens
    assert torch.equal(generate(model, ids.to(dtype), max_new_tokens=3).tokens, written)
    assert perplexity(model, ids.to(dtype)) == perplexity(model, ids)
    assert slimlm.verify(packed, ids.to(dtype)) == slimlm.verify(packed, ids)


@pytest.mark.parametrize(
    ("given", "bytes_"),
    [
        ("8GiB", 8 * 2**30),
        ("1.5 mb", 1_500_000),
        ("10", 10),
        (10, 10),
        (numpy.int64(10), 10),
        ("2G", 2 * 10**9),
        ("1.1TB", 1_100_000_000_000),
    ],
)
def test_sizes_may_have_units(given: Any, bytes_: int) -> None:
    assert arguments.size(given, "memory") == bytes_


@pytest.mark.parametrize("given", ["8 GiBs", "", "-1", 0, -5, True, None, 1.5, "nan"])
def test_what_is_no_size_is_refused_with_an_example(given: Any) -> None:
    with pytest.raises(SlimlmError, match=r"`memory=.*`: give a number of bytes, or a size such as 8GB"):
        arguments.size(given, "memory")


def test_sensible_values_of_other_types_are_accepted(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    plain = slimlm.compress(llama_folder, tmp_path / "a", recipe="absmax", data=str(text_file), samples=4, length=32)
    recipe = {"steps": [{"quantize": "absmax"}]}
    other = slimlm.compress(
        str(llama_folder),
        str(tmp_path / "b"),
        recipe=recipe,
        data=text_file,
        samples=numpy.int64(4),
        length=32,
        device=torch.device("cpu"),
        memory="8GiB",
    )
    assert plain.record.layers == other.record.layers
