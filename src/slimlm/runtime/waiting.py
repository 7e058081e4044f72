"""How torch's threads wait for work: they spin for microseconds, then sleep, unless the user has chosen otherwise.

Between two parallel operations OpenMP's threads spin, by default for some milliseconds each time. On a machine with other work
that takes the processor from the threads that compute, and a run becomes slower by a factor of four and more. Threads that
sleep at once cost an idle machine much of that again: `slim` on the bundled model takes 1.7 times as long. A short spin costs
neither (benchmarks/busy.py). OpenMP reads the settings once, when torch is imported. Nothing heavy is imported here.
"""

import os
import sys

_POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""The environment variables by which a user chooses, of OpenMP and of the two implementations that torch comes with."""


BRIEFLY = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "1"}
"""Some 10 microseconds in GNU's OpenMP, whose default is a hundred times as long; a millisecond, its least, in LLVM's (200)."""


def wait_briefly() -> None:
    """Make threads spin briefly where torch is still to be imported and the user has chosen nothing; children inherit it."""
    if "torch" not in sys.modules and not _chosen():
        os.environ |= BRIEFLY


def spinning_on_a_busy_machine(threads: int) -> str | None:
    """A message for the user where several threads spin and other programs want the processor; None elsewhere."""
    if threads < 2 or _chosen() or not hasattr(os, "getloadavg"):
        return None
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores:
        return None
    return (
        f"the machine is busy (load {load:.1f}, {cores} cores), and torch was imported before slimlm, so that its threads spin "
        "while they wait, which slows the run down a lot. Import slimlm first, or set the environment variable "
        "GOMP_SPINCOUNT=3000 before Python starts"
    )


def policy() -> str:
    """What the environment says of how threads wait, such as "GOMP_SPINCOUNT=3000"; else "OpenMP's default"."""
    return ", ".join(f"{name}={os.environ[name]}" for name in _POLICIES if name in os.environ) or "OpenMP's default"


def _chosen() -> bool:
    return any(name in os.environ for name in _POLICIES)
