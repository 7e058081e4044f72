"""One tree of errors. Each message says what was asked, what was found and what would work.

The command line prints the message alone and leaves with status 2; a traceback appears only with `--debug`.
"""


class SlimlmError(Exception):
    """Whatever slimlm refuses or cannot do, in words."""


class RecipeError(SlimlmError):
    """A recipe, a method name or an option that makes no sense."""


class ModelError(SlimlmError):
    """A model that cannot be found, read or compressed."""


class DataError(SlimlmError):
    """Calibration or evaluation text that cannot be found or is too short."""


class CheckpointError(SlimlmError):
    """A checkpoint that is damaged, newer than this program, or in the way."""


class NumericsError(SlimlmError):
    """NaN or infinity where a number was needed."""


class StatisticError(SlimlmError):
    """A step that reads a statistic which it did not declare, or which its layer does not have."""


class KernelError(SlimlmError):
    """Kernels that were asked for and cannot be had."""


class UnknownDtypeError(CheckpointError):
    """A tensor of a dtype that slimlm does not read."""


class DoesNotFitError(SlimlmError):
    """Memory or disk surely do not suffice for what was asked."""


class RanksError(SlimlmError):
    """One of several processes that work together has ended, so the others end too."""

    def __init__(self, words: str, *, speaks: bool = False) -> None:
        super().__init__(words)
        self.speaks = speaks
        """whether this process is to tell the user, although it is not the first"""
