"""This process's rank, from the environment that a launcher (torchrun, or a compatible one) sets; imports no torch."""

import os

from slimlm.core.errors import RanksError, SlimlmError

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int:
    """The number of ranks that the launcher started; 1 without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if all(os.environ.get(name) for name in _NEEDED) else 1


def global_rank() -> int:
    """This process's number among the ranks, counted from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_rank() -> int:
    """This process's number among the ranks on this machine, counted from 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


def reports(error: SlimlmError) -> bool:
    """Whether this rank is the one to report an error to the user."""
    return global_rank() == 0 or (isinstance(error, RanksError) and error.reported_here)
