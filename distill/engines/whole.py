"""Whole copies of a model whose own weights lie in shards."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from distill.engines.plain import share_buffers


class Blank:
    """An objective and the model in it as they were before their weights went into shards."""

    def __init__(self, objective: nn.Module, model: nn.Module) -> None:
        self.objective = copy.deepcopy(objective).to("meta")
        self.place = next(name for name, module in objective.named_modules() if module is model)

    @property
    def state(self) -> dict[str, Tensor]:
        """Names and shapes of the model's weights and buffers."""
        return self.objective.get_submodule(self.place).state_dict()

    @torch.no_grad()
    def filled(self, fill: Callable[[str, Tensor], None], *, device: torch.device) -> nn.Module:
        """A copy whose tensors `fill` is given one by one, in every process in the same order.

        Its forwards do not wait for other processes.
        """
        objective = copy.deepcopy(self.objective).to_empty(device=device)
        for name, tensor in objective.get_submodule(self.place).state_dict().items():
            fill(name, tensor)
        return share_buffers(objective)

    def model_of(self, objective: nn.Module) -> nn.Module:
        """The model in a filled copy."""
        return objective.get_submodule(self.place)
