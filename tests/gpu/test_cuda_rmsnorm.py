"""The residual norm on a CUDA device: its error against float64, and what only a device shows."""

import pytest
import torch
from formulas import relative_error, rmsnorm_formula
from torch.testing import assert_close

from distill.kernels.rmsnorm import rmsnorm, rmsnorm_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda", 0)
INPUTS = ("x", "weight", "branch", "gamma", "keep")
LEAVES = ("x", "weight", "branch", "gamma")
FORMS = {
    "all": INPUTS,
    "no drop path": ("x", "weight", "branch", "gamma"),
    "no norm": ("x", "branch", "gamma", "keep"),
    "norm": ("x", "weight"),
}
TYPES = {
    "float32": (torch.float32, torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16, torch.float16),
    "autocast": (torch.float32, torch.bfloat16, torch.float32),
}


def inputs(shape, form, types):
    stream = torch.Generator(CUDA).manual_seed(sum(shape))
    draw = lambda *size: torch.randn(size, generator=stream, device=CUDA)  # noqa: E731
    of_x, of_branch, of_gains = TYPES[types]
    found = {
        "x": draw(*shape).to(of_x),
        "weight": (1 + 0.3 * draw(shape[-1])).to(of_gains),
        "branch": draw(*shape).to(of_branch),
        "gamma": (0.5 + 0.3 * draw(shape[-1])).to(of_gains),
        "keep": (torch.arange(shape[0], device=CUDA) % 3) / 1.5,
    }
    found = {name: tensor for name, tensor in found.items() if name in FORMS[form]}
    if "branch" in found:
        found["d_h"] = draw(*shape).to(of_x)
    if "weight" in found:
        found["d_out"] = draw(*shape).to(of_x)
    return found


def with_gradients(call, tensors):
    leaves = {
        name: tensor.detach().clone().requires_grad_()
        for name, tensor in tensors.items()
        if name in LEAVES
    }
    others = {name: leaves.get(name, tensors.get(name)) for name in INPUTS[2:]}
    h, out = call(leaves["x"], leaves.get("weight"), **others)
    made = {"h": h if "branch" in leaves else None, "out": out}
    made = {name: tensor for name, tensor in made.items() if tensor is not None}
    upstream = [tensors[f"d_{name}"].to(tensor.dtype) for name, tensor in made.items()]
    gradients = torch.autograd.grad(list(made.values()), list(leaves.values()), upstream)
    found = {name: tensor.detach() for name, tensor in made.items()}
    return found | {f"d_{name}": d for name, d in zip(leaves, gradients, strict=True)}


def formula(x, weight, *, branch, gamma, keep):
    return rmsnorm_formula(x, weight, branch, gamma, keep)


@pytest.fixture
def poisoned(monkeypatch):
    """`torch.empty` holds NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape", [(3, 67, 64), (5, 411, 384), (2, 411, 1024), (2, 257, 1408), (3, 9, 3200), (7, 17)]
)
def test_the_kernels_lose_no_more_than_eager_does(poisoned, shape, form, types):
    tensors = inputs(shape, form, types)
    found, eager = with_gradients(rmsnorm, tensors), with_gradients(rmsnorm_reference, tensors)
    exact = with_gradients(formula, {name: tensor.double() for name, tensor in tensors.items()})
    for name in exact:
        assert found[name].dtype == eager[name].dtype
        error = relative_error(found[name], exact[name])
        # In float32 both err by single roundings, of which either may have more.
        allowed = max(1.5 * relative_error(eager[name], exact[name]), 2e-7)
        assert error <= allowed, f"{name}: {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 384), (0, 5, 64), (1, 384)])
def test_sizes_of_one_and_of_nothing_are_fine(poisoned, shape):
    tensors = inputs(shape, "all", "float32")
    exact = with_gradients(formula, {name: tensor.double() for name, tensor in tensors.items()})
    expected = {name: tensor.float() for name, tensor in exact.items()}
    assert_close(with_gradients(rmsnorm, tensors), expected, rtol=1e-4, atol=1e-5)


def test_equal_input_gives_equal_bits():
    tensors = inputs((128, 411, 384), "all", "autocast")
    first = with_gradients(rmsnorm, tensors)
    for _ in range(5):
        assert_close(with_gradients(rmsnorm, tensors), first, rtol=0, atol=0)


def test_offsets_past_two_to_the_31():
    width, rows = 1408, 2**31 // 1408 + 4096
    tensors = inputs((4, width), "all", "bfloat16")
    repeats = -(-rows // 4)
    many = {
        name: tensor if name in ("weight", "gamma") else tensor.repeat(repeats, 1)
        for name, tensor in tensors.items()
        if name != "keep"
    }
    many["keep"] = tensors["keep"].repeat(repeats)
    assert many["x"].numel() > 2**31
    found, expected = with_gradients(rmsnorm, many), with_gradients(rmsnorm, tensors)
    for name in ("h", "out", "d_x", "d_branch"):
        for part in (slice(0, 4), slice(-4, None)):
            assert_close(found[name][part], expected[name], rtol=0, atol=0)
