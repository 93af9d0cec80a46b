"""The alignment loss against its formula, written out in float64 without the product's code."""

import math

import pytest
import torch
from torch.testing import assert_close

from distill.kernels.alignment import alignment

TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-3},
}


def inputs(layers, batch, tokens, width, dtype=torch.float64):
    stream = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(*shape, generator=stream, dtype=torch.float64)

    raw = [draw(batch, tokens, width).to(dtype).requires_grad_() for _ in range(layers)]
    weight = [(1 + 0.3 * draw(width)).to(dtype).requires_grad_() for _ in range(layers)]
    bias = [(0.5 + 0.2 * draw(width)).to(dtype).requires_grad_() for _ in range(layers)]
    targets = draw(layers, batch, tokens, width)
    return raw, weight, bias, (targets / targets.norm(dim=-1, keepdim=True)).to(dtype)


def formula(raw, weight, bias, targets):
    """Row by row with scalars and plain sums."""
    losses = []
    for x, gain, shift, target in zip(raw, weight, bias, targets, strict=True):
        total, rows = 0.0, x.shape[0] * x.shape[1]
        for row, aim in zip(x.flatten(0, 1), target.flatten(0, 1), strict=True):
            centred = row - row.sum() / len(row)
            deviation = ((centred * centred).sum() / len(row) + 1e-5).sqrt()
            z = centred / deviation * gain + shift
            total = total + 2 - 2 * (z * aim).sum() / (z * z).sum().sqrt()
        losses.append(total / rows)
    return torch.stack(losses)


@pytest.mark.parametrize("width", [1, 13, 257])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_the_formulas(width, dtype):
    raw, weight, bias, targets = inputs(3, 2, 5, width, dtype)
    upstream = torch.tensor([0.7, -1.3, 2.1], dtype=torch.float64)
    found = alignment(raw, weight, bias, targets)
    leaves = [*raw, *weight, *bias]
    gradients = torch.autograd.grad((found.double() * upstream).sum(), leaves)

    exact = [[z.detach().double().requires_grad_() for z in group] for group in (raw, weight, bias)]
    expected = formula(*exact, targets.double())
    exact_leaves = [leaf for group in exact for leaf in group]
    exact_gradients = torch.autograd.grad((expected * upstream).sum(), exact_leaves)

    assert_close(found.double(), expected, **TOLERANCE[dtype])
    for gradient, want in zip(gradients, exact_gradients, strict=True):
        assert_close(gradient.double(), want, **TOLERANCE[dtype])


def test_half_precision_inputs_accumulate_in_float32():
    raw, weight, bias, targets = inputs(1, 2, 5, 64, torch.bfloat16)
    assert alignment(raw, weight, bias, targets).dtype == torch.float32


def test_loss_is_linear_in_targets_and_zero_at_its_aim():
    raw, weight, bias, targets = inputs(1, 2, 3, 16)
    aim = torch.nn.functional.layer_norm(raw[0], (16,), weight[0], bias[0], 1e-5)
    aim = (aim / aim.norm(dim=-1, keepdim=True)).detach()[None]
    assert_close(alignment(raw, weight, bias, aim), torch.zeros(1).double())
    full, scaled = alignment(raw, weight, bias, targets), alignment(raw, weight, bias, 3 * targets)
    assert_close(scaled - 2, 3 * (full - 2))


def test_normalisation_uses_the_decoders_epsilon():
    # A row of tiny variance is where 1e-5 and 1e-6 differ: gain 1 and bias b shift the direction.
    raw = [torch.tensor([[[1e-3, -1e-3]]], dtype=torch.float64)]
    z = 1e-3 / math.sqrt(1e-6 + 1e-5)
    weight, bias = [torch.ones(2).double()], [torch.tensor([1.0, 0.0]).double()]
    targets = torch.tensor([[[[1.0, 0.0]]]]).double()
    expected = 2 - 2 * (1 + z) / math.hypot(1 + z, -z)
    assert_close(alignment(raw, weight, bias, targets)[0].item(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, w, b, t: (r[:1], w, b, t), "expected as many layers in all arguments, got 1 "),
        (lambda r, w, b, t: (r, w, b, t[:, :, :4]), r"layer 0: expected projections \[2, 4, 8\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        alignment(*change(*inputs(2, 2, 5, 8)))
