"""Which parameters decay, which layer learns how fast, and the learning rate of each step."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from distill import recipe
from distill.errors import InputError
from distill.students.timm_backbone import TimmBackbone

# Position tables of the backbone: inputs of layer 0, whether joint or separable.
TABLES = ("pos_embed", "pos_embed_spatial", "pos_embed_temporal", "pos_embed_cls")
INPUTS = (*TABLES, "cls_token", "mask_token")


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Matrices decay; biases, gains, tokens and every position table do not."""
    bare = re.sub(r"^[a-z0-9]+_(?=pos_embed)", "", name)  # of the projectors to any teacher
    return parameter.ndim > 1 and not name.endswith(".bias") and bare not in INPUTS


def layer_id(name: str, *, depth: int) -> int:
    """0 for what feeds the first block, i+1 for block i, depth+1 for all that stands on the last.

    As upstream (optim_factory.py), but separable position tables count as inputs too.
    """
    if name in INPUTS or name.startswith("patch_embed."):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def param_groups(model: nn.Module, optim: recipe.Optim) -> list[dict]:
    """AdamW groups of the trainable parameters of a model.

    A group holds `params`, their `names`, its `weight_decay` and the `lr_scale` that its learning
    rate is multiplied by: layer_decay ** (depth + 1 - layer id). The layers of a model of timm's,
    and what of it never decays, are as timm has it.
    """
    if isinstance(model, TimmBackbone):
        ids = model.layer_ids() if optim.layer_decay != 1 else {}
        top, exempt = max(ids.values(), default=0) + 1, model.no_weight_decay()
    else:
        top, exempt = len(model.blocks) + 1, set()
        ids = {name: layer_id(name, depth=top - 1) for name, _ in model.named_parameters()}
    groups: dict[tuple[float, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr_scale = optim.layer_decay ** (top - ids.get(name, top))
        decayed = is_decayed(name, parameter) and name not in exempt
        group = groups.setdefault(
            (lr_scale, decayed),
            {
                "params": [],
                "names": [],
                "lr_scale": lr_scale,
                "weight_decay": optim.weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise InputError("objective.trainable: leaves no parameter to train")
    return list(groups.values())


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from `start` to `peak`, then a cosine towards `floor`."""

    start: float
    peak: float
    floor: float
    warmup_steps: int
    num_steps: int

    def lr_at(self, step: int) -> float:
        """Learning rate of optimiser step `step`, counted from 0.

        The warm-up includes both its ends, so the peak comes twice and the last step lies just
        above the floor, as in upstream's `cosine_scheduler` (utils.py).
        """
        if step < self.warmup_steps:
            return self.start + (self.peak - self.start) * step / max(self.warmup_steps - 1, 1)
        done = (step - self.warmup_steps) / max(self.num_steps - self.warmup_steps, 1)
        return self.floor + (self.peak - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


def make_schedule(optim: recipe.Optim, *, steps_per_epoch: int) -> Schedule:
    """The schedule of a run whose loader gives `steps_per_epoch` batches.

    lr, min_lr and warmup_lr are all meant for `lr_per_batch` clips and scale with the batch.
    """
    if 0 < optim.epochs < optim.warmup_epochs:
        raise InputError(
            f"optim.warmup_epochs: {optim.warmup_epochs:g} is more than the {optim.epochs} "
            "of optim.epochs; lower it"
        )
    scale = optim.batch_size / optim.lr_per_batch if optim.lr_per_batch else 1.0
    return Schedule(
        start=optim.warmup_lr * scale,
        peak=optim.lr * scale,
        floor=optim.min_lr * scale,
        warmup_steps=round(optim.warmup_epochs * steps_per_epoch),
        num_steps=optim.epochs * steps_per_epoch,
    )


def set_lr(groups: Iterable[dict], lr: float | Sequence[float]) -> None:
    """Give every group its share of the step's learning rate, or of that of its `setting`."""
    for group in groups:
        own = lr if isinstance(lr, float) else lr[group["setting"]]
        group["lr"] = own * group["lr_scale"]
