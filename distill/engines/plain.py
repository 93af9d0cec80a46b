"""Optimiser steps in plain torch, on one device or on one for each process that has joined.

The training loop knows only this interface. `distill.engines` says what else has it.
"""

import copy
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.distributed import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from distill import draw, recipe
from distill.dist import everyones, joined_part
from distill.errors import StateError
from distill.optim import param_groups, set_lr

logger = logging.getLogger(__name__)

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Upstream's DeepSpeed settings for fp16: start of the loss scale, good steps before it doubles.
LOSS_SCALE_START = 2.0**16
LOSS_SCALE_WINDOW = 500
LOSS_SCALE_FLOOR = 1.0


def pick_device() -> torch.device:
    """The first CUDA device, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seed_generators(seed: int) -> None:
    """Seed every global generator, from which the weights of a new model are drawn."""
    number = draw.key("global", seed) & 0xFFFFFFFF  # as wide as NumPy takes
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


@contextmanager
def reproducible(device: torch.device, *, seed: int) -> Iterator[None]:
    """Seed every global generator and, on a CPU, take deterministic algorithms only.

    Without them, threads add up the gradients of gathered rows in an order of their own.
    """
    seed_generators(seed)
    before = torch.get_deterministic_debug_mode()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    if device.type == "cpu":
        # As use_deterministic_algorithms(True), which imports the compiler for seconds.
        torch.set_deterministic_debug_mode("error")
        torch.utils.deterministic.fill_uninitialized_memory = False  # only hides what it costs
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context for a forward pass in `precision` ("fp32", "bf16" or "fp16")."""
    return torch.autocast(device.type, dtype=AUTOCAST.get(precision), enabled=precision != "fp32")


def to_device(batch: Mapping, device: torch.device) -> dict:
    """Move a batch's tensors without waiting for it; everything else stays as it is."""

    def move(value: Tensor) -> Tensor:
        if device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()  # a copy from other memory would make the host wait
        return value.to(device, non_blocking=True)

    return {
        name: move(value) if isinstance(value, Tensor) else value for name, value in batch.items()
    }


def split_batch(batch: Mapping, size: int | None) -> list[dict]:
    """Cut a batch of batch-first tensors into pieces of at most `size` clips."""
    count = len(batch["clip_id"])
    size = size or count
    return [
        {
            name: value[start : start + size] if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        for start in range(0, count, size)
    ]


def average_weights(average: nn.Module, model: nn.Module, *, decay: float) -> None:
    """Move `average` by 1 - `decay` of its way to `model`, buffers included; counts are copied.

    Unlike torch's `AveragedModel`, it does not make the host wait for the device.
    """
    average_tensors(average.state_dict().values(), model.state_dict().values(), decay=decay)


@torch.no_grad()
def average_tensors(average: Iterable[Tensor], values: Iterable[Tensor], *, decay: float) -> None:
    """As `average_weights`, of tensors in the same order."""
    pairs = list(zip(average, values, strict=True))
    real = [pair for pair in pairs if pair[0].is_floating_point()]
    get_ema_multi_avg_fn(decay)(*map(list, zip(*real, strict=True)), None)
    for ours, theirs in pairs:
        if not ours.is_floating_point():
            ours.copy_(theirs)


def share_buffers(model: nn.Module) -> nn.Module:
    """Give a model in every process the first one's running statistics; the model."""
    if joined_part().count > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, src=0)
    return model


class Engine:
    """Runs optimiser steps on `objective` and holds what they change.

    Where processes have joined, each has its share of a batch and ends a step with the same
    weights as the others, which one process with the whole batch would have within rounding.
    `model` is the part of the objective whose weights are trained and saved, and `prepare` turns
    a batch as it was read into one that the objective takes. With `optim.ema` there is an average
    of the weights that every step leaves; it begins with those of the start. `groups` are
    the optimiser's where they are not those of `param_groups`.

    What it gives for a checkpoint and takes from one are whole tensors by the model's names, the
    same for every engine, so that a run may go on with another. All processes ask for it
    together; where none has a whole model, it is the first one that is given them.
    """

    forwards_together = False  # whether a forward waits for those of the other processes
    adamw_class = torch.optim.AdamW

    def __init__(
        self,
        objective: nn.Module,
        model: nn.Module,
        *,
        optim: recipe.Optim,
        prepare: Callable[[dict], dict],
        device: torch.device,
        groups: list[dict] | None = None,
    ) -> None:
        self.objective, self.model = objective, model
        self.plain = objective  # as it is without an engine around it
        self.prepare, self.optim, self.device = prepare, optim, device
        self.num_ranks = joined_part().count
        self.scaler = torch.amp.GradScaler(
            device.type,
            enabled=optim.precision == "fp16",
            init_scale=LOSS_SCALE_START,
            growth_interval=LOSS_SCALE_WINDOW,
        )
        # A factor of the loss: NaN from the first non-finite step on, so that no later one trains.
        self.poison = torch.ones((), device=device)
        self.unchecked: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self._build(groups)

    def _build(self, groups: list[dict] | None) -> None:
        """Place the model and make its optimiser and average."""
        self.objective = self.objective.to(self.device)
        self.ema_model: nn.Module | None = None
        if self.optim.ema is not None:
            self.ema_model = copy.deepcopy(self.model).requires_grad_(False).eval()
        if self.num_ranks > 1:
            self.objective = DistributedDataParallel(
                self.objective,
                device_ids=None if self.device.index is None else [self.device.index],
            )
            if self.device.type == "cpu":
                self.objective.register_comm_hook(None, average_in_order)
        self._make_optimizer(groups)

    def _make_optimizer(self, groups: list[dict] | None) -> None:
        optim = self.optim
        groups = param_groups(self.model, optim) if groups is None else groups
        self.names = {
            name: parameter
            for group in groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
        }
        # Only the fused form can leave a step out by a flag that lies on the device.
        self.adamw = self.adamw_class(
            groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True
        )

    def step(self, batch: dict, *, step: int, lr: float | Sequence[float]) -> dict[str, Tensor]:
        """Accumulate over micro-batches, clip, update; returns means over all the batch's clips.

        The results stay on the device: losses by name and `grad_norm`, the norm before clipping,
        in float32. Micro-batches count by their clips, so that they equal one large batch.

        Raises StateError at a non-finite loss, naming step and clips, with the weights as they
        were before the step: on the CPU at once, on a GPU in the next `check`, because asking
        after every step would make the GPU wait for us.
        """
        set_lr(self.adamw.param_groups, lr)
        losses: dict[str, Tensor] = {}
        num_clips = batch.get("num_clips", len(batch["clip_id"]))  # of all processes
        pieces = self._pieces(batch)
        for number, piece in enumerate(pieces, 1):
            # A process that no clip was left for goes along with one that counts for nothing.
            weight = 0.0 if piece.get("is_spare") else len(piece["clip_id"]) / num_clips
            inputs = self.prepare(to_device(piece, self.device))
            with self._in_piece(is_last=number == len(pieces)):
                with autocast(self.device, self.optim.precision):
                    outputs = self.objective(inputs)
                # Gradients are averaged over the processes, but their clips add up.
                self._backward(outputs["loss"] * (weight * self.num_ranks) * self.poison)
            for name, value in outputs.items():
                losses[name] = losses.get(name, 0.0) + value.detach().float() * weight
        if self.num_ranks > 1:
            losses = _add_up(losses)
        norm = self._finish_step(losses["loss"])
        self.unchecked.append((step, batch["clip_id"], losses["loss"], norm))
        losses["grad_norm"] = norm
        if self.device.type == "cpu":
            self.check()
        return losses

    def _pieces(self, batch: dict) -> list[dict]:
        """A batch's micro-batches; where forwards wait for each other, as many in each process."""
        size = self.optim.micro_batch
        pieces = split_batch(batch, size)
        if self.forwards_together and size:
            most = -(-batch.get("most_clips", len(batch["clip_id"])) // size)
            pieces += [{**pieces[-1], "is_spare": True}] * (most - len(pieces))
        return pieces

    @contextmanager
    def _in_piece(self, *, is_last: bool) -> Iterator[None]:
        """Gradients are exchanged in the last backward of a step alone."""
        is_silent = self.num_ranks > 1 and not is_last
        with self.objective.no_sync() if is_silent else nullcontext():
            yield

    def _backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def _finish_step(self, loss: Tensor) -> Tensor:
        """Clip and update with the gradients of a whole step, of the mean `loss`; their norm."""
        self.scaler.unscale_(self.adamw)
        norm = self._grad_norm()
        if self.optim.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.names.values(), self.optim.clip_grad, norm)
        self._judge(loss, norm)
        self._update()
        return norm

    def _grad_norm(self) -> Tensor:
        """The norm of the whole gradient."""
        grads = [parameter.grad for parameter in self.names.values() if parameter.grad is not None]
        return nn.utils.get_total_norm(grads)

    def _judge(self, loss: Tensor, norm: Tensor) -> None:
        """Let no step train from the first on whose loss or gradient is not finite."""
        is_sound = loss.isfinite()
        if not self.scaler.is_enabled():  # which leaves out steps whose gradients overflowed
            is_sound = is_sound & norm.isfinite()
        self.poison = torch.where(is_sound, self.poison, torch.nan)

    def _update(self) -> None:
        if self.scaler.is_enabled():
            self.scaler.step(self.adamw)  # NaN gradients of a poisoned loss make it do nothing
            self.scaler.update()
        else:
            self.adamw.found_inf = self.poison.isnan().float()
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self._average()

    def _average(self) -> None:
        if self.ema_model is not None:
            average_weights(self.ema_model, self.model, decay=self.optim.ema)

    def check(self) -> None:
        """Raise StateError if a step since the last check was non-finite; waits for the device."""
        unchecked, self.unchecked = self.unchecked, []
        if not self.poison.isnan():
            if self.scaler.is_enabled() and self.scaler.get_scale() < LOSS_SCALE_FLOOR:
                raise StateError(
                    f"step {unchecked[-1][0]}: gradients overflow fp16 at a loss scale below "
                    f"{LOSS_SCALE_FLOOR:g}; set optim.precision to bf16 or lower optim.lr"
                )
            return
        for step, clip_ids, loss, norm in unchecked:
            if not (loss.isfinite() and (norm.isfinite() or self.scaler.is_enabled())):
                clips = everyones(clip_ids.tolist())
                raise NonFiniteError(step, clips, loss=loss.item(), norm=norm.item())

    def trained(self) -> nn.Module:
        """The model with all its weights, to evaluate."""
        return share_buffers(self.model)

    def trained_objective(self) -> nn.Module:
        """The objective around a model with all its weights, for a loss that nobody trains on."""
        return share_buffers(self.plain)

    def averaged(self) -> nn.Module:
        """The model with the averaged weights, of a recipe that asks for them."""
        return share_buffers(self.ema_model)

    def close(self) -> None:
        """Let go of what it has opened."""

    def weights(self) -> dict[str, Tensor]:
        """The model's parameters and buffers by name."""
        return self.model.state_dict()

    def ema_weights(self) -> dict[str, Tensor] | None:
        """The averaged parameters and buffers by name, where the recipe asks for them."""
        return None if self.ema_model is None else self.ema_model.state_dict()

    def optimizer_state(self) -> dict[str, Tensor]:
        """AdamW's moments and step counts, as `PARAMETER/exp_avg` and the like."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.names.items()
            for key, value in self.adamw.state[parameter].items()
        }

    def scaler_state(self) -> dict[str, float]:
        """The fp16 loss scale and its count of good steps; empty in other precisions."""
        return self.scaler.state_dict()

    def load(
        self,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        scaler: Mapping[str, float],
        ema: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take back what `weights`, `optimizer_state`, `scaler_state` and `ema_weights` gave.

        Every process has all of it.
        """
        self._load_weights(weights, ema)
        self._load_moments(optimizer)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(scaler))

    def _load_weights(
        self, weights: Mapping[str, Tensor], ema: Mapping[str, Tensor] | None
    ) -> None:
        self.model.load_state_dict(weights)
        if self.ema_model is not None:
            self.ema_model.load_state_dict(ema)

    def _load_moments(self, optimizer: Mapping[str, Tensor]) -> None:
        self.adamw.state.clear()
        for key, value in optimizer.items():
            name, field = key.rsplit("/", 1)
            # AdamW keeps its step counts in float32 and, when fused, beside the parameter.
            self.adamw.state[self.names[name]][field] = self._placed(value, self.names[name])

    def _placed(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """A whole tensor of AdamW's state where that of the parameter lies."""
        return value.to(self.device)


def average_in_order(_: object, bucket: GradBucket) -> Future[Tensor]:
    """A bucket's mean over the processes, added up in the order of their ranks.

    All-reduce adds a number's parts up in an order that hangs on its place in the bucket, and DDP
    fills its buckets anew after a process's first step: with three or more, a run that goes on
    would not have the bits of one that nothing stopped. For a CPU: it moves what all have to all.
    """
    own = bucket.buffer()
    parts = own.new_empty(joined_part().count, len(own))
    work = distributed.all_gather_into_tensor(parts.view(-1), own, async_op=True)

    def average(_: Future) -> Tensor:
        total = parts[0]
        for part in parts[1:]:
            total += part
        return own.copy_(total.div_(len(parts)))

    return work.get_future().then(average)


def _add_up(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over all processes, in one exchange, which the host does not wait for on a GPU."""
    total = torch.stack(list(losses.values()))
    distributed.all_reduce(total)
    return dict(zip(losses, total, strict=True))


class NonFiniteError(StateError):
    """A loss or gradient was not finite; `clip_ids` are the clips of that step."""

    def __init__(self, step: int, clip_ids: list[int], *, loss: float, norm: float) -> None:
        self.step, self.clip_ids = step, clip_ids
        super().__init__(
            f"step {step}: loss {loss:g}, gradient norm {norm:g}; "
            "stopped before the weights changed"
        )
