"""Steps of a tiny student with made-up targets, on any device: what its tests share."""

import torch

from distill.cache.codes import Codec
from distill.engines.plain import Engine, autocast, to_device
from distill.objective import DistillObjective, draw_keep
from distill.recipe import Distill, Optim, Teacher
from distill.students import ViTSize, create_student

SIZE = ViTSize(64, 2, 1, pooled_width=48, init_std=0.1, layer_scale=1.0)
CLIPS = torch.tensor([3, -7, 2**62, 12345])


def tiny_objective(device: str = "cpu", *, seed: int = 0) -> DistillObjective:
    torch.manual_seed(seed)
    student = create_student(
        SIZE,
        frames=4,
        image_size=56,
        teacher_width=176,
        teacher_pooled=48,
        num_layers=2,
        drop_path=0.2,
    )
    teacher = Teacher(size="1B", random=True, layers=2, interval=1.0)
    section = Distill(kind="distill", teacher=teacher)
    return DistillObjective(student, section, seed=0).to(device)


def tiny_batch(*, seed: int = 1, clips: int = len(CLIPS)) -> dict:
    """As it is read: every tensor's first axis is the clips'."""
    random = torch.Generator().manual_seed(seed)
    middle = torch.randn(clips, 2, 14, 176, generator=random)
    pooled = torch.randn(clips, 48, generator=random)
    tokens = torch.rand(clips, 64, generator=random).argsort(1)[:, :13].sort(1).values
    return {
        "clip_id": CLIPS[:clips],
        "patches": torch.randint(0, 256, (clips, 13, 588), generator=random, dtype=torch.uint8),
        "tokens": tokens,
        "middle": torch.nn.functional.normalize(middle, dim=-1),
        "pooled": torch.nn.functional.normalize(pooled, dim=-1),
        "epoch": 0,
    }


def prepare(batch: dict) -> dict:
    """Targets travel batch-first; the objective takes the layer axis first."""
    return {**batch, "middle": batch["middle"].transpose(0, 1)}


def tiny_engine(device: str = "cpu", **changes) -> Engine:
    settings = {"lr": 1e-3, "batch_size": 4, "epochs": 1, "clip_grad": 1.0, **changes}
    loss = tiny_objective(device)
    device = torch.device(device)
    return Engine(loss, loss.student, optim=Optim(**settings), prepare=prepare, device=device)


def train_losses(precision: str, num_steps: int) -> torch.Tensor:
    """Losses and gradient norms [steps,2] of a run on the CPU, of two clips a step."""
    engine = tiny_engine(precision=precision)
    found = [
        engine.step(tiny_batch(seed=number % 3, clips=2), step=number + 1, lr=1e-3)
        for number in range(num_steps)
    ]
    return torch.stack([torch.stack([one["loss"], one["grad_norm"]]) for one in found])


def whole_step(
    precision: str,
    *,
    is_coded: bool,
    compiled: dict | None = None,
    device: str = "cpu",
    calls: int = 1,
) -> dict[str, torch.Tensor]:
    """Losses and gradients by name of one step, the last of equal `calls`.

    `compiled` are settings of `torch.compile`.
    """
    objective = tiny_objective(device).train()
    batch = to_device(tiny_batch(clips=2), torch.device(device))
    if is_coded:
        codec = Codec("4bit", means=batch["middle"].mean((0, 2)).cpu())
        batch["middle"] = codec.targets(**codec.encode(batch["middle"]))
    else:
        batch = prepare(batch)
    keep = draw_keep(objective.student, batch["clip_id"], seed=0, epoch=0)
    call = objective.losses
    if compiled is not None:
        call = torch.compile(call, fullgraph=True, **compiled)
    for _ in range(calls):
        objective.zero_grad(set_to_none=True)
        with autocast(torch.device(device), precision):
            losses = call(batch, keep)
        (1024 * losses["loss"]).backward()  # another upstream gradient than the expected one
    found = {name: value.detach() for name, value in losses.items()}
    return found | {name: x.grad for name, x in objective.named_parameters() if x.grad is not None}
