"""What tests of engines run in one process or in those of a torchrun, and what they hand back."""

import copy
import os
from contextlib import suppress
from pathlib import Path

import steps
import torch
from pydantic import TypeAdapter
from torch import Tensor, distributed

from distill import recipe, train
from distill.dist import WHOLE, Part, joined
from distill.engines import make_engine, zero
from distill.engines.plain import Engine, NonFiniteError, reproducible
from distill.objective import ClassifyObjective
from distill.recipe_file import load_recipe
from distill.run.interrupt import Interrupted, StopRequest
from distill.students import ViTSize, create_classifier

SIZE = ViTSize(32, 2, 2, pooled_width=16, init_std=0.1, layer_scale=0.5)
CLIPS = (8, 5, 1, 7, 6)  # of each step: uneven shares, other numbers of pieces, and a spare process
CPU = torch.device("cpu")
LOSS_SCALE = 64.0  # at which so small a model's gradients do not overflow fp16

ZERO = {"kind": "deepspeed"}
SMALL = {**ZERO, "stage": 3, "stage3_bucket": 100}  # so that most weights of so small a model shard
# What each case trains with: the engine, then what of the recipe is not as in `build`.
CASES = {
    "ddp": ({"kind": "ddp"}, {}),
    "ddp-bf16": ({"kind": "ddp"}, {"precision": "bf16"}),
    "ddp-fp16": ({"kind": "ddp"}, {"precision": "fp16"}),
    "fsdp": ({"kind": "fsdp"}, {}),
    "fsdp-bf16": ({"kind": "fsdp", "reshard": False}, {"precision": "bf16"}),
    "fsdp-fp16": ({"kind": "fsdp"}, {"precision": "fp16"}),
    "zero0": ({**ZERO, "stage": 0}, {}),
    "zero1-bf16": (ZERO, {"precision": "bf16"}),
    "zero1-fp16": (ZERO, {"precision": "fp16"}),
    "zero2": ({**ZERO, "stage": 2, "bucket": 1000, "offload_optimizer": True}, {}),
    "zero3": (SMALL, {}),
    "ddp-distill": ({"kind": "ddp"}, {}),
    "fsdp-distill": ({"kind": "fsdp"}, {}),
    "zero3-distill": (SMALL, {}),
    "zero3-bf16": ({**SMALL, "offload_weights": True}, {"precision": "bf16"}),
}
TOGETHER = [case for case in CASES if case not in ("ddp-bf16", "ddp-fp16", "ddp-distill")]
ALONE = ["zero1-bf16", "zero3"]
# Of a run of six steps in two epochs, how many each engine takes. What is left, and evaluating, is
# for one that DeepSpeed's launcher starts.
CHAIN = [
    ("{kind: ddp}", 1),
    ("{kind: fsdp}", 1),
    ("{kind: deepspeed, stage: 3, stage3_bucket: 100}", 2),  # an evaluation lies between
    ("{kind: fsdp, reshard: false}", 1),
]
# With which a whole distillation is run, by the name of its folder.
DISTILLED = {
    "fsdp": "{kind: fsdp}",
    "zero3": "{kind: deepspeed, stage: 3, stage3_bucket: 100}",
}


def classifier() -> ClassifyObjective:
    """Of a tiny model, with every kind of randomness."""
    torch.manual_seed(0)
    model = create_classifier(
        SIZE, num_classes=3, frames=2, image_size=28, drop_path=0.3, fc_drop=0.2
    )
    with torch.no_grad():
        model.head.weight.normal_(std=0.2)
    section = recipe.Classify(kind="classify", num_classes=3, fc_drop=0.2)
    return ClassifyObjective(model, section, seed=3)


def build(case: str) -> Engine:
    """A tiny model's engine: a classifier's, or a student's some of whose blocks are recomputed."""
    section, changes = CASES[case]
    if is_distilling(case):
        objective, prepare = steps.tiny_objective(), steps.prepare
        model = objective.student
        model.checkpoint_blocks = 1
    else:
        objective, prepare = classifier(), dict
        model = objective.model
    optim = {"lr": 1e-2, "batch_size": 8, "micro_batch": 2, "epochs": 1, "eps": 1e-4}
    optim |= {"ema": 0.5, "clip_grad": 4.0, "layer_decay": 0.8, **changes}
    engine = make_engine(
        TypeAdapter(recipe.Engine).validate_python(section),
        objective.train(),
        model,
        optim=recipe.Optim(**optim),
        prepare=prepare,
        device=CPU,
    )
    if changes.get("precision") == "fp16" and not isinstance(engine, zero.ZeroEngine):
        engine.scaler.load_state_dict({**engine.scaler_state(), "scale": LOSS_SCALE})
    return engine


def is_distilling(case: str) -> bool:
    return case.endswith("distill")


def share(case: str, step: int, part: Part) -> dict:
    """A process's part of a step's batch, as the loop hands it over."""
    count, rng = CLIPS[step], torch.Generator().manual_seed(step)
    if is_distilling(case):
        count = min(count, len(steps.CLIPS))
        batch = steps.tiny_batch(seed=step, clips=count)
    else:
        batch = {
            "clip_id": torch.arange(100, 100 + count),
            "pixels": torch.randint(0, 256, (count, 3, 2, 28, 28), generator=rng).to(torch.uint8),
            "label": torch.arange(count) % 3,
        }
    own, is_spare = part.share(range(count))
    batch = {name: value[list(own)] for name, value in batch.items() if name != "epoch"}
    spare = {"is_spare": True} if is_spare else {}
    most = -(-count // part.count)
    return {**batch, "epoch": 0, "num_clips": count, "most_clips": most, **spare}


def state_of(engine: Engine) -> tuple:
    return copy.deepcopy(
        (engine.weights(), engine.optimizer_state(), engine.scaler_state(), engine.ema_weights())
    )


def run_case(case: str, part: Part = WHOLE) -> dict[str, dict[str, Tensor]]:
    """Losses, weights, moments and averages of a run; what goes on from its middle; a NaN."""
    engine = build(case)
    losses, saved = [], None
    for step in range(len(CLIPS)):
        found = engine.step(share(case, step, part), step=step, lr=1e-2)
        second = found["layer_01" if is_distilling(case) else "top1"]
        losses.append(torch.stack([found["loss"], second, found["grad_norm"]]))
        if step == 2:
            saved = everywhere(state_of(engine))
    weights, moments, scaler, ema = state_of(engine)
    models = {"trained": engine.trained(), "averaged": engine.averaged()}
    models = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}

    again = build(case)
    again.load(*saved)
    for step in range(3, len(CLIPS)):
        again.step(share(case, step, part), step=step, lr=1e-2)
    is_same = all(map(same, state_of(again), (weights, moments, scaler, ema)))
    again.close()

    batch = share(case, 3, part)
    if part.index == part.count - 1:
        name = "middle" if is_distilling(case) else "pixels"
        batch[name] = torch.full_like(batch[name], torch.nan, dtype=torch.float32)
    try:
        engine.step(batch, step=77, lr=1e-2)
        told = "nothing"
    except NonFiniteError as error:
        told = f"step {error.step}, clips {sorted(error.clip_ids)}"
    is_left = all(map(same, state_of(engine)[:2], (weights, moments)))
    engine.close()
    return {
        "losses": {"": torch.stack(losses)},
        "weights": weights,
        "moments": moments,
        "ema": ema,
        **models,
        "told": {told: torch.tensor(is_left), "goes on": torch.tensor(is_same)},
    }


def same(one: dict, other: dict) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one
    )


def everywhere(value: tuple) -> tuple:
    """What the first process has, at each: as all of them read a checkpoint."""
    if not distributed.is_initialized():
        return value
    held = [value]
    distributed.broadcast_object_list(held)
    return held[0]


def run_chain(path: Path, folder: Path) -> None:
    """Train most of a recipe, stopped time and again, and gone on with another engine."""
    for engine, count in CHAIN:
        checks = iter(range(1, 10_000))

        def check(self, _=None, checks=checks, count=count) -> None:
            if next(checks) == count:
                raise Interrupted(143)

        StopRequest.check = check
        with suppress(Interrupted):
            train.train(load_recipe(path, [f"engine={engine}"]), folder)


def run_all(place: Path, cases: list[str]) -> None:
    """The cases and, of several processes, whole runs; the first one leaves results.

    They are the distillations of `d.yaml`, and the chain of `r.yaml`.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import get_accelerator

    # It says what is fast. torch has fp16 on any CPU.
    type(get_accelerator()).is_fp16_supported = lambda _: True
    zero.LOSS_SCALE_START = LOSS_SCALE
    with joined() as part:
        with reproducible(CPU, seed=0):
            for case in cases:
                results = run_case(case, part)
                if part.index == 0:
                    torch.save(results, place / f"{case}.pt")
        if part.count > 1:
            for name, engine in DISTILLED.items():
                own = load_recipe(place / "d.yaml", [f"engine={engine}"])
                train.train(own, place / "distilled" / name)
            run_chain(place / "r.yaml", place / "chain")
