"""Which engine a recipe's steps run on."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import nn

from distill import recipe as schema
from distill.dist import joined_part
from distill.engines.plain import Engine
from distill.errors import InputError


def make_engine(
    section: schema.Engine,
    objective: nn.Module,
    model: nn.Module,
    *,
    optim: schema.Optim,
    prepare: Callable[[dict], dict],
    device: torch.device,
    groups: list[dict] | None = None,
) -> Engine:
    """The engine of a recipe's section; arguments as of `Engine`.

    One process has nothing to shard: it is plain torch, but for DeepSpeed.
    """
    settings = {"optim": optim, "prepare": prepare, "device": device, "groups": groups}
    match section:
        case schema.FullySharded() if joined_part().count > 1:
            from distill.engines.fsdp import FSDPEngine

            return FSDPEngine(objective, model, section, **settings)
        case schema.DeepSpeed():
            if find_spec("deepspeed") is None:
                raise InputError(
                    "engine.kind: DeepSpeed is not installed; install it, or set engine.kind=fsdp"
                )
            from distill.engines.zero import DeepSpeedEngine, ZeroEngine

            engine = ZeroEngine if section.stage else DeepSpeedEngine
            return engine(objective, model, section, **settings)
    return Engine(objective, model, **settings)
