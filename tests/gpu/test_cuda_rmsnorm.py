"""The residual norm on a CUDA device: its error against float64, and what only a device shows."""

import pytest
import torch
from formulas import relative_error
from residual import FORMS, exact, inputs, with_gradients
from torch.testing import assert_close

from distill.kernels.rmsnorm import rmsnorm, rmsnorm_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TYPES = {
    "float32": ("float32", "float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16", "bfloat16"),
    "float16": ("float16", "float16", "float16"),
    "autocast": ("float32", "bfloat16", "float32"),
}


def by(operation):
    return lambda x, weight=None, **others: operation(x, weight, **others)


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
    tensors = inputs(shape, form, TYPES[types], device="cuda")
    found, eager = (with_gradients(by(f), tensors) for f in (rmsnorm, rmsnorm_reference))
    want = exact(tensors)
    for name in want:
        assert found[name].dtype == eager[name].dtype
        error = relative_error(found[name], want[name])
        # In float32 both err by single roundings, of which either may have more.
        allowed = max(1.5 * relative_error(eager[name], want[name]), 2e-7)
        assert error <= allowed, f"{name}: {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 384), (0, 5, 64), (1, 384)])
def test_sizes_of_one_and_of_nothing_are_fine(poisoned, shape):
    tensors = inputs(shape, "all", TYPES["float32"], device="cuda")
    expected = {name: tensor.float() for name, tensor in exact(tensors).items()}
    assert_close(with_gradients(by(rmsnorm), tensors), expected, rtol=1e-4, atol=1e-5)


def test_equal_input_gives_equal_bits():
    tensors = inputs((128, 411, 384), "all", TYPES["autocast"], device="cuda")
    first = with_gradients(by(rmsnorm), tensors)
    for _ in range(5):
        assert_close(with_gradients(by(rmsnorm), tensors), first, rtol=0, atol=0)


def test_offsets_past_two_to_the_31():
    width, rows = 1408, 2**31 // 1408 + 4096
    tensors = inputs((4, width), "all", TYPES["bfloat16"], device="cuda")
    repeats = -(-rows // 4)
    many = {
        name: tensor if name in ("weight", "gamma") else tensor.repeat(repeats, 1)
        for name, tensor in tensors.items()
        if name != "keep"
    }
    many["keep"] = tensors["keep"].repeat(repeats)
    assert many["x"].numel() > 2**31
    found, expected = with_gradients(by(rmsnorm), many), with_gradients(by(rmsnorm), tensors)
    for name in ("h", "out", "d_x", "d_branch"):
        for part in (slice(0, 4), slice(-4, None)):
            assert_close(found[name][part], expected[name], rtol=0, atol=0)
