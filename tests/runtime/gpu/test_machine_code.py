"""What the compiler makes of the GPU kernels for GPUs that are not there: nothing spilled, loads ahead, few instructions.

In processes of their own: where there is no GPU, this one's kernels are interpreted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slimlm.runtime.gpu import device

ROOT = Path(__file__).resolve().parents[3]
RECORD = Path(__file__).with_name("machine_code.json")
pytestmark = pytest.mark.skipif(device.lacks_triton() is not None, reason=f"no compiler: {device.lacks_triton()}")


def measured(*words: str) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "src"), environment.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "tests.runtime.gpu.machine_code", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


def check(found: dict[str, Any], gpu: str) -> None:
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    # Another compiler makes other code: what it must not do is the same, and how many instructions it takes is not.
    same = found.pop("triton") == recorded["triton"]
    assert found and found.keys() <= recorded[gpu].keys()
    for name, counts in found.items():
        assert counts["spills"] == 0, name
        if "stores" in counts:
            assert counts["wide_stores"] == counts["stores"] > 0, name
            assert counts["barriers"] <= 16, name
        else:
            assert counts["copies"] > 0 and counts["per-tensor"] > 0, name
            assert counts["barriers"] <= 4 and counts["to_shared"] <= 8, name
        if same:
            assert counts["per_weight"] == pytest.approx(recorded[gpu][name]["per_weight"], rel=0.1), name


CAPABILITIES = [80, 90, 100]
SOME = ("2:4 fp16 batch 1", "dense 1 spans fp16 batch 64", "unpack 2:4 bf16")
"""A small batch, tensor cores and the unpacked weight; all of them would take minutes."""
SMALLEST_MULTIPROCESSOR = 99 * 1024
"""Bytes of shared memory that a kernel may take on GPUs of compute capability 8.6, 8.9 and 12.0."""


@pytest.mark.parametrize("capability", [90, *(pytest.param(own, marks=pytest.mark.slow) for own in CAPABILITIES if own != 90)])
def test_some_variants_of_each_kind_take_few_instructions(capability: int) -> None:
    check(measured(str(capability), *SOME), f"sm_{capability}")


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_variant_takes_few_instructions(capability: int) -> None:
    found = measured(str(capability))
    assert len(found) - 1 == len(json.loads(RECORD.read_text(encoding="utf-8"))[f"sm_{capability}"])
    check(found, f"sm_{capability}")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [86, 89, 120])
def test_the_built_in_tiles_fit_into_gpus_with_little_shared_memory(capability: int) -> None:
    found = measured("--room", str(capability))
    found.pop("triton")
    assert found and all(taken <= SMALLEST_MULTIPROCESSOR for taken in found.values()), found
