"""One tree of errors. Each message says what was asked, what was found and what would work.

A message names a Python argument in backticks, alone or with its value: `samples`, `restart=True`, `device="cpu"`. The command
line writes the flag of the running verb in its place (slimlm.cli.verb).
"""


class SlimlmError(Exception):
    """Base of all errors: slimlm refuses something or cannot do it."""


class RecipeError(SlimlmError):
    """A recipe, a method name or an option that is invalid."""


class ModelError(SlimlmError):
    """A model that cannot be found, read or compressed."""


class DataError(SlimlmError):
    """Calibration or evaluation text that cannot be found or is too short."""


class CheckpointError(SlimlmError):
    """A checkpoint that is damaged, of another format version, or would be overwritten."""


class NumericsError(SlimlmError):
    """NaN or infinity where a number was needed."""


class StatisticError(SlimlmError):
    """A step that reads a statistic which it did not declare, or which its layer does not have."""


class KernelError(SlimlmError):
    """Kernels that were asked for and are not available."""


class UnknownDtypeError(CheckpointError):
    """A tensor of a dtype that slimlm does not read."""


class DoesNotFitError(SlimlmError):
    """Memory or disk cannot suffice for what was asked."""


class RanksError(SlimlmError):
    """One of several processes that work together has ended, so the others end too."""

    def __init__(self, message: str, *, reported_here: bool = False) -> None:
        super().__init__(message)
        self.reported_here = reported_here
        """whether this process reports it to the user, although it is not the first"""


_OUT_OF_MEMORY = ("out of memory", "not enough memory", "allocate memory", "can't start new thread")
"""What torch and Python say where the memory of a GPU, of the CPU or of a thread's stack runs out, in plain RuntimeErrors."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in _OUT_OF_MEMORY)
    )


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 300 characters; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
