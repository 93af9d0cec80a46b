"""Alignment of linear projections against its formula in float64, gradients by autograd."""

import pytest
import torch
from coded import coded_targets, vectors
from interpret import interpret
from test_alignment import formula
from torch.testing import assert_close

from distill.kernels import alignment as alignment_module
from distill.kernels import linear_alignment as module
from distill.kernels.gpu_build import CAPABILITIES, SHARED_LIMIT, build
from distill.kernels.linear_alignment import _gram, linear_alignment

UPSTREAM = 0.6
EACH = torch.tensor([UPSTREAM, -1.2])  # layers' upstream gradients
APPLIED = (24, module.WIDEST_GRAM + 1)  # by Gram matrices, and by chunks
GRAM = {"rtol": 1e-9, "atol": 1e-11}
CODED = {"rtol": 1e-6, "atol": 1e-8}  # codes' rows are a float32 product
SINGLE = {"rtol": 1e-4, "atol": 1e-6}
KERNEL = {"rtol": 1e-5, "atol": 1e-6}


def inputs(width, out_width, dtype=torch.float64, *, clips=3, tokens=5):
    """One layer's states, weights, bias, gain and shift; centred they are not."""
    stream = torch.Generator().manual_seed(width)

    def draw(*shape):
        return torch.randn(*shape, generator=stream, dtype=torch.float64)

    h = 0.3 + draw(clips, tokens, width)
    linear = draw(out_width, width) / width**0.5 + 0.1, 0.2 + draw(out_width)
    norm = 1 + 0.3 * draw(out_width), 0.5 + 0.2 * draw(out_width)
    return [x.to(dtype) for x in (h, *linear, *norm)]


def expected(arguments, targets):
    """The loss and its gradients times UPSTREAM; targets [B,M,E]."""
    leaves = [x.detach().double().requires_grad_() for x in arguments]
    h, weight, bias, gain, shift = leaves
    raw = (h[..., None, :] * weight).sum(-1) + bias
    (loss,) = formula([raw], [gain], [shift], targets[None].double())
    return loss.detach(), *torch.autograd.grad(UPSTREAM * loss, leaves)


def plain_targets(clips, tokens, width):
    stream = torch.Generator().manual_seed(5)
    found = torch.randn(clips, tokens, width, generator=stream, dtype=torch.float64)
    return found / found.norm(dim=-1, keepdim=True)


def rows_in_torch(h, products, squares, scales, vectors, numbers, *, out_width, factor):
    """What the kernel writes, in the dtype of its inputs."""
    width = h.shape[1]
    g_bias, q_bias, shift, mean_product = vectors[:4]
    p = products[:, :width] * scales[:, None] + mean_product
    p_bias, p_shift = (products[:, width + i] * scales for i in range(2))
    g, q = squares.chunk(2, dim=1)
    variance = (h * (g + 2 * g_bias)).sum(1) + numbers[0]
    r = ((variance / out_width).clamp_min(0) + alignment_module.EPS).rsqrt()
    squared = (h * (q + 2 * q_bias)).sum(1) + numbers[1]
    along = (h * shift).sum(1) + numbers[2]
    length = r.square() * squared + 2 * r * along + numbers[3]
    inverse = 1 / length.clamp_min(0).sqrt().clamp_min(alignment_module.TINY)
    u = (h * p).sum(1) + p_bias + numbers[4]
    cosine = (r * u + p_shift + numbers[5]) * inverse
    a, e = -2 * inverse, cosine * inverse.square()
    dr = a * u + 2 * e * (r * squared + along)
    f = -r.pow(3) * dr / 2 / out_width
    ar, er, err, none = a * r, e * r, e * r.square(), torch.zeros_like(a)
    dh = ar[:, None] * p + 2 * err[:, None] * (q + q_bias)
    dh += 2 * er[:, None] * shift + 2 * f[:, None] * (g + g_bias)
    beside = torch.stack([ar * scales, a * scales, *[none] * (module.PAD - 2)], dim=1)
    weighted = torch.cat([(ar * scales)[:, None] * h, beside], dim=1)
    beside = torch.stack([ar, err, er, f, *[none] * (module.PAD - 4)], dim=1)
    curved = torch.cat([err[:, None] * h, f[:, None] * h, beside], dim=1)
    sums = torch.stack([2 - 2 * cosine, ar, a, err, er, e, f, none], dim=1)
    return factor * dh, weighted, curved, sums


@pytest.fixture(params=["whole", "clip by clip"])
def parts(request, monkeypatch):
    if request.param != "whole":
        monkeypatch.setattr(module, "DECODED_BYTES", 1)


@pytest.mark.parametrize(("width", "out_width"), [(1, 13), (24, 57), (16, 1408)])
def test_the_gram_form_is_exact(parts, width, out_width):
    arguments, targets = inputs(width, out_width), plain_targets(3, 5, out_width)
    found = _gram(*arguments, targets[None], upstream=UPSTREAM, rows_part=rows_in_torch)
    for one, want in zip(found, expected(arguments, targets), strict=True):
        assert_close(one, want, **GRAM)


@pytest.mark.parametrize(("bits", "out_width"), [(8, 96), (4, 176), (3, 257), (2, 1408)])
def test_the_gram_form_takes_codes_in_their_frame(parts, bits, out_width):
    arguments = inputs(24, out_width)
    targets = coded_targets(bits, out_width, clips=3, layers=2).layer(1)
    found = _gram(*arguments, targets, upstream=UPSTREAM, rows_part=rows_in_torch)
    for one, want in zip(found, expected(arguments, vectors(targets)[:, 0]), strict=True):
        assert_close(one, want, **CODED)


def row_inputs(width, rows=37):
    stream = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=stream)

    squares = draw(rows, 2 * width).abs() * draw(rows, width).sign().repeat(1, 2)
    h = squares[:, :width].sign() * draw(rows, width).abs()  # h' G h is positive
    return (
        h,
        draw(rows, width + module.PAD),
        squares,
        0.5 + torch.rand(rows, generator=stream),
        draw(5, width),
        torch.tensor([9.0 * width, 9.0 * width, 0.3, 40.0, -0.2, 0.7]),
    )


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    calls = {}
    for width in (24, 65):
        settings = {"out_width": 57, "factor": 0.01}
        place = "linear_alignment._rows_in_triton"
        calls[f"rows {width}"] = (place, row_inputs(width), settings)
    arguments, targets = inputs(24, 57, torch.float32), plain_targets(3, 5, 57).float()
    settings = {"upstream": UPSTREAM}
    for form in ("gram", "chunks"):
        calls[form] = (f"linear_alignment._{form}", (*arguments, targets[None]), settings)
    parts = ("linear_alignment._chunks", (*arguments, targets[None]), settings)
    calls["chunks clip by clip"] = ("applied.clip_by_clip", parts, {})
    coded = (*inputs(24, 96, torch.float32), coded_targets(4, 96, clips=3, layers=1))
    calls["coded chunks"] = ("linear_alignment._chunks", coded, settings)
    for width in APPLIED:
        leaves = inputs(width, 57, torch.float32)
        groups = [[x.clone().requires_grad_() for _ in EACH] for x in leaves]
        targets = plain_targets(3, 5, 57).float()
        arguments = (*groups, torch.stack([targets, -targets]))
        call = ("linear_alignment.linear_alignment", arguments, {"upstream": UPSTREAM})
        calls[f"applied {width}"] = ("applied.gradients", (*call, [EACH]), {})
        calls[f"twice {width}"] = ("applied.second_backward", call, {})
    return interpret(calls, tmp_path_factory.mktemp("interpreter"))


@pytest.mark.parametrize("width", [24, 65])
def test_the_kernel_is_therows_in_torch_and_writes_every_element(interpreted, width):
    exact = [x.double() for x in row_inputs(width)]
    want = rows_in_torch(*exact, out_width=57, factor=0.01)
    for one, other in zip(interpreted[f"rows {width}"], want, strict=True):
        assert_close(one.double(), other, **KERNEL)


@pytest.mark.parametrize("name", ["gram", "chunks", "chunks clip by clip"])
def test_with_kernels_it_is_the_formula(interpreted, name):
    want = expected(inputs(24, 57, torch.float32), plain_targets(3, 5, 57).float())
    for one, other in zip(interpreted[name], want, strict=True):
        assert_close(one.double(), other, **SINGLE)


def test_chunks_take_coded_targets(interpreted):
    targets = vectors(coded_targets(4, 96, clips=3, layers=1))[:, 0]
    want = expected(inputs(24, 96, torch.float32), targets)
    for one, other in zip(interpreted["coded chunks"], want, strict=True):
        assert_close(one.double(), other, **SINGLE)


@pytest.mark.parametrize("width", APPLIED)
def test_the_function_is_the_formula_for_every_layer(interpreted, width):
    (losses,), found = interpreted[f"applied {width}"]
    arguments, targets = inputs(width, 57, torch.float32), plain_targets(3, 5, 57).float()
    for layer, aims in enumerate((targets, -targets)):
        loss, *want = expected(arguments, aims)
        assert_close(losses[layer].double(), loss, **SINGLE)
        for one, gradient in zip(found[layer::2], want, strict=True):
            assert_close(one.double(), gradient * EACH[layer] / UPSTREAM, **SINGLE)
    assert "handed out once" in interpreted[f"twice {width}"]


def test_the_operation_is_the_formula_for_every_layer():
    arguments = [[x.requires_grad_() for x in inputs(width, 57)] for width in (24, 16)]
    targets = torch.stack([plain_targets(3, 5, 57), -plain_targets(3, 5, 57)])
    groups = list(zip(*arguments, strict=True))
    losses = linear_alignment(*groups, targets)
    for layer, leaves in enumerate(arguments):
        loss, *want = expected(leaves, targets[layer])
        assert_close(losses[layer], loss)
        found = torch.autograd.grad(UPSTREAM * losses[layer], leaves, retain_graph=True)
        assert_close(list(found), want)


@pytest.mark.parametrize("width", [384, 512])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernel_compiles_for_gpus(capability, width, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    block = 1 << (width - 1).bit_length()
    made = build(
        module._linear_alignment_fwd_kernel,
        capability,
        types={
            "states": "*bf16",
            "products": "*fp16",
            "squares": "*bf16",
            **dict.fromkeys(("scales", "vectors", "numbers"), "*fp32"),
            "gradients": "*bf16",
            "weighted": "*fp16",
            "curved": "*bf16",
            "sums": "*fp32",
            **dict.fromkeys(("num_rows", "width", "out_width"), "i32"),
            "factor": "fp32",
        },
        constants={
            "EPS": alignment_module.EPS,
            "TINY": alignment_module.TINY,
            "PAD": module.PAD,
            "ROWS": module.TILE // block,
            "BLOCK": block,
        },
        warps=module.NUM_WARPS,
        multiples_of_16=("width", "out_width"),
    )
    assert (made.stack_bytes, made.local_bytes) == (0, 0), "registers are spilled"
    assert made.registers <= 80, "of 65,536: at least three blocks of 256 threads run at once"
    assert made.shared_bytes <= SHARED_LIMIT[capability] // 3
    assert "ld.global.v4.b32" in made.ptx and "st.global.v4.b32" in made.ptx


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, t: ([g[0][:1], *g[1:]], t), "expected 2 layers in all .* got 1, 2, 2, 2, 2"),
        (
            lambda g, t: (g, t[..., :7]),
            r"layer 0: expected states \[3, 5\] and weights \[7, 24\] as the targets, got \[3, 5, ",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    groups = [[x] * 2 for x in inputs(24, 57)]
    groups, targets = change(groups, torch.stack([plain_targets(3, 5, 57)] * 2))
    with pytest.raises(ValueError, match=message):
        linear_alignment(*groups, targets)
