"""Attention on a CUDA device: its error against float64 and what only a device can show."""

import pytest
import torch
from formulas import attention_formula, relative_error
from torch.testing import assert_close

from distill.kernels.attention import (
    _attention_bwd,
    _attention_fwd,
    attention,
    attention_reference,
    pack,
    pack_evenly,
    stock_attention,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda", 0)
NAMES = ("out", "qkv", "q_gain", "k_gain")
SEQUENCES = {
    "visible": [411] * 8,
    "ragged": [1, 17, 0, 67, 411, 128, 0, 300],
    "dense": [2049, 1025],
}


def inputs(lengths, heads, d, *, dtype, gains=torch.float32):
    width = heads * d
    stream = torch.Generator(CUDA).manual_seed(1000 * heads + d)
    draw = lambda *size: torch.randn(size, generator=stream, device=CUDA)  # noqa: E731
    leaves = (draw(sum(lengths), 3 * width).to(dtype), 1 + 0.3 * draw(width), 1 + 0.3 * draw(width))
    leaves = [leaves[0], *(gain.to(gains) for gain in leaves[1:])]
    return leaves, draw(sum(lengths), width).to(dtype)


def packing_of(lengths):
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return pack(ends, device=CUDA)


def with_gradients(call, leaves, d_out):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = call(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))


@pytest.fixture
def poisoned(monkeypatch):
    """`torch.empty` holds NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("gains", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [16, 64, 88, 128])
@pytest.mark.parametrize("sequences", SEQUENCES)
def test_half_precision_loses_no_more_than_eager_does(poisoned, sequences, d, dtype, gains):
    lengths, heads = SEQUENCES[sequences], 3
    leaves, d_out = inputs(lengths, heads, d, dtype=dtype, gains=gains)
    packing = packing_of(lengths)
    found = with_gradients(lambda *x: attention(*x, packing, heads=heads), leaves, d_out)
    eager = with_gradients(lambda *x: attention_reference(*x, packing, heads=heads), leaves, d_out)
    exact = with_gradients(
        lambda *x: attention_formula(*x, lengths=lengths, heads=heads),
        [leaf.double() for leaf in leaves],
        d_out,
    )
    for name, ours, theirs, formula in zip(NAMES, found, eager, exact, strict=True):
        assert ours.dtype == theirs.dtype
        error, allowed = relative_error(ours, formula), 1.5 * relative_error(theirs, formula)
        assert error <= allowed, f"{name}: {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [67, 2049])
def test_a_frozen_models_attention_loses_no_more_than_eager_does(poisoned, tokens, dtype):
    leaves, _ = inputs([tokens] * 2, 16, 88, dtype=dtype)
    packing = pack_evenly(2, tokens)
    with torch.inference_mode():
        found = stock_attention(*leaves, packing, heads=16)
        eager = attention_reference(*leaves, packing, heads=16)
        exact = attention_formula(*leaves, lengths=[tokens] * 2, heads=16)
    assert relative_error(found, exact) <= 1.5 * relative_error(eager, exact)


@pytest.mark.parametrize("heads", [1, 6, 16])
@pytest.mark.parametrize("lengths", [[1], [1, 1, 0], [64], [65, 63]])
def test_sizes_of_one_and_whole_tiles_are_fine(poisoned, lengths, heads):
    leaves, d_out = inputs(lengths, heads, 64, dtype=torch.float16)
    packing = packing_of(lengths)
    found = with_gradients(lambda *x: attention(*x, packing, heads=heads), leaves, d_out)
    exact = with_gradients(
        lambda *x: attention_formula(*x, lengths=lengths, heads=heads),
        [leaf.double() for leaf in leaves],
        d_out,
    )
    for name, ours, formula in zip(NAMES, found, exact, strict=True):
        assert_close(
            ours.double(), formula, rtol=1e-2, atol=1e-2, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("lengths", [[0, 0], []])
def test_no_tokens_are_no_launch(lengths):
    leaves, d_out = inputs(lengths, 2, 64, dtype=torch.bfloat16)
    packing = packing_of(lengths)
    out, *gradients = with_gradients(lambda *x: attention(*x, packing, heads=2), leaves, d_out)
    assert (out.shape, gradients[0].shape) == ((0, 128), (0, 384))
    assert_close(gradients[1:], [torch.zeros(128, device=CUDA)] * 2, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_types_take_the_reference(dtype):
    leaves, _ = inputs([5, 9], 2, 64, dtype=dtype, gains=dtype)
    packing = packing_of([5, 9])
    found = attention(*leaves, packing, heads=2)
    assert_close(found, attention_reference(*leaves, packing, heads=2), rtol=0, atol=0)


@pytest.mark.parametrize("d", [64, 88])
def test_equal_input_gives_equal_bits(d):
    leaves, d_out = inputs([411] * 32, 6, d, dtype=torch.bfloat16)
    packing = pack_evenly(32, 411)
    first = with_gradients(lambda *x: attention(*x, packing, heads=6), leaves, d_out)
    for _ in range(5):
        again = with_gradients(lambda *x: attention(*x, packing, heads=6), leaves, d_out)
        assert_close(again, first, rtol=0, atol=0)


def test_offsets_past_two_to_the_31():
    heads, d, tokens = 16, 64, 411
    clips = 2**31 // (3 * heads * d * tokens) + 8
    leaves, d_out = inputs([tokens], heads, d, dtype=torch.bfloat16)
    qkv, d_outs = leaves[0].repeat(clips, 1), d_out.repeat(clips, 1)
    assert qkv.numel() > 2**31
    many = {"heads": heads, "clips": clips, "longest": tokens}
    one = {**many, "clips": 1}
    found = _attention_fwd(qkv, *leaves[1:], None, **many)
    expected = _attention_fwd(*leaves, None, **one)
    d_qkv, *_ = _attention_bwd(d_outs, qkv, *leaves[1:], *found, None, **many)
    d_one, *_ = _attention_bwd(d_out, *leaves, *expected, None, **one)
    for clip in (0, clips // 2, clips - 1):
        rows = slice(clip * tokens, (clip + 1) * tokens)
        assert_close(found[0][rows], expected[0], rtol=0, atol=0)
        assert_close(d_qkv[rows], d_one, rtol=0, atol=0)
