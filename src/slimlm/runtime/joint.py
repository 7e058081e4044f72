"""Calls of linear layers without the cost of `nn.Module.__call__`, and of several layers that share an input."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F


def direct(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the module computes, called with the least ceremony; hooks are not run, so the caller must know of none.

    Weights are looked up now: a module that is moved, cast or swapped afterwards needs a new call of this function.
    """
    if type(module) is nn.Linear:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    return module.forward


def joint(modules: Sequence[nn.Module]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """One call for layers that share their input `[tokens, in]`; gives their outputs `[tokens, out]` in order.

    The outputs are the caller's to change; they may be views of one tensor. Here each layer is called in turn: a backend
    whose layers can be multiplied together joins them in this place.
    """
    calls = [direct(module) for module in modules]
    if len(calls) == 2:
        first, second = calls
        return lambda x: (first(x), second(x))
    return lambda x: tuple([call(x) for call in calls])
