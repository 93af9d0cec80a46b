"""The optimiser step: accumulation, clipping, precision, and what a non-finite loss leaves."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from distill import recipe
from distill.engines.plain import Engine, NonFiniteError, average_weights, reproducible, split_batch
from distill.errors import StateError
from distill.objective import ClassifyObjective
from distill.students import ViTSize, create_classifier

TINY = ViTSize(width=32, depth=2, heads=2, pooled_width=16)
CPU = torch.device("cpu")


def make_batch(count: int, *, seed: int = 0) -> dict:
    rng = torch.Generator().manual_seed(seed)
    return {
        "clip_id": torch.arange(100, 100 + count),
        "pixels": torch.randint(0, 256, (count, 3, 2, 28, 28), generator=rng).to(torch.uint8),
        "label": torch.arange(count) % 3,
        "epoch": 0,
    }


def make_engine(*, drop_path: float = 0.0, loss_scale: float = 64.0, **optim) -> Engine:
    torch.manual_seed(0)
    model = create_classifier(TINY, num_classes=3, frames=2, image_size=28, drop_path=drop_path)
    with torch.no_grad():  # LayerScale starts so small that the blocks would hardly matter
        for block in model.blocks:
            block.ls1.gamma.fill_(0.5)
            block.ls2.gamma.fill_(0.5)
        model.head.weight.normal_(std=0.2)
    section = recipe.Classify(kind="classify", num_classes=3)
    objective = ClassifyObjective(model, section, seed=3)
    optim = recipe.Optim(**{"lr": 1e-2, "batch_size": 8, "epochs": 1, **optim})
    engine = Engine(objective.train(), model, optim=optim, prepare=dict, device=CPU)
    if optim.precision == "fp16":
        engine.scaler.load_state_dict({**engine.scaler_state(), "scale": loss_scale})
    return engine


def weights_of(engine: Engine) -> dict:
    return copy.deepcopy(engine.weights())


def step_gradients(engine: Engine, batch: dict) -> dict:
    """The gradients that a step hands to AdamW, after clipping."""
    kept = {}
    update = engine._update

    def keep_and_update() -> None:
        kept.update({name: p.grad.clone() for name, p in engine.names.items()})
        update()

    engine._update = keep_and_update
    engine.step(batch, step=1, lr=1e-3)
    engine._update = update
    return kept


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_accumulation_equals_one_large_batch(micro_batch):
    batch = make_batch(8)  # 3 leaves a last piece of 2
    whole, pieces = make_engine(drop_path=0.5), make_engine(drop_path=0.5, micro_batch=micro_batch)
    expected, found = step_gradients(whole, batch), step_gradients(pieces, batch)
    assert expected.keys() == found.keys()
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
    for name, gradient in expected.items():
        assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_reported_losses_are_means_over_clips():
    batch = make_batch(5)
    with torch.no_grad():
        expected = make_engine().objective(batch)
    found = make_engine(micro_batch=2).step(batch, step=1, lr=1e-3)
    assert_close(found["loss"], expected["loss"])
    assert_close(found["top1"], expected["top1"])


def test_split_batch_keeps_every_clip_once_and_what_is_no_tensor():
    pieces = split_batch(make_batch(5), 2)
    assert [piece["clip_id"].tolist() for piece in pieces] == [[100, 101], [102, 103], [104]]
    assert [piece["pixels"].shape[0] for piece in pieces] == [2, 2, 1]
    assert {piece["epoch"] for piece in pieces} == {0}


def test_adamw_follows_the_formula_in_every_group():
    engine = make_engine(weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3, layer_decay=0.5)
    before = weights_of(engine)
    gradients = step_gradients(engine, make_batch(8))
    depth = len(engine.model.blocks)
    for name, decay, scale in (
        ("head.weight", 0.1, 1.0),
        ("head.bias", 0.0, 1.0),
        ("blocks.1.mlp.fc1.weight", 0.1, 0.5),
        ("cls_token", 0.0, 0.5 ** (depth + 1)),
    ):
        lr, gradient = 1e-3 * scale, gradients[name]
        moment, second = 0.2 * gradient, 0.1 * gradient.square()
        ratio = (moment / 0.2) / ((second / 0.1).sqrt() + 1e-3)
        expected = before[name] * (1 - lr * decay) - lr * ratio
        assert_close(engine.weights()[name], expected, msg=name)


def test_clipping_limits_the_global_norm_and_reports_the_norm_before():
    free, clipped = make_engine(), make_engine(clip_grad=0.01)
    batch = make_batch(8)
    raw, limited = step_gradients(free, batch), step_gradients(clipped, batch)
    norm = torch.stack([gradient.square().sum() for gradient in raw.values()]).sum().sqrt()
    assert norm > 0.1
    for name, gradient in raw.items():
        assert_close(limited[name], gradient * (0.01 / (norm + 1e-6)), msg=name)
    reported = make_engine(clip_grad=0.01).step(batch, step=1, lr=1e-3)["grad_norm"]
    assert_close(reported, norm)


def test_a_norm_below_the_limit_is_left_alone():
    batch = make_batch(8)
    raw, limited = (
        step_gradients(make_engine(), batch),
        step_gradients(make_engine(clip_grad=1e3), batch),
    )
    for name, gradient in raw.items():
        assert_close(limited[name], gradient, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_non_finite_loss_names_step_and_clips_and_leaves_weights(precision):
    engine = make_engine(precision=precision, micro_batch=2)
    engine.step(make_batch(4), step=11, lr=1e-3)
    before, state = weights_of(engine), copy.deepcopy(engine.optimizer_state())
    batch = make_batch(4)
    batch["pixels"] = batch["pixels"].float()
    batch["pixels"][2] = torch.nan
    with pytest.raises(NonFiniteError, match="^step 12: loss nan, gradient norm nan") as caught:
        engine.step(batch, step=12, lr=1e-3)
    assert caught.value.clip_ids == [100, 101, 102, 103]
    for name, value in engine.weights().items():
        assert_close(value, before[name], rtol=0, atol=0)
    for name, value in engine.optimizer_state().items():
        assert_close(value, state[name], rtol=0, atol=0)


class Blowup(nn.Module):
    """A finite loss, the square root of zero, whose gradient is infinite."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict) -> dict:
        return {"loss": (self.model.head.weight.sum() * 0).sqrt()}


def test_non_finite_gradient_of_a_finite_loss_stops_too():
    engine = make_engine()
    engine.objective = Blowup(engine.model)
    before = weights_of(engine)
    with pytest.raises(NonFiniteError, match="step 5: loss 0, gradient norm (nan|inf)"):
        engine.step(make_batch(4), step=5, lr=1e-3)
    for name, value in engine.weights().items():
        assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_unchecked_steps_after_a_non_finite_one_change_nothing(precision):
    engine = make_engine(precision=precision)
    engine.check, check = (lambda: None), engine.check  # as on a GPU, where nobody asks each step
    engine.step(make_batch(4), step=1, lr=1e-3)
    before = weights_of(engine)
    broken = {**make_batch(4), "pixels": torch.full((4, 3, 2, 28, 28), torch.inf)}
    broken["clip_id"] = torch.arange(4)
    engine.step(broken, step=2, lr=1e-3)
    engine.step(make_batch(4, seed=1), step=3, lr=1e-3)
    with pytest.raises(NonFiniteError) as caught:
        check()
    assert (caught.value.step, caught.value.clip_ids) == (2, [0, 1, 2, 3])
    for name, value in engine.weights().items():
        assert_close(value, before[name], rtol=0, atol=0)


def test_fp16_overflow_halves_the_scale_and_leaves_the_step_out():
    engine = make_engine(precision="fp16", loss_scale=2.0**16)
    engine.objective = Blowup(engine.model)
    before = weights_of(engine)
    engine.step(make_batch(4), step=1, lr=1e-3)
    assert engine.scaler.get_scale() == 2.0**15
    for name, value in engine.weights().items():
        assert_close(value, before[name], rtol=0, atol=0)
    with pytest.raises(StateError, match="overflow fp16 at a loss scale below 1"):
        for step in range(2, 40):
            engine.step(make_batch(4), step=step, lr=1e-3)
    assert step == 17


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.005)])
def test_half_precision_gradients_stay_near_float32(precision, tolerance):
    batch = make_batch(8)
    engine = make_engine(precision=precision)
    exact, half = step_gradients(make_engine(), batch), step_gradients(engine, batch)
    flat, other = (torch.cat([g.flatten() for g in of.values()]) for of in (exact, half))
    error = (flat - other).norm() / flat.norm()
    assert 0 < error < tolerance
    assert {parameter.dtype for parameter in engine.names.values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_loaded_state_goes_on_bit_for_bit(precision):
    straight = make_engine(precision=precision, drop_path=0.3)
    for step in range(4):
        straight.step(make_batch(4, seed=step), step=step, lr=1e-3)
    first = make_engine(precision=precision, drop_path=0.3)
    for step in range(2):
        first.step(make_batch(4, seed=step), step=step, lr=1e-3)
    second = make_engine(precision=precision, drop_path=0.3)
    second.load(weights_of(first), copy.deepcopy(first.optimizer_state()), first.scaler_state())
    for step in range(2, 4):
        second.step(make_batch(4, seed=step), step=step, lr=1e-3)
    for name, value in straight.weights().items():
        assert_close(second.weights()[name], value, rtol=0, atol=0, msg=name)
    assert second.scaler_state() == straight.scaler_state()


def test_averaged_weights_follow_the_formula_and_resume():
    engine = make_engine(ema=0.9)
    expected = {name: value.double() for name, value in weights_of(engine).items()}
    for step in range(4):
        engine.step(make_batch(4, seed=step), step=step, lr=1e-2)
        for name, value in engine.weights().items():
            expected[name] = 0.9 * expected[name] + 0.1 * value.double()
        if step == 1:
            second = make_engine(ema=0.9)
            second.load(
                weights_of(engine),
                copy.deepcopy(engine.optimizer_state()),
                engine.scaler_state(),
                copy.deepcopy(engine.ema_weights()),
            )
        elif step > 1:
            second.step(make_batch(4, seed=step), step=step, lr=1e-2)
    for name, value in engine.ema_weights().items():
        assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7, msg=name)
        assert_close(second.ema_weights()[name], value, rtol=0, atol=0, msg=name)
    assert not any(parameter.requires_grad for parameter in engine.ema_model.parameters())
    assert not engine.ema_model.training and engine.model.training
    distance = engine.ema_weights()["head.weight"] - engine.weights()["head.weight"]
    assert float(distance.abs().max()) > 1e-3
    assert make_engine().ema_weights() is None


def test_running_statistics_are_averaged_and_their_count_is_copied():
    average, model = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    model(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    average_weights(average, model, decay=0.75)
    assert_close(average.running_mean, 0.25 * model.running_mean)
    assert_close(model.running_mean, torch.tensor([0.2, 0.5]))
    assert int(average.num_batches_tracked) == 1


def gather_gradient() -> torch.Tensor:
    table = torch.zeros(1, 257, 96, requires_grad=True)
    rows = torch.stack([torch.randperm(257, generator=torch.Generator().manual_seed(i))
                        for i in range(8)])  # fmt: skip
    weight = torch.randn(8, 257, 96, generator=torch.Generator().manual_seed(9))
    (table[0][rows] * weight).sum().backward()
    return table.grad


def test_reproducible_adds_up_in_one_order_and_restores_what_was_set():
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with reproducible(CPU, seed=1):
            assert torch.are_deterministic_algorithms_enabled()
            first = torch.rand(3)
            gradients = [gather_gradient() for _ in range(30)]
        assert not torch.are_deterministic_algorithms_enabled()
        with reproducible(CPU, seed=1):
            assert_close(torch.rand(3), first, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)
    for gradient in gradients[1:]:
        assert_close(gradient, gradients[0], rtol=0, atol=0)
