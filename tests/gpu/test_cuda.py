"""What only a CUDA device can show: equal draws, equal steps, and a step left out on the device."""

import pytest
import torch
from steps import CLIPS, tiny_batch, tiny_engine

from distill import draw
from distill.engines.plain import Engine
from distill.errors import StateError
from distill.mask import Redraw, draw_kept, draw_tokens
from distill.recipe import Mask
from distill.students import ViTSize
from distill.teachers import create_teacher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.parametrize("kernels", ["torch", "triton"], indirect=True),
]

TEACHER = ViTSize(176, 4, 2, 48 / 11, pooled_width=48)
GRID = (4, 4, 4)


def engine(device: str, **changes) -> Engine:
    return tiny_engine(device, micro_batch=3, **changes)


def test_draws_are_those_of_the_cpu():
    on_cpu = draw.uniform(CLIPS, "test", 0, count=4096)
    on_gpu = draw.uniform(CLIPS.cuda(), "test", 0, count=4096)
    assert torch.equal(on_cpu, on_gpu.cpu())


def test_random_masks_are_those_of_the_cpu():
    settings = {"view": 1, "seed": 2, "grid": GRID}
    on_cpu = draw_tokens(Mask(kind="random"), clip_ids=CLIPS, **settings)
    on_gpu = draw_tokens(Mask(kind="random"), clip_ids=CLIPS.cuda(), **settings)
    assert torch.equal(on_cpu, on_gpu.cpu())


def test_an_epochs_tokens_are_those_of_the_cpu():
    attention = torch.rand(4, 64, generator=torch.Generator().manual_seed(2))
    settings = {"view": 1, "seed": 2, "grid": GRID, "attention": attention}
    tokens, next_arrival = draw_kept(Mask(), "superset", clip_ids=CLIPS, **settings)
    record = {"tokens": tokens, "next_arrival": next_arrival, "attention": attention}
    redraw = Redraw(Mask(), GRID, 3)
    on_cpu = redraw.places(clip_ids=CLIPS, epoch=5, **record)
    record = {name: value.cuda() for name, value in record.items()}
    on_gpu = redraw.places(clip_ids=CLIPS.cuda(), epoch=5, **record)
    assert torch.equal(on_cpu, on_gpu.cpu())


def test_a_float32_step_ends_with_the_weights_of_the_cpu():
    weights = {}
    for device in ("cpu", "cuda"):
        one = engine(device)
        for step in range(3):
            losses = one.step(tiny_batch(), step=step + 1, lr=1e-3)
        one.check()
        weights[device] = {name: value.cpu() for name, value in one.weights().items()}
        assert losses["loss"].device.type == device
    torch.testing.assert_close(weights["cuda"], weights["cpu"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_losses_are_close_to_float32(precision):
    expected = engine("cuda").step(tiny_batch(), step=1, lr=1e-3)["loss"]
    loss = engine("cuda", precision=precision).step(tiny_batch(), step=1, lr=1e-3)["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)


def test_a_non_finite_step_and_those_after_it_leave_the_weights_alone():
    one = engine("cuda")
    one.step(tiny_batch(), step=1, lr=1e-3)
    before = {name: value.clone() for name, value in one.weights().items()}
    bad = tiny_batch()
    bad["pooled"][2] = torch.nan
    one.step(bad, step=2, lr=1e-3)
    one.step(tiny_batch(), step=3, lr=1e-3)
    torch.testing.assert_close(one.weights(), before, rtol=0, atol=0)
    with pytest.raises(StateError, match="step 2"):
        one.check()


def test_steps_do_not_wait_for_the_device():
    one = engine("cuda")
    one.step(tiny_batch(), step=1, lr=1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.step(tiny_batch(), step=2, lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    one.check()


def test_teacher_in_bf16_agrees_with_float32():
    torch.manual_seed(0)
    teacher = create_teacher(
        TEACHER, frames=4, image_size=56, num_layers=2, interval=1.0, random=True
    ).cuda()
    clip = torch.randint(0, 256, (2, 3, 4, 56, 56), dtype=torch.uint8, device="cuda")
    exact = teacher(clip)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        rounded = teacher(clip)
    cosine = (exact.middle * rounded.middle).sum(-1)
    assert cosine.min().item() > 0.999
    torch.testing.assert_close(rounded.attention, exact.attention, rtol=2e-2, atol=1e-4)
