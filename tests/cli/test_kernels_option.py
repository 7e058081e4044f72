"""`--kernels`: kernels are chosen on the command line, and shown."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import Line, needs_kernels

pytestmark = needs_kernels


@pytest.mark.parametrize(("wanted", "said"), [("auto", "fast"), ("fast", "fast"), ("precise", "precise"), ("reference", "")])
def test_generate_is_fast_unless_told_otherwise_and_says_what_ran(packed: Path, wanted: str, said: str, line: Line) -> None:
    asked = [] if wanted == "auto" else ["--kernels", wanted]
    status, _, err = line("generate", packed, "--prompt", "one", "--max-new-tokens", 4, *asked)
    [named] = [text for text in err.splitlines() if text.startswith("kernels: ")]
    assert status == 0
    assert f"made by {'fast decode in the CPU kernels, all blocks in one call' if said else 'fast decode with torch'}" in err
    assert named.endswith(f", {said}; 14 of 14 layers" if said else "kernels: reference; 14 of 14 layers")


def test_eval_is_precise_unless_told_otherwise_and_close_to_the_reference(packed: Path, text_file: Path, line: Line) -> None:
    found = {}
    for wanted in ("auto", "fast", "reference"):
        arguments = ("eval", packed, "--text", text_file, "--length", 32, "--kernels", wanted, "--json")
        status, out, err = line(*arguments)
        [row] = json.loads(out)["models"]
        assert status == 0 and f"kernels: {row['kernels']}" in err
        found[wanted] = row
    assert found["auto"]["kernels"].endswith(", precise; 14 of 14 layers")
    # 16-bit and 8-bit activations; the smallest of models has the largest differences
    assert found["auto"]["perplexity"] == pytest.approx(found["reference"]["perplexity"], rel=1e-3)
    assert found["fast"]["perplexity"] == pytest.approx(found["reference"]["perplexity"], rel=2e-2)


def test_inspect_says_which_layers_kernels_would_take(packed: Path, line: Line) -> None:
    _, out, _ = line("inspect", packed)
    assert "14 of 14 layers" in next(line for line in out.splitlines() if line.startswith("kernels"))
    _, out, _ = line("inspect", packed, "--json")
    assert json.loads(out)["kernels"].endswith("; 14 of 14 layers")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cpu_kernels_are_refused_on_another_device(packed: Path, line: Line) -> None:
    status, _, err = line("generate", packed, "--prompt", "a", "--device", "cuda", "--kernels", "fast")
    assert status == 2 and "run on the CPU" in err
