"""What is bound by memory: the residual norm, patch embedding, and decoding of cached codes."""

import math
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.alignment import (
    Shape,
    decoded,
    draw_targets,
    rotation_flops,
    vectors,
)
from benchmarks.kernels.case import (
    BOTH,
    FORWARD,
    Case,
    Contender,
    Inputs,
    by_torch,
    by_triton,
    compiled,
)
from benchmarks.kernels.measure import Work
from distill.cache.codes import row_bytes
from distill.kernels.coded_targets import CodedTargets, decode_targets, decode_targets_reference
from distill.kernels.patch_embed import patch_embed, patch_embed_reference
from distill.kernels.rmsnorm import EPS, rmsnorm, rmsnorm_reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH_VALUES = 588


def rmsnorm_work(rows: int, width: int) -> dict[str, Work]:
    """A float32 stream h, bf16 branch and output; backward reads h again, and the branch."""
    size = rows * width
    forward = size * (4 + 2 + 4 + 2)
    return {FORWARD: Work(0.0, forward), BOTH: Work(0.0, forward + size * (4 + 2 + 4 + 2 + 4 + 2))}


def rmsnorm_case(
    name: str, clips: int, tokens: int, width: int, device: torch.device, *, backend: str
) -> Case:
    """h = x + keep gamma y in float32, and its norm in bf16, as within a block under autocast."""

    def make_inputs(seed: int) -> Inputs:
        stream = torch.Generator(device).manual_seed(seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=stream, device=device)

        x, branch = draw(clips, tokens, width), draw(clips, tokens, width).bfloat16()
        gamma, weight = 0.3 * draw(width), 1 + 0.1 * draw(width)
        keep = (torch.rand(clips, generator=stream, device=device) > 0.1).float() / 0.9
        leaves = tuple(z.requires_grad_() for z in (x, branch, gamma, weight))
        upstream = draw(clips, tokens, width), draw(clips, tokens, width).bfloat16()
        return Inputs((*leaves, keep), leaves, upstream)

    def call(function, x, branch, gamma, weight, keep) -> tuple[Tensor, Tensor]:
        return function(x, weight, branch=branch, gamma=gamma, keep=keep, dtype=torch.bfloat16)

    def exact(inputs: Inputs) -> dict[str, Tensor]:
        *values, keep = (z.detach().double() for z in inputs.arguments)
        x, branch, gamma, weight = leaves = [z.requires_grad_() for z in values]
        h = x + keep[:, None, None] * gamma * branch
        out = h * (h.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight
        upstream = [z.double() for z in inputs.upstream]
        found = (h.detach(), out.detach(), *torch.autograd.grad((h, out), leaves, upstream))
        return dict(zip(results, found, strict=True))

    results = ("h", "out", "d_x", "d_branch", "d_gamma", "d_weight")
    reference = partial(call, rmsnorm_reference)
    return Case(
        name=name,
        title="residual add, LayerScale, drop path and RMSNorm",
        shape=f"{clips} x {tokens} x {width}",
        dtype="float32 stream, bf16 branch and output",
        make_inputs=make_inputs,
        work=rmsnorm_work(clips * tokens, width),
        contenders=[
            Contender("eager", "eager", lambda: by_torch(reference)),
            Contender("kernels", "ours", lambda: by_triton(partial(call, rmsnorm))),
            Contender("torch.compile", "compile", lambda: compiled(reference, backend=backend)),
        ],
        exact=exact,
        results=results,
    )


def patch_work(rows: int, width: int) -> dict[str, Work]:
    """Patches are no leaf: backward is one product, and reads patches and gradients."""
    flops = 2.0 * rows * PATCH_VALUES * width
    forward = rows * PATCH_VALUES + 2 * width * PATCH_VALUES + 2 * rows * width
    return {FORWARD: Work(flops, forward), BOTH: Work(2 * flops, 2 * forward)}


def patch_case(
    name: str, clips: int, tokens: int, width: int, device: torch.device, *, backend: str
) -> Case:
    def make_inputs(seed: int) -> Inputs:
        stream = torch.Generator(device).manual_seed(seed)
        size = (clips, tokens, PATCH_VALUES)
        patches = torch.randint(0, 256, size, dtype=torch.uint8, generator=stream, device=device)
        weight = torch.randn(width, PATCH_VALUES, generator=stream, device=device)
        weight = (weight / math.sqrt(PATCH_VALUES)).bfloat16().requires_grad_()
        bias = torch.randn(width, generator=stream, device=device).bfloat16().requires_grad_()
        upstream = torch.randn(clips, tokens, width, generator=stream, device=device).bfloat16()
        return Inputs((patches, weight, bias), (weight, bias), (upstream,))

    def exact(inputs: Inputs) -> dict[str, Tensor]:
        patches, *parameters = inputs.arguments
        weight, bias = parameters = [x.detach().double().requires_grad_() for x in parameters]
        out, grads = [], [torch.zeros_like(x) for x in parameters]
        for part, upstream in zip(patches, inputs.upstream[0], strict=True):  # a clip each
            channels = part.double().unflatten(-1, (3, -1)) / 255
            mean, std = (torch.tensor(z, dtype=torch.float64).to(part.device) for z in (MEAN, STD))
            x = ((channels - mean[:, None]) / std[:, None]).flatten(-2)
            one = x @ weight.T + bias
            out.append(one.detach().float())
            found = torch.autograd.grad(one, parameters, upstream.double())
            grads = [total + each for total, each in zip(grads, found, strict=True)]
        return dict(zip(results, (torch.stack(out), *grads), strict=True))

    results = ("out", "d_W", "d_b")
    ours = partial(patch_embed, mean=MEAN, std=STD)
    reference = partial(patch_embed_reference, mean=MEAN, std=STD)
    return Case(
        name=name,
        title="patch embedding of uint8 patches",
        shape=f"{clips} x {tokens} x {PATCH_VALUES} to {width}",
        dtype="uint8 patches, bf16 weights",
        make_inputs=make_inputs,
        work=patch_work(clips * tokens, width),
        contenders=[
            Contender("eager", "eager", lambda: by_torch(reference)),
            Contender("kernels", "ours", lambda: by_triton(ours)),
            Contender("torch.compile", "compile", lambda: compiled(reference, backend=backend)),
        ],
        exact=exact,
        results=results,
    )


def decode_work(shape: Shape, bits: int) -> dict[str, Work]:
    """Codes and scales in, half precision out, and the two factors' products."""
    coded = shape.rows * (row_bytes(f"{bits}bit", shape.width) + 2)
    return {FORWARD: Work(rotation_flops(shape), coded + 2 * shape.rows * shape.width)}


def decode_case(name: str, shape: Shape, bits: int, device: torch.device, *, backend: str) -> Case:
    """Codes to vectors out of the rotated frame, in float16."""

    def make_inputs(seed: int) -> Inputs:
        stream = torch.Generator(device).manual_seed(seed)
        return Inputs(tuple(draw_targets(shape, bits, device, stream)), (), ())

    def exact(inputs: Inputs) -> dict[str, Tensor]:
        targets = CodedTargets(*inputs.arguments)
        clips = [vectors(targets, slice(start, start + 1)).float() for start in range(shape.clips)]
        return {"rows": torch.cat(clips, dim=1).transpose(0, 1)}

    def ours(*targets: Tensor) -> Tensor:
        return decode_targets(CodedTargets(*targets), torch.float16)

    def plain(*targets: Tensor) -> Tensor:
        return torch.stack(decoded(CodedTargets(*targets), torch.float16), dim=1)

    def reference(*targets: Tensor) -> Tensor:
        return decode_targets_reference(CodedTargets(*targets), torch.float16)

    return Case(
        name=name,
        title="decoding targets from cached codes",
        shape=f"{shape.layers} layers x {shape.clips} x {shape.tokens} x {shape.width}, "
        f"{bits}-bit codes",
        dtype="uint8 codes, float16 vectors",
        make_inputs=make_inputs,
        work=decode_work(shape, bits),
        contenders=[
            Contender("eager, in float16", "eager", lambda: by_torch(plain)),
            Contender("kernels", "ours", lambda: by_triton(ours)),
            Contender("torch.compile", "compile", lambda: compiled(plain, backend=backend)),
            Contender("eager, in float32", "eager", lambda: by_torch(reference)),
        ],
        exact=exact,
        results=("rows",),
    )
