"""The loss's kernels on a CUDA device, against float64 on the same inputs."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from distill.cache.codes import BITS, Codec
from distill.kernels.alignment import alignment, alignment_reference
from distill.kernels.coded_targets import decode_targets, decode_targets_reference
from distill.kernels.linear_alignment import linear_alignment, linear_alignment_reference
from distill.kernels.patch_embed import patch_embed, patch_embed_reference
from distill.students.vit import IMAGENET_MEAN, IMAGENET_STD

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

UPSTREAM = torch.tensor([0.7, -1.3, 2.1])
HALF = (torch.bfloat16, torch.float16)
MARGIN = 1.5  # of eager's own error against float64
STATISTICS = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """`torch.empty` holds NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would want a variable set
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape, seed=0):
    stream = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=stream, device="cuda", dtype=torch.float64)


def inputs(width, dtype, *, clips=3, tokens=67, layers=3):
    raw = [0.2 + draw(clips, tokens, width, seed=i) for i in range(layers)]
    gains = [1 + 0.3 * draw(width, seed=10 + i) for i in range(layers)]
    shifts = [0.2 * draw(width, seed=20 + i) for i in range(layers)]
    # As a student that has learnt something: gradients are differences then.
    targets = F.normalize(torch.stack(raw) + draw(layers, clips, tokens, width), dim=-1)
    groups = [[x.to(dtype) for x in raw], [x.float() for x in gains], [x.float() for x in shifts]]
    return groups, targets.to(dtype)


def run(call, groups, targets, *, upstream=UPSTREAM):
    """Losses, and gradients of every tensor in `groups`, in float64."""
    leaves = [[x.detach().requires_grad_() for x in group] for group in groups]
    losses = call(*leaves, targets)
    flat = [leaf for group in leaves for leaf in group]
    gradients = torch.autograd.grad((losses * upstream.to(losses)).sum(), flat)
    return [losses.detach().double(), *(x.double() for x in gradients)]


def exact(groups):
    return [[x.double() for x in group] for group in groups]


def check(found, eager, want):
    """Each error, as a share of its tensor's norm, at most MARGIN times eager's."""
    for index, (one, other, truth) in enumerate(zip(found, eager, want, strict=True)):
        length = truth.norm().item()
        error, allowed = (one - truth).norm().item(), (other - truth).norm().item()
        assert error <= MARGIN * allowed + 1e-6 * length, f"{index}: {error:.3g}, {allowed:.3g}"


def in_dtype(raw, weight, bias, targets):
    """Eager's loss with every step in the projections' dtype."""
    losses = []
    for x, gain, shift, target in zip(raw, weight, bias, targets, strict=True):
        gain, shift = gain.to(x.dtype), shift.to(x.dtype)
        student = F.normalize(F.layer_norm(x, x.shape[-1:], gain, shift, 1e-5), dim=-1)
        losses.append(2 - 2 * (student * target.to(x.dtype)).sum(-1).float().mean())
    return torch.stack(losses)


def coded(kind, targets):
    rows = targets.transpose(0, 1).float()  # [B,K,M,E]
    codec = Codec(kind, means=rows.mean((0, 2)).cpu())
    return codec, codec.encode(rows)


@pytest.mark.parametrize("width", [1, 13, 176, 257, 768, 1408, 3200])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_as_exact_as_eager(width, dtype):
    groups, targets = inputs(width, dtype)
    want = run(alignment_reference, exact(groups), targets.double())
    if dtype == torch.bfloat16:
        eager = run(in_dtype, groups, targets)
        check(run(alignment, groups, targets), eager, want)
    else:  # eager's own gradients vanish without a loss scale
        scale = 4096.0
        eager = run(in_dtype, groups, targets, upstream=scale * UPSTREAM)
        found = run(alignment, groups, targets, upstream=scale * UPSTREAM)
        want = [want[0], *(scale * x for x in want[1:])]
        check(found, eager, want)


@pytest.mark.parametrize("width", [13, 257, 1408])
def test_float32_is_exact(width):
    groups, targets = inputs(width, torch.float32)
    want = run(alignment_reference, exact(groups), targets.double())
    for one, truth in zip(run(alignment, groups, targets), want, strict=True):
        assert_close(one, truth, rtol=1e-4, atol=1e-5 * truth.abs().max().item())


@pytest.mark.parametrize("width", [176, 257, 768, 1408])
@pytest.mark.parametrize("kind", BITS)
def test_coded_targets_are_aligned_with_as_what_they_stand_for(kind, width):
    groups, targets = inputs(width, torch.bfloat16)
    codec, fields = coded(kind, targets)
    decoded = codec.decode(**{name: x.cpu() for name, x in fields.items()}).cuda().transpose(0, 1)
    want = run(alignment_reference, exact(groups), decoded.double())
    eager = run(in_dtype, groups, decoded.bfloat16())
    check(run(alignment, groups, codec.targets(**fields)), eager, want)


@pytest.mark.parametrize("width", [96, 176, 768, 1408, 3200])
@pytest.mark.parametrize("kind", BITS)
def test_decoded_targets_are_the_references(kind, width):
    _, targets = inputs(width, torch.float32)
    codec, fields = coded(kind, targets)
    found = decode_targets(codec.targets(**fields), torch.float16)
    want = decode_targets_reference(codec.targets(**fields), torch.float64)
    error = (found.double() - want).norm(dim=-1).max().item()
    assert error < 2e-3  # of unit vectors
    assert decode_targets(codec.targets(**fields), torch.float32).isfinite().all()


def test_the_expected_upstream_gradient_changes_nothing():
    groups, targets = inputs(1408, torch.float32)
    upstream = torch.full((3,), 0.3)
    expected = run(alignment, groups, targets, upstream=upstream)
    found = run(partial(alignment, upstream=0.3), groups, targets, upstream=upstream)
    assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_gradients_are_the_same_bits_in_every_run():
    groups, targets = inputs(1408, torch.bfloat16)
    codec, fields = coded("4bit", targets)
    for aims in (targets, codec.targets(**fields)):
        first = run(alignment, groups, aims)
        for _ in range(3):
            assert_close(run(alignment, groups, aims), first, rtol=0, atol=0)


def test_gradients_are_handed_out_once():
    groups, targets = inputs(13, torch.float32)
    leaves = [[x.requires_grad_() for x in group] for group in groups]
    loss = alignment(*leaves, targets).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out once"):
        loss.backward()


def test_offsets_past_two_to_the_31():
    width = 1408
    clips = 2**31 // (411 * width) + 8
    x = torch.empty(clips, 411, width, dtype=torch.bfloat16, device="cuda").normal_()
    targets = torch.empty_like(x).normal_().mul_(width**-0.5)[None]
    gain, shift = torch.ones(width, device="cuda"), torch.zeros(width, device="cuda")
    x.requires_grad_()
    alignment([x], [gain], [shift], targets).sum().backward()
    for part in (slice(0, 2), slice(clips // 2, clips // 2 + 2), slice(clips - 2, clips)):
        one = x.detach()[part].double().requires_grad_()
        want = alignment_reference([one], [gain], [shift], targets[:, part].double())
        (gradient,) = torch.autograd.grad(want.sum() * 2 / clips, [one])
        error = (x.grad[part].double() - gradient).norm() / gradient.norm()
        assert error.item() < 5e-3


def linear_inputs(width, dtype, *, out_width=1408):
    """Arguments of the loss with its linear layers, and targets [K,B,M,E]."""
    groups, targets = inputs(out_width, dtype)
    states = [draw(3, 67, width, seed=30 + i).to(dtype) for i in range(3)]
    matrices = [draw(out_width, width, seed=40 + i).float() / width**0.5 for i in range(3)]
    shifts = [0.1 * draw(out_width, seed=50 + i).float() for i in range(3)]
    return [states, matrices, shifts, *groups[1:]], targets


# By Gram matrices, by chunks, and an odd size of each; float16 is by chunks alone.
@pytest.mark.parametrize(
    ("width", "dtype"),
    [(384, torch.bfloat16), (65, torch.bfloat16), (768, torch.bfloat16), (513, torch.bfloat16)]
    + [(384, torch.float16)],
)
@pytest.mark.parametrize("kind", [None, "4bit", "2bit"])
def test_linear_alignment_is_as_exact_as_eager(width, dtype, kind):
    arguments, targets = linear_inputs(width, dtype)
    scale = 4096.0 if dtype == torch.float16 else 1.0  # as of a loss scale
    aims = decoded = targets
    if kind is not None:
        codec, fields = coded(kind, targets)
        aims = codec.targets(**fields)
        decoded = decode_targets_reference(aims, torch.float64).transpose(0, 1)
    upstream = scale * UPSTREAM
    want = run(linear_alignment_reference, exact(arguments), decoded.double(), upstream=upstream)

    def eager(states, matrices, shifts, gains, biases, targets):
        raw = [
            F.linear(h, w.to(h.dtype), b.to(h.dtype))
            for h, w, b in zip(states, matrices, shifts, strict=True)
        ]
        return in_dtype(raw, gains, biases, targets)

    found = run(linear_alignment, arguments, aims, upstream=upstream)
    check(found, run(eager, arguments, decoded.to(dtype), upstream=upstream), want)


@pytest.mark.parametrize("width", [384, 768])
@pytest.mark.parametrize("kind", [None, "4bit"])
def test_gradients_of_linear_layers_are_the_same_bits_in_every_run(width, kind):
    arguments, targets = linear_inputs(width, torch.bfloat16)
    if kind is not None:
        codec, fields = coded(kind, targets)
        targets = codec.targets(**fields)
    first = run(linear_alignment, arguments, targets)
    for _ in range(3):
        assert_close(run(linear_alignment, arguments, targets), first, rtol=0, atol=0)


def test_linear_alignment_keeps_no_projection():
    out_width, width, clips = 1408, 384, 64
    states = [torch.randn(clips, 411, width, device="cuda").bfloat16().requires_grad_()]
    matrix = [torch.randn(out_width, width, device="cuda", requires_grad=True)]
    vectors = [[torch.ones(out_width, device="cuda", requires_grad=True)] for _ in range(3)]
    targets = torch.randn(1, clips, 411, out_width, device="cuda").bfloat16()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    loss = linear_alignment(states, matrix, *vectors, targets)
    kept = torch.cuda.memory_allocated() - before
    assert loss.shape == (1,)
    # Gradients of the states and of the weights; a projection alone would be 74 MB.
    assert kept < 2 * (states[0].numel() * 2 + matrix[0].numel() * 4)


@pytest.mark.parametrize("rows", [1, 63, 1000])
@pytest.mark.parametrize("dtype", HALF)
def test_patches_are_embedded_as_exactly_as_by_eager(rows, dtype):
    stream = torch.Generator("cuda").manual_seed(rows)
    patches = torch.randint(
        0, 256, (2, rows, 588), dtype=torch.uint8, device="cuda", generator=stream
    )
    weight, bias = draw(384, 588) / 588**0.5, draw(384)
    upstream = draw(2, rows, 384)

    def results(call, weight, bias):
        leaves = [x.detach().requires_grad_() for x in (weight, bias)]
        out = call(patches, *leaves, **STATISTICS)
        gradients = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
        return [x.detach().double() for x in (out, *gradients)]

    want = results(patch_embed_reference, weight, bias)
    eager = results(patch_embed_reference, weight.to(dtype), bias.to(dtype))
    check(results(patch_embed, weight.to(dtype), bias.to(dtype)), eager, want)


def test_embeddings_are_the_same_bits_in_every_run():
    stream = torch.Generator("cuda").manual_seed(0)
    patches = torch.randint(
        0, 256, (64, 410, 588), dtype=torch.uint8, device="cuda", generator=stream
    )
    leaves = [draw(384, 588).bfloat16().requires_grad_(), draw(384).bfloat16().requires_grad_()]
    found = []
    for _ in range(3):
        out = patch_embed(patches, *leaves, **STATISTICS)
        gradients = torch.autograd.grad(out.float().square().mean(), leaves)
        found.append([out.detach(), *gradients])
    assert_close(found[1:], found[:1] * 2, rtol=0, atol=0)


def test_patches_past_two_to_the_31():
    rows = 2**31 // 588 + 4096
    patches = torch.randint(0, 256, (rows, 588), dtype=torch.uint8, device="cuda")
    weight, bias = draw(16, 588).bfloat16() / 16, draw(16).bfloat16()
    found = patch_embed(patches, weight, bias, **STATISTICS)
    part = slice(rows - 64, rows)
    want = patch_embed_reference(patches[part], weight.double(), bias.double(), **STATISTICS)
    assert_close(found[part].double(), want, rtol=2e-2, atol=2e-2)
