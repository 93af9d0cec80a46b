"""Steps on DeepSpeed: its exchange of gradients alone (stage 0), or ZeRO's shards (1 to 3).

AdamW is torch's own in every stage, so that nothing has to be compiled. ZeRO keeps float32 masters
of the weights, and AdamW's state of them, flat and in shards; DeepSpeed's `safe_get_full_...` and
their like are the way from there to whole tensors by name, and back.
"""

import atexit
import copy
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from distill import recipe
from distill.dist import joined_part
from distill.engines.plain import (
    LOSS_SCALE_FLOOR,
    LOSS_SCALE_START,
    LOSS_SCALE_WINDOW,
    Engine,
    average_tensors,
)
from distill.engines.whole import Blank
from distill.errors import InputError

HYSTERESIS = 2  # overflows before the loss scale is halved: upstream's
MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroAdamW(torch.optim.AdamW):
    """AdamW of flat shards, which keeps the average of the weights as one more of its states.

    So it is sharded, gathered and loaded as the moments are.
    """

    decay: float | None = None

    def begin(self, shards: list[Tensor]) -> None:
        """Make the state of all shards now, from which whole tensors are gathered by name."""
        for shard in shards:
            state = self.state[shard]
            state["step"] = torch.zeros((), device=shard.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(shard)
            if self.decay is not None:
                state["ema"] = shard.detach().clone()

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        super().step(closure)
        if self.decay is None:
            return
        for group in self.param_groups:
            for shard in group["params"]:
                self.state[shard]["ema"].lerp_(shard, 1 - self.decay)


class DeepSpeedEngine(Engine):
    """Stage 0: every process has all of it, and DeepSpeed exchanges the gradients."""

    def __init__(
        self, objective: nn.Module, model: nn.Module, section: recipe.DeepSpeed, **settings
    ) -> None:
        self.section = section
        super().__init__(objective, model, **settings)

    def _build(self, groups: list[dict] | None) -> None:
        _join()
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)  # or it looks for one, aloud
        self.objective.to(self.device)
        self.ema_model = None
        if self.optim.ema is not None:
            self.ema_model = copy.deepcopy(self.model).requires_grad_(False).eval()
        self._make_optimizer(groups)

    @cached_property
    def deepspeed(self) -> nn.Module:
        """DeepSpeed's engine, made at its first use of the weights that the model has then."""
        return self._start()

    def _start(self) -> nn.Module:
        import deepspeed

        # It asks for the number of the GPU that is this process's, whatever the launcher.
        index = torch.cuda.current_device() if self.device.type == "cuda" else 0
        os.environ["LOCAL_RANK"] = str(index)
        deepspeed.utils.logging.logger.setLevel(logging.ERROR)  # whose warnings say nothing new
        # An exchange through shared memory, for which a compiler would have to be there.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        made, *_ = deepspeed.initialize(
            model=self.objective,
            optimizer=self.adamw,
            config=self._config(),
            dist_init_required=False,
        )
        return made

    def step(self, batch: dict, *, step: int, lr: float | Sequence[float]) -> dict[str, Tensor]:
        self.objective = self.deepspeed
        return super().step(batch, step=step, lr=lr)

    @contextmanager
    def _in_piece(self, *, is_last: bool) -> Iterator[None]:
        self.deepspeed.set_gradient_accumulation_boundary(is_last)
        yield

    def _backward(self, loss: Tensor) -> None:
        self.deepspeed.backward(self.scaler.scale(loss))

    def close(self) -> None:
        if "deepspeed" in vars(self):
            self.deepspeed.destroy()

    def _config(self) -> dict:
        """DeepSpeed's settings; those that no recipe states are upstream's."""
        section, precision, stage = self.section, self.optim.precision, self.section.stage
        numbers = section.bucket if stage < 3 else section.stage3_bucket
        zero = {
            "stage": stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": numbers,
            "allgather_bucket_size": numbers,
            "stage3_prefetch_bucket_size": numbers,
            "stage3_param_persistence_threshold": numbers,
        }
        if section.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type != "cpu"}
        if section.offload_weights:
            zero["offload_param"] = {"device": "cpu", "pin_memory": self.device.type != "cpu"}
        return {
            # Pieces of a step differ in size, so each is weighted here and not by DeepSpeed.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": (self.optim.clip_grad or 0.0) if stage else 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": bool(stage) and precision == "bf16"},
            "fp16": {
                "enabled": bool(stage) and precision == "fp16",
                "loss_scale": 0,
                "initial_scale_power": int(math.log2(LOSS_SCALE_START)),
                "loss_scale_window": LOSS_SCALE_WINDOW,
                "hysteresis": HYSTERESIS,
                "min_loss_scale": int(LOSS_SCALE_FLOOR),
            },
            # With float32 sums stage 1 would be another optimiser, which steps on NaN.
            "data_types": {"grad_accum_dtype": "fp32" if stage > 1 else None},
            "steps_per_print": 2**62,
        }


class ZeroEngine(DeepSpeedEngine):
    """Stages 1 to 3: shards of AdamW's state, from 2 on of gradients, in 3 of weights.

    Weights are in the recipe's precision, their masters in float32.
    """

    forwards_together = True
    adamw_class = ZeroAdamW

    def _build(self, groups: list[dict] | None) -> None:
        _join()
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)  # or it looks for one, aloud
        from deepspeed.accelerator import get_accelerator

        if self.optim.precision == "fp16" and not get_accelerator().is_fp16_supported():
            raise InputError(
                f"optim.precision: DeepSpeed has no fp16 on this {self.device.type}; set "
                "optim.precision=bf16, or engine.stage=0"
            )
        self.blank = Blank(self.plain, self.model)
        self.objective.to(self.device)
        self._make_optimizer(groups)
        self.adamw.decay = self.optim.ema
        self.fixed: dict[str, Tensor] = {}
        self.ema_buffers: dict[str, Tensor] = {}
        self.loaded: tuple | None = None

    def _start(self) -> nn.Module:
        # What no step changes keeps its precision, and the first process does not ask for it.
        state = self.model.state_dict()
        buffers = dict(self.model.named_buffers())
        if joined_part().index == 0:
            fixed = [name for name in state if name not in self.names and name not in buffers]
            self.fixed = {name: state[name].to("cpu", copy=True) for name in fixed}
        whole = {name: tensor.detach().clone() for name, tensor in self.names.items()}
        engine = super()._start()
        zero = engine.optimizer
        is_last = self.section.stage == 3
        shards = (
            zero.fp32_partitioned_groups_flat if is_last else zero.single_partition_of_fp32_groups
        )
        self.shard_device = shards[0].device
        self._put(whole)
        del whole
        self.adamw.begin(shards)
        if not is_last:
            zero._lazy_init_hp_params_optimizer_state()  # else only its first step does
        if self.optim.ema is not None:
            self.ema_buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        if self.optim.precision == "fp16":
            self.scaler = LossScale(zero.loss_scaler)
            # Below the floor `check` stops the run, in one line.
            zero.loss_scaler.min_scale = LOSS_SCALE_FLOOR / 2
            zero.loss_scaler.raise_error_at_min_scale = False
        if self.loaded is not None:
            self._take_back(*self.loaded, shards=shards)
            self.loaded = None
        return engine

    def _take_back(
        self,
        optimizer: Mapping[str, Tensor],
        scaler: Mapping[str, float],
        ema: Mapping[str, Tensor] | None = None,
        *,
        shards: list[Tensor],
    ) -> None:
        for key in MOMENTS:
            self._put({name: optimizer[f"{name}/{key}"] for name in self.names}, key)
        steps = next(value for name, value in optimizer.items() if name.endswith("/step"))
        for shard in shards:
            self.adamw.state[shard]["step"].copy_(steps)
        if ema is not None:
            self._put({name: ema[name] for name in self.names}, "ema")
            for name, buffer in self.ema_buffers.items():
                buffer.copy_(ema[name])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)

    def _put(self, whole: Mapping[str, Tensor], key: str | None = None) -> None:
        """Each process's part of whole tensors, into masters or AdamW's state `key` of them."""
        from deepspeed import utils

        suffix = (key,) if key else ()
        kind = "optimizer_state" if key else "fp32_param"
        for name, value in whole.items():
            parameter, value = self.names[name], value.to(self.device).float()
            if self.section.stage == 3:
                size = parameter.ds_tensor.numel()  # the last part is padded
                flat = F.pad(value.flatten(), (0, size * self.num_ranks - value.numel()))
                value = flat.narrow(0, size * joined_part().index, size)
                getattr(utils, f"safe_set_local_{kind}")(parameter, value, *suffix)
            else:
                getattr(utils, f"safe_set_full_{kind}")(parameter, value, *suffix)

    def _get(self, name: str, key: str | None = None) -> Tensor:
        """A whole master in float32, or AdamW's state `key` of it, in every process."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        _ = self.deepspeed
        if key is None:
            return safe_get_full_fp32_param(self.names[name])
        return safe_get_full_optimizer_state(self.names[name], key)

    def _finish_step(self, loss: Tensor) -> Tensor:
        # DeepSpeed itself leaves out steps whose gradients are not finite.
        self.adamw.found_inf = (~loss.isfinite()).float().to(self.shard_device)
        self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm()
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self.device)
        norm = torch.full_like(norm, torch.inf) if self.deepspeed.optimizer.overflow else norm
        self._judge(loss, norm)
        if self.ema_buffers:
            buffers = dict(self.model.named_buffers())
            average_tensors(self.ema_buffers.values(), buffers.values(), decay=self.optim.ema)
        return norm

    def _backward(self, loss: Tensor) -> None:
        self.deepspeed.backward(loss)  # which scales it

    def trained(self) -> nn.Module:
        return self.blank.model_of(self.trained_objective())

    def trained_objective(self) -> nn.Module:
        return self._filled(None)

    def averaged(self) -> nn.Module:
        return self.blank.model_of(self._filled("ema"))

    def _filled(self, key: str | None) -> nn.Module:
        _ = self.deepspeed
        buffers = self.ema_buffers if key else dict(self.model.named_buffers())

        def fill(name: str, tensor: Tensor) -> None:
            if name in self.names:
                tensor.copy_(self._get(name, key))
            elif name in buffers:
                tensor.copy_(buffers[name])
            else:
                if joined_part().index == 0:
                    tensor.copy_(self.fixed[name])
                distributed.broadcast(tensor, src=0)

        return self.blank.filled(fill, device=self.device)

    def weights(self) -> dict[str, Tensor]:
        return self._gathered(None)

    def ema_weights(self) -> dict[str, Tensor] | None:
        return None if self.optim.ema is None else self._gathered("ema")

    def _gathered(self, key: str | None) -> dict[str, Tensor]:
        _ = self.deepspeed
        buffers = self.ema_buffers if key else dict(self.model.named_buffers())
        found = {}
        for name, like in self.blank.state.items():
            tensor = self._get(name, key) if name in self.names else buffers.get(name)
            if joined_part().index == 0:
                tensor = self.fixed[name] if tensor is None else tensor
                found[name] = tensor.detach().to("cpu", like.dtype)
        return found

    def optimizer_state(self) -> dict[str, Tensor]:
        _ = self.deepspeed
        (steps, *_) = (state["step"] for state in self.adamw.state.values())
        found = {}
        for name in self.names:
            whole = {key: self._get(name, key) for key in MOMENTS}
            if joined_part().index == 0:
                found[f"{name}/step"] = steps.cpu()
                found |= {f"{name}/{key}": value.cpu() for key, value in whole.items()}
        return found

    def scaler_state(self) -> dict[str, float]:
        _ = self.deepspeed
        return super().scaler_state()

    def load(self, weights: Mapping[str, Tensor], *others: Mapping | None) -> None:
        """Take back what the others gave, before the first step."""
        self.model.load_state_dict(weights)
        self.loaded = others  # until DeepSpeed is there, see `_start`


class LossScale:
    """DeepSpeed's loss scale in the words of torch's `GradScaler`."""

    def __init__(self, scale: object) -> None:
        self.scale = scale

    def is_enabled(self) -> bool:
        return True

    def get_scale(self) -> float:
        return self.scale.cur_scale

    def state_dict(self) -> dict[str, float]:
        good = self.scale.cur_iter - self.scale.last_overflow_iter - 1  # steps, as DeepSpeed counts
        good = (good - 1) % LOSS_SCALE_WINDOW + 1 if good else 0  # since the scale doubled
        return {
            "scale": float(self.scale.cur_scale),
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": LOSS_SCALE_WINDOW,
            "_growth_tracker": min(good, LOSS_SCALE_WINDOW - 1),  # at which torch's doubles
            "good_steps": good,
            "hysteresis": self.scale.cur_hysteresis,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.scale.cur_scale = state["scale"]
        good = state.get("good_steps", state["_growth_tracker"])
        self.scale.cur_iter, self.scale.last_overflow_iter = int(good), -1
        self.scale.cur_hysteresis = state.get("hysteresis", HYSTERESIS)


def _join() -> None:
    """Make the group of processes that DeepSpeed wants, of one where none have joined."""
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store = distributed.HashStore()
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        atexit.register(distributed.destroy_process_group)
