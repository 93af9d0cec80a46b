"""The alignment loss, plain and coded targets, and with the last linear layer folded in.

Every contender returns the losses [K] of raw projections [B,M,E] (or of what comes before the
last linear layer) and the gradients of all its inputs and parameters.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import (
    BOTH,
    Case,
    Contender,
    Goal,
    Inputs,
    Skipped,
    by_torch,
    by_triton,
    compiled,
)
from benchmarks.kernels.measure import Work
from distill.cache.codes import Codec, row_bytes
from distill.kernels import linear_alignment as linear_module
from distill.kernels.alignment import EPS, alignment, alignment_reference
from distill.kernels.coded_targets import CodedTargets
from distill.kernels.codes import unpack
from distill.kernels.linear_alignment import linear_alignment

ALIGNMENT_GOALS = (
    Goal("time", ("eager",), 8.0, 12.0),
    Goal("time", ("compile",), 1.5, 2.0),
    Goal("memory", ("eager",), 5.0, None),
)
PLAIN_GOALS = (*ALIGNMENT_GOALS, Goal("copy", (), 0.8, 0.9))
CODED_GOALS = (*ALIGNMENT_GOALS, Goal("floor", (), 0.8, 0.9))
LINEAR_GOALS = (Goal("time", ("gemm",), 1.2, 1.5), Goal("memory", ("gemm-eager",), None, 10.0))


class Shape(NamedTuple):
    layers: int
    clips: int
    tokens: int
    width: int  # of the teacher
    inner: int = 0  # of what the last linear layer takes

    @property
    def rows(self) -> int:
        return self.layers * self.clips * self.tokens


def alignment_work(shape: Shape, bits: int | None = None) -> dict[str, Work]:
    """Projections and targets in, gradients out; turning codes costs two small products a row."""
    size = shape.rows * shape.width
    if bits is None:
        return {BOTH: Work(0.0, size * (2 + 2 + 2))}
    coded = shape.rows * (row_bytes(f"{bits}bit", shape.width) + 2)  # with their scales
    return {BOTH: Work(rotation_flops(shape), size * (2 + 2) + coded)}


@cache
def factors(width: int) -> tuple[int, int]:
    """Sizes of the rotation's two factors, as codes have them."""
    none = torch.zeros(1, 1, 1, row_bytes("2bit", width), dtype=torch.uint8)
    codec = Codec("2bit", means=torch.zeros(1, width))
    targets = codec.targets(none, torch.zeros(1, 1, 1, dtype=torch.float16))
    return len(targets.left), len(targets.right)


def rotation_flops(shape: Shape) -> float:
    """Of a product with each factor for every row."""
    return 2.0 * shape.rows * shape.width * sum(factors(shape.width))


def linear_work(shape: Shape, bits: int | None = None) -> dict[str, Work]:
    """Three products; states, targets and weights in, their gradients out."""
    flops = 3 * 2.0 * shape.rows * shape.inner * shape.width
    target = 2 * shape.width if bits is None else row_bytes(f"{bits}bit", shape.width) + 2
    weights = shape.layers * shape.width * shape.inner * (4 + 4)
    return {BOTH: Work(flops, shape.rows * (2 * 2 * shape.inner + target) + weights)}


def layer_loss(x: Tensor, gain: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """In the dtype of x but for the mean, as upstream's loop does it."""
    gain, bias = gain.to(x.dtype), bias.to(x.dtype)
    student = F.normalize(F.layer_norm(x, x.shape[-1:], gain, bias, EPS), dim=-1)
    return 2 - 2 * (student * target.to(x.dtype)).sum(-1).float().mean()


def eager_loss(raw, weight, bias, targets) -> Tensor:
    layers = zip(raw, weight, bias, targets, strict=True)
    return torch.stack([layer_loss(*layer) for layer in layers])


def decoded(targets: CodedTargets, dtype: torch.dtype) -> list[Tensor]:
    """Vectors [B,M,E] of every layer, by plain operations in half precision."""
    codes, scales, levels, means, flips, left, right = targets
    bits, width = len(levels).bit_length() - 1, len(flips)
    found = []
    for layer in range(codes.shape[1]):
        values = unpack(codes[:, layer], bits=bits, width=width)
        rows = levels.to(dtype)[values].unflatten(-1, (len(left), len(right)))
        rows = (left.to(dtype) @ rows @ right.to(dtype)).flatten(-2)
        rows = rows * (flips.to(torch.float32) * scales[:, layer, :, None]).to(dtype)
        found.append(rows + means[layer].to(dtype))
    return found


def eager_coded(raw, weight, bias, targets) -> Tensor:
    return eager_loss(raw, weight, bias, decoded(targets, raw[0].dtype))


def vectors(targets: CodedTargets, clips: slice) -> Tensor:
    """Float64 [K,B,M,E] of some clips, with the whole rotation as one matrix."""
    codes, scales, levels, means, flips, left, right = targets
    bits, width = len(levels).bit_length() - 1, len(flips)
    values = unpack(codes[clips], bits=bits, width=width).long()
    turned = levels.double()[values] @ torch.kron(left.double(), right.double())
    rows = means.double()[:, None] + scales[clips].double()[..., None] * turned * flips.double()
    return rows.transpose(0, 1)


def formula(x: Tensor, gain: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """The sum over rows of one layer, one operation at a time."""
    centred = x - x.mean(-1, keepdim=True)
    z = centred * (centred.square().mean(-1, keepdim=True) + EPS).rsqrt() * gain + bias
    return (2 - 2 * (z * target).sum(-1) / z.norm(dim=-1)).sum()


def exact(shape: Shape, inputs: Inputs, *, has_linear: bool) -> dict[str, Tensor]:
    """Losses and every gradient by the formula in float64, a few clips of a layer at a time."""
    *groups, targets = inputs.arguments
    step = max(1, 2**25 // (shape.tokens * shape.width))
    rows = shape.clips * shape.tokens
    losses = torch.zeros(shape.layers, dtype=torch.float64, device=targets[0].device)
    gradients: list[list[Tensor]] = [[] for _ in groups]
    for layer in range(shape.layers):
        states, *parameters = (group[layer].detach().double() for group in groups)
        parameters = [x.requires_grad_() for x in parameters]
        totals = [torch.zeros_like(x) for x in parameters]
        parts = []
        by = inputs.upstream[0][layer].double() / rows
        for start in range(0, shape.clips, step):
            part = slice(start, start + step)
            if isinstance(targets, CodedTargets):
                target = vectors(targets.layer(layer), part)[0]
            else:
                target = targets[layer, part].double()
            x = states[part].clone().requires_grad_()
            y, norm = x, parameters
            if has_linear:
                y, norm = F.linear(x, *parameters[:2]), parameters[2:]
            loss = formula(y, *norm, target)
            losses[layer] += loss.detach() / rows
            of_x, *of_parameters = torch.autograd.grad(loss * by, [x, *parameters])
            parts.append(of_x.float())
            for total, found in zip(totals, of_parameters, strict=True):
                total += found
        gradients[0].append(torch.cat(parts))
        for group, total in zip(gradients[1:], totals, strict=True):
            group.append(total)
    found = {"loss": losses}
    names = ("d_states", "d_W", "d_b", "d_gain", "d_bias")
    if not has_linear:
        names = ("d_raw", "d_gain", "d_bias")
    for name, group in zip(names, gradients, strict=True):
        found |= {f"{name}{layer}": x for layer, x in enumerate(group)}
    return found


def results(shape: Shape, *, has_linear: bool) -> tuple[str, ...]:
    names = ("d_states", "d_W", "d_b", "d_gain", "d_bias")
    if not has_linear:
        names = ("d_raw", "d_gain", "d_bias")
    return ("loss", *(f"{name}{layer}" for name in names for layer in range(shape.layers)))


def draw_targets(
    shape: Shape, bits: int | None, device: torch.device, stream: torch.Generator
) -> Tensor | CodedTargets:
    size = (shape.layers, shape.clips, shape.tokens, shape.width)
    if bits is None:
        found = torch.empty(size, dtype=torch.bfloat16, device=device)
        for layer in found:
            layer.copy_(F.normalize(torch.randn(size[1:], generator=stream, device=device), dim=-1))
        return found
    means = torch.randn(shape.layers, shape.width, generator=stream, device=device)
    codec = Codec(f"{bits}bit", means=0.5 * F.normalize(means, dim=-1))
    shape_codes = (shape.clips, shape.layers, shape.tokens)
    codes = torch.randint(
        0,
        256,
        (*shape_codes, row_bytes(f"{bits}bit", shape.width)),
        dtype=torch.uint8,
        generator=stream,
        device=device,
    )
    scales = 0.5 + torch.rand(shape_codes, generator=stream, device=device)
    return codec.targets(codes, scales.half())


def make_inputs(
    shape: Shape, bits: int | None, device: torch.device, seed: int, *, has_linear: bool
) -> Inputs:
    stream = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=stream, device=device)

    layers = range(shape.layers)
    width = shape.inner if has_linear else shape.width
    groups = [[draw(shape.clips, shape.tokens, width).bfloat16() for _ in layers]]
    if has_linear:
        groups.append([draw(shape.width, width) / math.sqrt(width) for _ in layers])
        groups.append([0.1 * draw(shape.width) for _ in layers])
    groups.append([1 + 0.1 * draw(shape.width) for _ in layers])
    groups.append([0.1 * draw(shape.width) for _ in layers])
    leaves = tuple(x.requires_grad_() for group in groups for x in group)
    upstream = torch.full((shape.layers,), 1 / shape.layers, device=device)
    targets = draw_targets(shape, bits, device, stream)
    return Inputs((*groups, targets), leaves, (upstream,))


def alignment_case(
    name: str,
    title: str,
    shape: Shape,
    device: torch.device,
    *,
    bits: int | None,
    backend: str,
) -> Case:
    ours = partial(alignment, upstream=1 / shape.layers)
    eager = eager_loss if bits is None else eager_coded
    found = [
        Contender("eager, in bf16", "eager", lambda: eager),
        Contender("kernels", "ours", lambda: by_triton(ours)),
        Contender("torch.compile", "compile", lambda: compiled(eager, backend=backend)),
    ]
    if bits is None:
        reference = by_torch(alignment_reference)
        found += [
            Contender("eager, in float32 as under autocast", "eager", lambda: reference),
            Contender("Liger LayerNorm, then eager", "other", lambda: liger_norm(device)),
        ]
    kept = "bf16" if bits is None else f"{bits}-bit codes"
    return Case(
        name=name,
        title=title,
        shape=f"{shape.layers} layers x {shape.clips} x {shape.tokens} x {shape.width}, {kept}",
        make_inputs=lambda seed: make_inputs(shape, bits, device, seed, has_linear=False),
        work=alignment_work(shape, bits),
        contenders=found,
        exact=lambda inputs: exact(shape, inputs, has_linear=False),
        results=results(shape, has_linear=False),
        goals=PLAIN_GOALS if bits is None else CODED_GOALS,
        note="Bytes: projections and targets read, gradients written, each once. FLOPs: of the "
        "rotation's two factors, where targets are codes.",
    )


def linear_case(
    name: str,
    title: str,
    shape: Shape,
    device: torch.device,
    *,
    bits: int | None,
    backend: str,
) -> Case:
    upstream = 1 / shape.layers
    loss = eager_loss if bits is None else eager_coded

    def project(states, linear_weight, linear_bias) -> list[Tensor]:
        linears = zip(states, linear_weight, linear_bias, strict=True)
        return [F.linear(h, w.to(h.dtype), b.to(h.dtype)) for h, w, b in linears]

    def eager(states, linear_weight, linear_bias, weight, bias, targets) -> Tensor:
        return loss(project(states, linear_weight, linear_bias), weight, bias, targets)

    def gemm(states, linear_weight, linear_bias, weight, bias, targets) -> Tensor:
        raw = project(states, linear_weight, linear_bias)
        return alignment(raw, weight, bias, targets, upstream=upstream)

    def folded(*arguments) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return linear_alignment(*arguments, upstream=upstream)

    ours = by_triton(folded)
    found = [
        Contender("GEMM, then eager", "gemm-eager", lambda: by_torch(eager)),
        Contender("kernels", "ours", lambda: ours),
        Contender("GEMM, then the alignment kernel", "gemm", lambda: by_triton(gemm)),
        Contender("torch.compile of both", "gemm", lambda: compiled(eager, backend=backend)),
        Contender("kernels, by Gram matrices", "form", lambda: widest_gram(ours, 2**31)),
        Contender("kernels, by chunks", "form", lambda: widest_gram(ours, 0)),
    ]
    if bits is None:
        found.append(
            Contender(
                "Liger fused linear cosine: no LayerNorm",
                "other",
                lambda: liger_linear(shape, device),
            )
        )
    kept = "bf16 targets" if bits is None else f"{bits}-bit codes"
    return Case(
        name=name,
        title=title,
        shape=f"{shape.layers} layers x {shape.clips} x {shape.tokens}, {shape.inner} to "
        f"{shape.width}, {kept}",
        make_inputs=lambda seed: make_inputs(shape, bits, device, seed, has_linear=True),
        work=linear_work(shape, bits),
        contenders=found,
        exact=lambda inputs: exact(shape, inputs, has_linear=True),
        results=results(shape, has_linear=True),
        goals=LINEAR_GOALS,
        note="FLOPs: three products. Bytes: states, targets and weights read, gradients written.",
    )


@contextmanager
def _gram_up_to(width: int):
    before = linear_module.WIDEST_GRAM
    linear_module.WIDEST_GRAM = width
    try:
        yield
    finally:
        linear_module.WIDEST_GRAM = before


def widest_gram(call: Callable, width: int) -> Callable:
    """`call` with the form forced: by Gram matrices up to `width`, by chunks beyond."""

    def run(*arguments):
        with _gram_up_to(width):
            return call(*arguments)

    return run


def liger_norm(device: torch.device) -> Callable:
    """Liger's LayerNorm kernel in each layer; it has no loss like this one."""
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    except ImportError as error:
        raise Skipped("liger-kernel is not installed") from error
    if device.type != "cuda":
        raise Skipped("liger-kernel needs a GPU")

    def call(raw, weight, bias, targets) -> Tensor:
        losses = []
        for x, gain, shift, target in zip(raw, weight, bias, targets, strict=True):
            z = LigerLayerNormFunction.apply(x, gain.to(x.dtype), shift.to(x.dtype), EPS)
            cosine = (F.normalize(z, dim=-1) * target).sum(-1)
            losses.append(2 - 2 * cosine.float().mean())
        return torch.stack(losses)

    return call


def liger_linear(shape: Shape, device: torch.device) -> Callable:
    """Liger's fused linear cosine loss: without LayerNorm, and targets pass an identity."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearCosineSimilarityLoss
    except ImportError as error:
        raise Skipped("liger-kernel is not installed") from error
    loss = LigerFusedLinearCosineSimilarityLoss(weight_hard_loss=0.0, weight_soft_loss=1.0)
    identity = torch.eye(shape.width, dtype=torch.bfloat16, device=device)
    labels = torch.zeros(shape.clips * shape.tokens, dtype=torch.long, device=device)

    def call(states, linear_weight, linear_bias, weight, bias, targets) -> Tensor:
        losses = []
        for h, w, b, gain, shift, target in zip(
            states, linear_weight, linear_bias, weight, bias, targets, strict=True
        ):
            one = loss(
                h.flatten(0, 1),
                w.to(h.dtype),
                target.flatten(0, 1),
                identity,
                labels,
                b.to(h.dtype),
            )
            losses.append(one + 0 * (gain.sum() + shift.sum()))  # which it does not have
        return torch.stack(losses)

    return call
