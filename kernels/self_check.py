"""Whether the kernels compute on a device what their references do, found out in seconds.

Each runs on small inputs, odd sizes and ragged sequences among them, in the types of a run in the
given precision. Every output and gradient may be MARGIN times as far from the reference in float64
as plain torch in that precision is, or as the precision's rounding of a number takes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.kernels import jit
from distill.kernels.alignment import EPS, alignment, alignment_reference
from distill.kernels.attention import attention, attention_reference, pack, pack_evenly
from distill.kernels.coded_targets import CodedTargets, decode_targets, decode_targets_reference
from distill.kernels.codes import decode_codes, decode_codes_reference
from distill.kernels.linear_alignment import (
    WIDEST_GRAM,
    linear_alignment,
    linear_alignment_reference,
)
from distill.kernels.patch_embed import patch_embed, patch_embed_reference
from distill.kernels.rmsnorm import rmsnorm, rmsnorm_reference

MARGIN = 1.5
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
CLIPS, TOKENS, LAYERS = 3, 67, 2
LENGTHS = (1, 17, 0, 130)  # of ragged sequences
TEACHER = 1408  # and its rotation's factors
LEFT, RIGHT = 128, 11
BITS = (8, 4, 3, 2)
ODD = 257  # a width that fills no block
STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
RESULTS = Sequence[Tensor]


class Case(NamedTuple):
    """One call of a kernel by three ways: its own, plain torch's, and what float64 is given to.

    Each takes `leaves` and returns outputs; with gradients of all leaves, where there are any.
    """

    kernel: str
    leaves: tuple[Tensor, ...]
    call: Callable[..., RESULTS]
    plain: Callable[..., RESULTS]
    exact: Callable[..., RESULTS]


def self_check(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What is wrong by the name of a kernel, nothing where all are right; `dtype` is a run's.

    Leaves the choice of kernels and all generators as they were. Takes seconds where Triton has
    yet to compile them. Raises RuntimeError where a kernel has taken the device down.
    """
    before, wrong = jit.choose("triton"), {}
    try:
        for case in cases(device, dtype):
            if case.kernel not in wrong:
                message = _problem(case, device, dtype)
                if message:
                    wrong[case.kernel] = message
    finally:
        jit.choose(before)
    return wrong


def _problem(case: Case, device: torch.device, dtype: torch.dtype) -> str:
    """What is wrong with the kernels' results, or nothing."""
    try:  # before any other: memory holds no right results yet that could stand for unwritten ones
        jit.choose("triton")
        found = _results(case, case.call)
        _wait(device)
    except Exception as error:  # noqa: BLE001 - a compiler's and a driver's are of all kinds
        _check_alive(case.kernel, device, error)
        return _first_line(error)
    jit.choose("torch")
    plain = _results(case, case.plain)
    exact = _results(case._replace(leaves=tuple(x.double() for x in case.leaves)), case.exact)
    for one, other, truth in zip(found, plain, exact, strict=True):
        allowed = MARGIN * max(_error(other, truth), ROUNDING[dtype], ROUNDING[one.dtype])
        error = _error(one, truth)
        if not error <= allowed:  # NaN is not
            return f"is off by {error:.1e} of its results' size, {allowed:.1e} is allowed"
    return ""


def _results(case: Case, call: Callable[..., RESULTS]) -> list[Tensor]:
    """Outputs and the leaves' gradients, for upstream gradients that are no constant."""
    leaves = [x.detach().clone().requires_grad_() for x in case.leaves]
    outputs = call(*leaves)
    if not leaves:
        return list(outputs)
    upstream = []
    for out in outputs:
        rows = torch.arange(out.numel(), device=out.device, dtype=torch.float64).view(out.shape)
        upstream.append((0.5 + torch.cos(rows)).to(out.dtype))
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check_alive(kernel: str, device: torch.device, error: Exception) -> None:
    """Raise where the device does nothing more for this process."""
    try:
        torch.ones(2, device=device).sum().item()
        _wait(device)
    except RuntimeError:
        raise RuntimeError(
            f"the check of kernel {kernel} has taken {device} down ({_first_line(error)}); run "
            "again with run.kernels=torch"
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """All that run by kernels in a run of this precision."""
    stream = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=stream, device=device)

    half = torch.float16 if dtype == torch.float32 else dtype
    yield from _codes_cases(device, stream, half)
    yield from _norm_cases(draw, dtype)
    yield from _loss_cases(draw, stream, dtype)
    if dtype != torch.float32:  # which these leave to torch
        yield from _attention_cases(draw, dtype)
        yield _patch_case(draw, stream, dtype)


def _attention_cases(draw: Callable[..., Tensor], dtype: torch.dtype) -> Iterator[Case]:
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    for heads, d, packing in (
        (3, 64, pack_evenly(CLIPS, TOKENS)),
        (2, 64, pack(ends, device=draw(0).device)),
        (2, 88, pack_evenly(CLIPS, TOKENS)),
    ):

        def by(function: Callable, packing=packing, heads=heads) -> Callable[..., RESULTS]:
            return lambda qkv, q_gain, k_gain: (
                function(qkv, q_gain, k_gain, packing, heads=heads),
            )

        width, plain = heads * d, by(attention_reference)
        leaves = (draw(packing.num_tokens, 3 * width).to(dtype), 1 + 0.3 * draw(width))
        leaves = (*leaves, 1 + 0.3 * draw(width))
        yield Case("attention", leaves, by(attention), plain, plain)


def _norm_cases(draw: Callable[..., Tensor], dtype: torch.dtype) -> Iterator[Case]:
    """As a block under autocast: a float32 stream, a narrower branch, and norms for linears."""
    keep = torch.arange(CLIPS, device=draw(0).device) / 1.5
    x, branch = draw(CLIPS, TOKENS, 384), draw(CLIPS, TOKENS, 384).to(dtype)
    gains = tuple(1 + 0.3 * draw(384) for _ in range(2))

    def joined(function: Callable, dtype: torch.dtype | None) -> Callable[..., RESULTS]:
        def call(x, weight, branch, gamma) -> RESULTS:
            return function(x, weight, branch=branch, gamma=gamma, keep=keep, dtype=dtype)

        return call

    plain = joined(rmsnorm_reference, dtype), joined(rmsnorm_reference, None)
    yield Case("rmsnorm", (x, gains[0], branch, gains[1]), joined(rmsnorm, dtype), *plain)

    def alone(function: Callable) -> Callable[..., RESULTS]:
        return lambda x, weight: function(x, weight)[1:]

    # As a frozen model's q and k: parts of longer rows, without a gradient.
    packed, gain = draw(CLIPS * TOKENS, 3 * ODD).to(dtype), 1 + 0.3 * draw(ODD)

    def part(function: Callable, kind: torch.dtype) -> Callable[..., RESULTS]:
        def call() -> RESULTS:
            with torch.no_grad():
                x = packed[:, ODD : 2 * ODD]
                return function(x, gain, dtype=kind)[1:]

        return call

    plain = part(lambda x, gain, dtype: rmsnorm_reference(x.float(), gain, dtype=dtype), dtype)
    exact = part(lambda x, gain, dtype: rmsnorm_reference(x.double(), gain.double()), dtype)
    yield Case("rmsnorm", (), part(rmsnorm, dtype), plain, exact)
    leaves = (draw(CLIPS * TOKENS, ODD), 1 + 0.3 * draw(ODD))
    yield Case("rmsnorm", leaves, alone(rmsnorm), *[alone(rmsnorm_reference)] * 2)


def _patch_case(draw: Callable[..., Tensor], stream: torch.Generator, dtype: torch.dtype) -> Case:
    device = stream.device
    patches = torch.randint(
        0, 256, (CLIPS, TOKENS, 588), dtype=torch.uint8, generator=stream, device=device
    )

    def by(function: Callable) -> Callable[..., RESULTS]:
        def call(weight, bias) -> RESULTS:
            with torch.autocast(device.type, dtype=dtype, enabled=weight.dtype == torch.float32):
                return (function(patches, weight, bias, **STATISTICS),)

        return call

    leaves = (draw(200, 588) / math.sqrt(588), draw(200))
    return Case("patch_embed", leaves, by(patch_embed), *[by(patch_embed_reference)] * 2)


def _codes_cases(
    device: torch.device, stream: torch.Generator, half: torch.dtype
) -> Iterator[Case]:
    for bits in BITS:
        targets = _coded(bits, device, stream)

        def rows(function: Callable, dtype: torch.dtype, targets=targets) -> Callable[..., RESULTS]:
            return lambda: (function(*targets[:3], width=TEACHER, dtype=dtype),)

        plain = rows(decode_codes_reference, half), rows(decode_codes_reference, torch.float64)
        yield Case("codes", (), rows(decode_codes, half), *plain)

        def vectors(
            function: Callable, dtype: torch.dtype, targets=targets
        ) -> Callable[..., RESULTS]:
            return lambda: (function(targets, dtype),)

        plain = (vectors(decode_targets_reference, x) for x in (torch.float16, torch.float64))
        yield Case("coded_targets", (), vectors(decode_targets, torch.float16), *plain)


def _coded(bits: int, device: torch.device, stream: torch.Generator) -> CodedTargets:
    """Codes of any bytes, in a frame that is turned by a symmetric, orthogonal matrix."""

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=stream, device=device)

    hadamard, pair = torch.ones(1, 1), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    while len(hadamard) < LEFT:
        hadamard = torch.kron(hadamard, pair)
    axis = F.normalize(draw(RIGHT), dim=0)
    shape = (CLIPS, LAYERS, TOKENS)
    size = (*shape, TEACHER * bits // 8)
    return CodedTargets(
        codes=torch.randint(0, 256, size, dtype=torch.uint8, generator=stream, device=device),
        scales=(0.5 + torch.rand(shape, generator=stream, device=device)).half(),
        levels=draw(2**bits).sort().values,
        means=draw(LAYERS, TEACHER) / math.sqrt(TEACHER),
        flips=draw(TEACHER).sign() / math.sqrt(LEFT * TEACHER),
        left=hadamard.to(device),
        right=torch.eye(RIGHT, device=device) - 2 * torch.outer(axis, axis),
    )


def _loss_cases(
    draw: Callable[..., Tensor], stream: torch.Generator, dtype: torch.dtype
) -> Iterator[Case]:
    for bits, width in ((None, ODD), (None, TEACHER), (4, TEACHER)):
        targets = draw(LAYERS, CLIPS, TOKENS, width)
        if bits is None:
            targets = F.normalize(targets, dim=-1).to(dtype)
            decoded = targets.double()
        else:
            targets = _coded(bits, stream.device, stream)
            jit.choose("torch")
            decoded = decode_targets_reference(targets, torch.float64).transpose(0, 1)
        norms = [1 + 0.3 * draw(width) for _ in range(LAYERS)]
        norms += [0.2 * draw(width) for _ in range(LAYERS)]
        # As of a student that has learned something: gradients are differences then.
        noise = 2 * draw(LAYERS, CLIPS, TOKENS, width) / math.sqrt(width)
        raw = tuple(((decoded + noise) * math.sqrt(width)).to(dtype))

        def aligned(function: Callable, targets: object) -> Callable[..., RESULTS]:
            return lambda *x: (function(x[:LAYERS], *_pairs(x[LAYERS:]), targets),)

        yield Case(
            "alignment",
            (*raw, *norms),
            aligned(alignment, targets),
            aligned(_plain_alignment, decoded.to(dtype)),
            aligned(alignment_reference, decoded),
        )
        for inner in (40, WIDEST_GRAM + 8):  # by Gram matrices, and by chunks
            states = tuple(draw(LAYERS, CLIPS, TOKENS, inner).to(dtype))
            linear = [draw(width, inner) / math.sqrt(inner) for _ in range(LAYERS)]
            linear += [0.1 * draw(width) for _ in range(LAYERS)]
            yield Case(
                "linear_alignment",
                (*states, *linear, *norms),
                aligned(linear_alignment, targets),
                aligned(_plain_linear_alignment, decoded.to(dtype)),
                aligned(linear_alignment_reference, decoded),
            )


def _pairs(parameters: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Parameters of all layers, kind by kind."""
    return [parameters[i : i + LAYERS] for i in range(0, len(parameters), LAYERS)]


def _plain_alignment(
    raw: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor], targets: Tensor
) -> Tensor:
    """The loss with every step in the projections' dtype, as eager training in it does."""
    losses = []
    for x, gain, shift, target in zip(raw, weight, bias, targets, strict=True):
        z = F.layer_norm(x, x.shape[-1:], gain.to(x.dtype), shift.to(x.dtype), EPS)
        losses.append(2 - 2 * (F.normalize(z, dim=-1) * target).sum(-1).float().mean())
    return torch.stack(losses)


def _plain_linear_alignment(
    states: Sequence[Tensor],
    linear_weight: Sequence[Tensor],
    linear_bias: Sequence[Tensor],
    *norms_and_targets: object,
) -> Tensor:
    linears = zip(states, linear_weight, linear_bias, strict=True)
    raw = [F.linear(h, w.to(h.dtype), b.to(h.dtype)) for h, w, b in linears]
    return _plain_alignment(raw, *norms_and_targets)
