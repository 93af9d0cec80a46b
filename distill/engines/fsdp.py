"""Steps on torch's FSDP2: each process keeps a shard of weights, gradients and AdamW's state."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from distill.dist import joined_part
from distill.engines.plain import Engine, average_tensors
from distill.engines.whole import Blank
from distill.recipe import FullySharded


class FSDPEngine(Engine):
    """Engine of which each block is a unit of `fully_shard`, and all the rest is another one.

    Every micro-batch's gradients are exchanged at once, so that none is ever whole for long.
    """

    forwards_together = True

    def __init__(
        self, objective: nn.Module, model: nn.Module, section: FullySharded, **settings
    ) -> None:
        self.section = section
        super().__init__(objective, model, **settings)

    def _build(self, groups: list[dict] | None) -> None:
        self.blank = Blank(self.plain, self.model)
        self.objective.to(self.device)
        mesh = init_device_mesh(self.device.type, (self.num_ranks,))
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=self.section.reshard)
        fully_shard(self.objective, mesh=mesh, reshard_after_forward=False)
        self._make_optimizer(groups)
        self.ema: dict[str, Tensor] | None = None
        if self.optim.ema is not None:
            state = self.model.state_dict()
            self.ema = {name: tensor.detach().clone() for name, tensor in state.items()}

    @contextmanager
    def _in_piece(self, *, is_last: bool) -> Iterator[None]:
        yield

    def _grad_norm(self) -> Tensor:
        norm = super()._grad_norm()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _average(self) -> None:
        if self.ema is not None:
            shards = [
                [_local(tensor) for tensor in tensors.values()]
                for tensors in (self.ema, self.model.state_dict())
            ]
            average_tensors(*shards, decay=self.optim.ema)

    def trained(self) -> nn.Module:
        return self.blank.model_of(self.trained_objective())

    def trained_objective(self) -> nn.Module:
        return self._filled(self.model.state_dict())

    def averaged(self) -> nn.Module:
        return self.blank.model_of(self._filled(self.ema))

    def _filled(self, shards: Mapping[str, Tensor]) -> nn.Module:
        return self.blank.filled(
            lambda name, tensor: tensor.copy_(_whole(shards[name])), device=self.device
        )

    def weights(self) -> dict[str, Tensor]:
        return _gather(self.model.state_dict())

    def ema_weights(self) -> dict[str, Tensor] | None:
        return None if self.ema is None else _gather(self.ema)

    def optimizer_state(self) -> dict[str, Tensor]:
        return _gather(super().optimizer_state())

    @torch.no_grad()
    def _load_weights(
        self, weights: Mapping[str, Tensor], ema: Mapping[str, Tensor] | None
    ) -> None:
        _fill(self.model.state_dict(), weights)
        if self.ema is not None:
            _fill(self.ema, ema)

    def _placed(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        value = super()._placed(value, parameter)
        return _shard(value, parameter) if value.ndim else value


def _local(tensor: Tensor) -> Tensor:
    """A process's own part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor


def _shard(value: Tensor, like: DTensor) -> DTensor:
    """Each process's part of a whole tensor that all of them have."""
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _gather(shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, one after the other, in the first process's memory; others have nothing."""
    found = {}
    for name, shard in shards.items():
        tensor = _whole(shard)
        if joined_part().index == 0:
            found[name] = tensor.cpu()
    return found


def _fill(shards: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name, shard in shards.items():
        value = weights[name].to(shard.device)
        _local(shard).copy_(_local(_shard(value, shard)) if isinstance(shard, DTensor) else value)
