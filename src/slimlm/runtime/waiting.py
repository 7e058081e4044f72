"""How torch's threads wait for work: asleep, unless the user has chosen otherwise. Nothing heavy is imported here.

Between two parallel operations OpenMP's threads spin, for some milliseconds each time. On a machine with other work that takes
the processor from the threads that compute, and a run becomes slower by a factor of ten and more; asleep they cost about 10
microseconds per operation (benchmarks/busy.py). OpenMP reads the policy once, when torch is imported.
"""

import os
import sys

_POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""The environment variables by which a user chooses, of OpenMP and of the two implementations that torch comes with."""


def sleep_while_waiting() -> None:
    """Make threads sleep where torch is still to be imported and the user has chosen nothing; child processes inherit it."""
    if "torch" not in sys.modules and not _chosen():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


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
        "OMP_WAIT_POLICY=PASSIVE before Python starts"
    )


def policy() -> str:
    """What the environment says of how threads wait, such as "OMP_WAIT_POLICY=PASSIVE"; else "OpenMP's default"."""
    return ", ".join(f"{name}={os.environ[name]}" for name in _POLICIES if name in os.environ) or "OpenMP's default"


def _chosen() -> bool:
    return any(name in os.environ for name in _POLICIES)
