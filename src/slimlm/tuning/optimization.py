"""The optimizer of a tuner and its rates; its state as tensors, so that a run can be stopped and resumed."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import Adafactor, get_scheduler

from slimlm.tuning.trainable import size_of
from slimlm.tuning.tuner import Tuner

_SMALLEST = 1e-15
"""AdamW's epsilon: gradients shrink with the number of weights, and its usual 1e-8 would drown those of a large layer."""
_STEP = "step"
"""The name of the number of steps in the state of a parameter, which Adafactor keeps as a plain number."""


class Optimization:
    """Parameters and what moves them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], tuner: Tuner, steps: int) -> None:
        """Make the optimizer.

        Args:
            parameters: The trained values by name, of any shapes `[...]`, as they are at the beginning.
            tuner: The settings.
            steps: The number of steps that will be made.
        """
        self._parameters, self._clip = dict(parameters), tuner.clip
        rates = {name: tuner.rate * (size_of(own) if tuner.relative else 1.0) for name, own in parameters.items()}
        groups = [{"params": [own], "lr": rates[name]} for name, own in parameters.items()]
        self._optimizer = _optimizer(groups, tuner)
        self._rates = list(rates.values())
        self._factor = _schedule(tuner, steps)

    def step(self, done: int) -> None:
        """One step by the gradients of the parameters, which are dropped; `done` steps were made before."""
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self._parameters.values(), self._clip)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._factor(done)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """The state, of any shapes `[...]`, by name."""
        found = {}
        for name, own in self._parameters.items():
            for key, value in self._optimizer.state.get(own, {}).items():
                if value is not None:
                    found[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`; what it does not name is as at the beginning."""
        plain = isinstance(self._optimizer, Adafactor)
        for full, tensor in tensors.items():
            name, _, key = full.rpartition("/")
            own = self._parameters[name]
            self._optimizer.state[own][key] = int(tensor) if plain and key == _STEP else tensor.clone().to(own.device)


def _optimizer(groups: list[dict[str, object]], tuner: Tuner) -> torch.optim.Optimizer:
    if tuner.optimizer == "adafactor":
        return Adafactor(groups, scale_parameter=False, relative_step=False, warmup_init=False)
    return torch.optim.AdamW(groups, eps=_SMALLEST, weight_decay=tuner.weight_decay, fused=True)


def _schedule(tuner: Tuner, steps: int) -> Callable[[int], float]:
    """The factor of all rates after so many steps."""
    # A function of the number of steps alone is easier to resume than a scheduler; transformers builds it around an optimizer.
    blank = torch.optim.SGD([nn.Parameter(torch.zeros(1, device="cpu"))], lr=1.0)
    name = "constant_with_warmup" if tuner.schedule == "constant" else tuner.schedule
    scheduler = get_scheduler(name, blank, num_warmup_steps=round(tuner.warm_up * steps), num_training_steps=steps)
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor
