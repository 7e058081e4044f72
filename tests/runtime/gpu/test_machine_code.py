"""What the compiler makes of the GPU kernels for cards that are not there: nothing spilled, loads ahead, few instructions.

In processes of their own: where there is no card, this one's kernels are interpreted.
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


def check(found: dict[str, Any], card: str) -> None:
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    if found.pop("triton") != recorded["triton"]:
        pytest.skip(f"the record is of Triton {recorded['triton']}; another one makes other code")
    assert found.keys() <= recorded[card].keys()
    for name, counts in found.items():
        expected = recorded[card][name]
        assert counts["spills"] == 0, name
        assert counts["copies"] > 0 and counts["tensor"] > 0, name
        assert counts["barriers"] <= 4 and counts["to_shared"] <= 8, name
        assert counts["per_weight"] == pytest.approx(expected["per_weight"], rel=0.1), name


def test_one_token_by_a_2_4_weight_is_lean_on_hopper() -> None:
    found = measured("90", "2:4 fp16 batch 1")
    check(found, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_variant_is_lean(capability: int) -> None:
    found = measured(str(capability))
    assert len(found) - 1 == len(json.loads(RECORD.read_text(encoding="utf-8"))[f"sm_{capability}"])
    check(found, f"sm_{capability}")
