"""Whole steps by kernels on a CUDA device: compiled, captured, and 200 of an S/14."""

import pytest
import torch
import torch.nn.functional as F
from steps import prepare, tiny_batch, tiny_objective, whole_step

from distill.engines.plain import Engine, autocast, to_device
from distill.kernels import jit
from distill.objective import DistillObjective, draw_keep
from distill.recipe import Distill, Optim, Teacher
from distill.students import create_student

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda", 0)
STEPS, LAST, POOL, BATCH = 200, 20, 32, 8  # steps, those that are compared, clips, clips a step
ROUNDING = 1e-3  # as a share of all gradients together
FRAMES, TOKENS, LAYERS, WIDTH, POOLED = 8, 411, 6, 1408, 768


def length(tensors) -> float:
    """Of all of them together: some gradients are nothing but rounding, as a key's bias's."""
    return torch.stack([x.double().norm() for x in tensors]).norm().item()


@pytest.mark.parametrize("is_coded", [False, True])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])  # the second by CUDA graphs
def test_a_compiled_step_is_as_exact_as_an_eager_one(mode, is_coded):
    settings = {"is_coded": is_coded, "device": "cuda"}
    # Of CUDA graphs, the first calls are what is captured.
    found = whole_step("bf16", compiled={"mode": mode}, calls=4, **settings)
    jit.choose("torch")
    exact, eager = whole_step("fp32", **settings), whole_step("bf16", **settings)
    assert found.keys() == exact.keys()
    for name, truth in exact.items():
        error, allowed = ((x[name].double() - truth).norm().item() for x in (found, eager))
        allowed = 1.5 * allowed + ROUNDING * length(exact.values())
        assert error <= allowed, f"{name}: {error:.1e}, allowed {allowed:.1e}"


def test_a_captured_step_is_replayed_on_what_the_batch_holds_then():
    objective = tiny_objective("cuda").train()
    first, second = (to_device(prepare(tiny_batch(seed=seed)), CUDA) for seed in (1, 2))
    keep = draw_keep(objective.student, first["clip_id"], seed=0, epoch=0)
    parameters = [x for x in objective.parameters() if x.requires_grad]

    def step(batch):
        with autocast(CUDA, "bf16"):
            loss = objective.losses(batch, keep)["loss"]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [loss.detach(), *(x for x in gradients if x is not None)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernels, which a capture cannot
        for _ in range(3):
            step(first)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(first)
    expected = step(second)
    for name, value in second.items():
        if isinstance(value, torch.Tensor):
            first[name].copy_(value)
    graph.replay()
    for one, want in zip(captured, expected, strict=True):
        assert (one - want).norm().item() <= ROUNDING * length(expected)


def clips_to_learn_from() -> dict[str, torch.Tensor]:
    """Patches, tokens, and targets that are linear in a token's patch, with noise."""
    stream = torch.Generator(CUDA).manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=stream, device=CUDA)

    patches = (128 + 60 * draw(POOL, TOKENS - 1, 588)).clamp(0, 255).to(torch.uint8)
    places = torch.rand(POOL, FRAMES * 256, generator=stream, device=CUDA).argsort(1)
    seen = F.pad((patches.float() - 128) / 60, (0, 0, 1, 0))  # the class token sees nothing
    middle = torch.stack([seen @ draw(588, WIDTH) / 588**0.5 for _ in range(LAYERS)], 1)
    middle = F.normalize(middle + draw(LAYERS, 1, WIDTH) + 0.1 * draw(*middle.shape), dim=-1)
    return {
        "clip_id": torch.arange(POOL, device=CUDA),
        "patches": patches,
        "tokens": places[:, : TOKENS - 1].sort(1).values,
        "middle": middle.bfloat16(),
        "pooled": F.normalize(1 + draw(POOL, POOLED), dim=-1),
    }


def last_losses(clips: dict[str, torch.Tensor], kernels: str, *, seed: int) -> float:
    """The mean loss of the last steps of an S/14 whose batches and drop path `seed` draws."""
    jit.choose(kernels)
    torch.manual_seed(0)
    student = create_student("S14", drop_path=0.1)
    section = Distill(kind="distill", teacher=Teacher(size="1B", random=True))
    optim = Optim(lr=1e-3, batch_size=BATCH, epochs=1, precision="bf16", clip_grad=3.0)
    objective = DistillObjective(student, section, seed=seed)
    engine = Engine(objective, student, optim=optim, prepare=prepare, device=CUDA)
    stream, losses = torch.Generator().manual_seed(seed), []
    for step in range(STEPS):
        rows = torch.randperm(POOL, generator=stream)[:BATCH].to(CUDA)
        batch = {name: value[rows] for name, value in clips.items()} | {"epoch": step}
        losses.append(engine.step(batch, step=step + 1, lr=1e-3)["loss"])
    engine.check()
    return torch.stack(losses)[-LAST:].mean().item()


def test_an_s14_learns_by_kernels_what_it_learns_by_torch():
    clips = clips_to_learn_from()
    of_torch = [last_losses(clips, "torch", seed=seed) for seed in range(3)]
    noise = max(of_torch) - min(of_torch)
    of_kernels = last_losses(clips, "triton", seed=0)
    start = 4.0  # of two losses, at right angles to their targets
    assert max(of_torch) < 0.9 * start, f"nothing is learnt: {of_torch}"
    assert abs(of_kernels - of_torch[0]) <= noise, f"{of_kernels}, torch {of_torch}"
