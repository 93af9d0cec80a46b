"""The tables in order of importance, at full size and at one that a CPU does in seconds."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.kernels.alignment import Shape as AlignmentShape
from benchmarks.kernels.alignment import alignment_case, linear_case
from benchmarks.kernels.attention import Shape as AttentionShape
from benchmarks.kernels.attention import attention_case
from benchmarks.kernels.case import Case, Table, run_case
from benchmarks.kernels.rows import decode_case, patch_case, rmsnorm_case
from benchmarks.kernels.step import StepShape, run_step, step_case
from distill.students.vit import SIZES, ViTSize

WIDTHS = {"S": 384, "B": 768, "L": 1024}
TOKENS, TEACHER = 411, 1408
CLIPS = 128
STEP_CLIPS = {"S": 128, "B": 128, "L": 64}
RAGGED = (205, 617)  # tokens of the shortest and the longest, evenly spread between


class Entry(NamedTuple):
    """A table: seconds after which no further baseline of it is begun, its case, how it is run."""

    seconds: int
    case: Callable[[], Case]
    run: Callable[..., Table]


def ragged(count: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Lengths evenly spread between two, in an order that is not theirs."""
    step = (longest - shortest) / max(count - 1, 1)
    lengths = [round(shortest + step * index) for index in range(count)]
    return tuple(lengths[index * 37 % count] for index in range(count))


def tables(
    device: torch.device,
    *,
    is_tiny: bool,
    backend: str,
    clips: int = CLIPS,
    tokens: int = TOKENS,
) -> dict[str, Entry]:
    """All by name; `backend` is torch.compile's, `clips` those of what is no whole step."""
    if is_tiny:
        clips, tokens = 2, 9
    teacher = 96 if is_tiny else TEACHER
    layers = 2 if is_tiny else 6
    width_of = dict.fromkeys(WIDTHS, 32) if is_tiny else WIDTHS
    d = 16 if is_tiny else 64
    common = {"device": device, "backend": backend}

    def attention(size: str, lengths: tuple[int, ...], *, head: int = d) -> Callable[[], Case]:
        shape = AttentionShape(lengths, width_of[size] // head, head)
        name, title = f"attention-{size}", "attention with QK-norm"
        return partial(attention_case, name, title, shape, **common)

    def odd(name: str, title: str, shape: AttentionShape) -> Callable[[], Case]:
        return partial(attention_case, name, title, shape, **common, goals=())

    even = (tokens,) * clips
    spread = ragged(clips, 3, 11) if is_tiny else ragged(clips, *RAGGED)
    loss_shape = AlignmentShape(layers, clips, tokens, teacher)

    def loss(bits: int | None) -> Callable[[], Case]:
        name = "alignment" if bits is None else f"alignment-{bits}bit"
        return partial(alignment_case, name, "the alignment loss", loss_shape, bits=bits, **common)

    def linear(size: str, bits: int | None = None) -> Callable[[], Case]:
        name = f"linear-{size}" if bits is None else f"linear-{size}-{bits}bit"
        shape = loss_shape._replace(inner=width_of[size])
        title = "last linear layer and alignment loss"
        return partial(linear_case, name, title, shape, bits=bits, **common)

    def step(size: str, bits: int | None = None) -> Entry:
        name = f"step-{size}" if bits is None else f"step-{size}-{bits}bit"
        shape = StepShape(SIZES[f"{size}14"], STEP_CLIPS[size])
        if is_tiny:
            small = ViTSize(32, 2, 2, pooled_width=32)
            shape = StepShape(small, 2, 8, 96, 32, 2, frames=2, image_size=56)
        case = partial(step_case, name, f"{size}14", shape, device, bits=bits)
        return Entry(150, case, partial(run_step, shape=shape, bits=bits, compile_by=backend))

    def entry(seconds: int, case: Callable[[], Case]) -> Entry:
        return Entry(seconds, case, run_case)

    width88 = AttentionShape(even, 2, 24) if is_tiny else AttentionShape(even, 16, 88)
    width128 = AttentionShape(even, 1, 32) if is_tiny else AttentionShape(even, 8, 128)
    found = {
        "attention-S": entry(90, attention("S", even)),
        "alignment": entry(45, loss(None)),
        "step-S": step("S"),
        "linear-S": entry(40, linear("S")),
        "alignment-4bit": entry(25, loss(4)),
        "attention-B": entry(45, attention("B", even)),
        "attention-L": entry(45, attention("L", even)),
        "attention-ragged": entry(
            50,
            partial(
                attention_case,
                "attention-ragged",
                "attention with QK-norm, ragged",
                AttentionShape(spread, width_of["S"] // d, d),
                **common,
            ),
        ),
        "step-B": step("B"),
        "linear-S-4bit": entry(20, linear("S", 4)),
        "step-L": step("L"),
        "linear-B": entry(20, linear("B")),
        "linear-L": entry(20, linear("L")),
        "attention-88": entry(25, odd("attention-88", "attention, heads of 88", width88)),
        "attention-128": entry(25, odd("attention-128", "attention, heads of 128", width128)),
        "step-S-4bit": step("S", 4),
    }
    for size in WIDTHS:
        found[f"rmsnorm-{size}"] = entry(
            10, partial(rmsnorm_case, f"rmsnorm-{size}", clips, tokens, width_of[size], **common)
        )
        found[f"patches-{size}"] = entry(
            10,
            partial(patch_case, f"patches-{size}", clips, tokens - 1, width_of[size], **common),
        )
    for bits in (4, 8, 3, 2):
        found[f"decode-{bits}bit"] = entry(
            10, partial(decode_case, f"decode-{bits}bit", loss_shape, bits, **common)
        )
        if bits != 4:
            found[f"alignment-{bits}bit"] = entry(20, loss(bits))
    for count in (384, 448):
        if not is_tiny:
            shape = AttentionShape((count,) * clips, width_of["S"] // d, d)
            name = f"attention-{count}"
            found[name] = entry(25, odd(name, f"attention of {count} tokens", shape))
    return found
