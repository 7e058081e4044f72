"""Threads that wait for work spin briefly and then sleep, unless the user has chosen otherwise or torch was there first."""

import os
import subprocess
import sys

import pytest

from slimlm.runtime import waiting


@pytest.mark.parametrize(
    ("program", "chosen", "policy"),
    [
        ("import slimlm", {}, "3000"),
        ("import slimlm", {"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
        ("import slimlm", {"GOMP_SPINCOUNT": "1000"}, "1000"),
        ("import torch, slimlm", {}, "None"),
    ],
)
def test_the_policy_is_set_where_it_works_and_nobody_has_chosen(program: str, chosen: dict[str, str], policy: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in waiting._POLICIES} | chosen
    program += "; import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == policy


def test_the_user_is_warned_of_threads_that_spin_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in waiting._POLICIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (4.0, 9.0, 9.0))
    assert waiting.spinning_on_a_busy_machine(2) is None
    monkeypatch.setattr(os, "getloadavg", lambda: (6.5, 0.0, 0.0))
    message = waiting.spinning_on_a_busy_machine(2)
    assert message is not None and "load 6.5, 4 cores" in message
    assert waiting.spinning_on_a_busy_machine(1) is None
    assert waiting.policy() == "OpenMP's default"
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert waiting.policy() == "OMP_WAIT_POLICY=PASSIVE"
    assert waiting.spinning_on_a_busy_machine(2) is None
