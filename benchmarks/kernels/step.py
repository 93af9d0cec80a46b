"""Whole training steps of students: forward, backward and AdamW, with cached inputs resident.

Every contender steps the same DistillStudent from the same weights on the same batches: uint8
visible patches, token indices, targets in bf16 (or codes) and pooled targets. Weights are float32,
products bf16 under autocast, as training does it.
"""

import time
import traceback
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from benchmarks.kernels.alignment import Shape as AlignmentShape
from benchmarks.kernels.alignment import draw_targets, eager_coded, eager_loss
from benchmarks.kernels.attention import Shape as AttentionShape
from benchmarks.kernels.attention import dense, within
from benchmarks.kernels.attention import make_inputs as attention_inputs
from benchmarks.kernels.case import (
    BOTH,
    RUNNING,
    Case,
    Goal,
    Inputs,
    Table,
    errors_of,
    first_line,
    kernels,
    phase_calls,
    table_of,
)
from benchmarks.kernels.measure import (
    Ceilings,
    Row,
    Timing,
    Work,
    clock,
    events,
    free_memory,
    peak_bytes,
    replays,
    synchronize,
    time_calls,
)
from distill.kernels.alignment import alignment
from distill.kernels.linear_alignment import linear_alignment
from distill.students.student import DistillStudent, create_student
from distill.students.vit import PATCH, ViTSize

STEP, REPLAY = "a step", "a step in a CUDA graph"
LAYERS, TEACHER_WIDTH, TEACHER_POOLED = 6, 1408, 768
LR = 1e-6  # small: contenders are compared after some hundred steps of timing, not trained
NUM_BATCHES = 3
MFU = {"S14": 0.30, "B14": 0.40, "L14": 0.45}


class StepShape(NamedTuple):
    size: ViTSize
    clips: int
    visible: int = 410
    teacher_width: int = TEACHER_WIDTH
    teacher_pooled: int = TEACHER_POOLED
    layers: int = LAYERS
    frames: int = 8
    image_size: int = 224


class Batch(NamedTuple):
    patches: Tensor
    tokens: Tensor
    middle: object  # bf16 [K,B,M,E], or codes
    pooled: Tensor
    keep: Tensor


def forward_flops(shape: StepShape) -> tuple[float, float, float]:
    """Of a clip: of products with weights, of attention, and of the patch embedding."""
    size, m = shape.size, shape.visible + 1
    width = size.width
    hidden = int(width * size.mlp_ratio)
    linears = size.depth * 2 * m * width * (3 * width + width + 2 * hidden)
    attention = size.depth * 4 * m * m * width
    pool = 2 * 2 * m * width * width + 2 * width * width + 2 * width * size.pooled_width
    pooled = size.pooled_width
    final = 2 * pooled * pooled + 2 * pooled * shape.teacher_pooled
    decoders = shape.layers * 2 * m * width * (width + shape.teacher_width)
    patches = 2 * shape.visible * 3 * PATCH * PATCH * width
    # The pool's own scores and mixture, of one query.
    return linears + pool + final + decoders, attention + 4 * m * width, patches


def step_work(shape: StepShape) -> dict[str, Work]:
    """Backward is twice the forward, of attention two and a half times; pixels have no gradient.

    Traffic is not counted.
    """
    linears, attention, patches = forward_flops(shape)
    of_pool = 4 * (shape.visible + 1) * shape.size.width  # plain products, nothing computed twice
    flops = 3 * linears + 3.5 * (attention - of_pool) + 3 * of_pool + 2 * patches
    return dict.fromkeys((REPLAY, STEP), Work(shape.clips * flops, 0.0))


def make_student(shape: StepShape, device: torch.device) -> DistillStudent:
    torch.manual_seed(0)
    student = create_student(
        shape.size,
        frames=shape.frames,
        image_size=shape.image_size,
        teacher_width=shape.teacher_width,
        teacher_pooled=shape.teacher_pooled,
        num_layers=shape.layers,
    )
    for name, parameter in student.named_parameters():
        if name.endswith("gamma"):  # 1e-5 would hide what a branch computes
            nn.init.constant_(parameter, 0.1)
    return student.to(device).train()


def make_batch(shape: StepShape, device: torch.device, seed: int, bits: int | None) -> Batch:
    stream = torch.Generator(device).manual_seed(seed)
    size = (shape.clips, shape.visible, 3 * PATCH * PATCH)
    patches = torch.randint(0, 256, size, dtype=torch.uint8, generator=stream, device=device)
    grid = shape.frames * (shape.image_size // PATCH) ** 2
    order = torch.rand(shape.clips, grid, generator=stream, device=device)
    tokens = order.argsort(1)[:, : shape.visible].sort(1).values
    target = AlignmentShape(shape.layers, shape.clips, shape.visible + 1, shape.teacher_width)
    middle = draw_targets(target, bits, device, stream)
    pooled = torch.randn(shape.clips, shape.teacher_pooled, generator=stream, device=device)
    kept = torch.rand(2 * shape.size.depth, shape.clips, generator=stream, device=device) > 0.05
    return Batch(patches, tokens, middle, F.normalize(pooled, dim=-1), kept.float() / 0.95)


def _parts(student: DistillStudent) -> tuple[list, list, list]:
    decoders = student.clip_decoder
    return decoders, [d.norm.weight for d in decoders], [d.norm.bias for d in decoders]


def _final(student: DistillStudent, pooled: Tensor, target: Tensor, loss: Callable) -> Tensor:
    decode = student.final_clip_decoder
    raw = [decode.head(pooled)[:, None]]
    return loss(raw, [decode.norm.weight], [decode.norm.bias], target[None, :, None])[0]


def in_its_dtype(loss: Callable) -> Callable:
    """Without autocast, which would take norms in float32: the fastest that eager can be."""

    def run(raw, weight, bias, targets) -> Tensor:
        of = eager_loss if isinstance(targets, Tensor) else loss
        with torch.autocast(raw[0].device.type, enabled=False):
            return of(raw, weight, bias, targets)

    return run


def plain_objective(student: DistillStudent, batch: Batch, loss: Callable) -> Tensor:
    """The mean of the layers' losses and the pooled vector's, with `loss` for both."""
    found = student.decoder_inputs(patches=batch.patches, tokens=batch.tokens, keep=batch.keep)
    decoders, gains, biases = _parts(student)
    raw = [decode.head(x) for decode, x in zip(decoders, found.states, strict=True)]
    middle = loss(raw, gains, biases, batch.middle).mean()
    return middle + _final(student, found.pooled, batch.pooled, loss)


def folded_objective(student: DistillStudent, batch: Batch) -> Tensor:
    """The same, with the decoders' last linear layers folded into the loss."""
    found = student.decoder_inputs(patches=batch.patches, tokens=batch.tokens, keep=batch.keep)
    decoders, gains, biases = _parts(student)
    inner = [decode.before_last(x) for decode, x in zip(decoders, found.states, strict=True)]
    linears = [d.last.weight for d in decoders], [d.last.bias for d in decoders]
    upstream = 1 / len(inner)
    layers = linear_alignment(inner, *linears, gains, biases, batch.middle, upstream=upstream)
    return layers.mean() + _final(student, found.pooled, batch.pooled, alignment)


def kernel_objective(student: DistillStudent, batch: Batch) -> Tensor:
    upstream = 1 / len(student.clip_decoder)

    def loss(raw, weight, bias, targets) -> Tensor:
        return alignment(raw, weight, bias, targets, upstream=upstream if len(raw) > 1 else 1.0)

    return plain_objective(student, batch, loss)


def plain_attention(module: nn.Module, x: Tensor) -> Tensor:
    """What an attention module computes, by torch's own operations."""
    clips, tokens = x.shape[:2]
    shape = AttentionShape((tokens,) * clips, module.heads, x.shape[2] // module.heads)
    attend = dense(shape, F.scaled_dot_product_attention)
    out = attend(module.qkv(x).flatten(0, 1), module.q_norm.weight, module.k_norm.weight)
    return module.proj(out.unflatten(0, (clips, tokens)))


def fastest_backend(shape: StepShape, device: torch.device) -> SDPBackend:
    """Of scaled dot product attention, forward and backward at this shape."""
    if device.type != "cuda":
        return SDPBackend.FLASH_ATTENTION
    size = shape.size
    of = AttentionShape((shape.visible + 1,) * shape.clips, size.heads, size.width // size.heads)
    inputs = attention_inputs(of, device, torch.bfloat16, 0)
    found = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        attend = within(backend, dense(of, F.scaled_dot_product_attention))
        try:
            calls = [phase_calls(attend, inputs, BOTH)]
            found[backend] = time_calls(calls, device=device, seconds=0.1).ms
        except Exception:  # noqa: BLE001 - the other one is there
            continue
    free_memory(device)
    return min(found, key=found.get, default=SDPBackend.FLASH_ATTENTION)


class Way(NamedTuple):
    """How a contender steps: `objective` of student and batch, by which kernels."""

    objective: Callable[[DistillStudent, Batch], Tensor]
    kernels: str
    is_plain: bool  # attention by torch's operations
    is_compiled: bool
    backend: SDPBackend | None


class Runner:
    """A student of its own and its optimiser."""

    def __init__(
        self, shape: StepShape, way: Way, device: torch.device, *, compile_by: str
    ) -> None:
        self.way, self.device = way, device
        self.student = make_student(shape, device)
        if way.is_plain:
            for block in self.student.blocks:
                block.attn.forward = MethodType(plain_attention, block.attn)
        self.objective = way.objective
        if way.is_compiled:
            torch._dynamo.reset()
            self.objective = torch.compile(way.objective, dynamic=False, backend=compile_by)
        is_cuda = device.type == "cuda"
        self.adamw = torch.optim.AdamW(
            self.student.parameters(), lr=LR, weight_decay=0.05, fused=True, capturable=is_cuda
        )

    def backward(self, batch: Batch) -> Tensor:
        self.adamw.zero_grad(set_to_none=True)
        with kernels(self.way.kernels):
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                call = within(self.way.backend, self.objective)
                loss = call(self.student, batch)
            loss.backward()
        return loss.detach()

    def step(self, batch: Batch) -> Tensor:
        loss = self.backward(batch)
        self.adamw.step()
        return loss

    def results(self, batch: Batch) -> tuple[Tensor, Tensor]:
        loss = self.backward(batch)
        return loss, flat_gradient(self.student)


def flat_gradient(student: DistillStudent) -> Tensor:
    grads = [p.grad for p in student.parameters() if p.grad is not None]
    return torch.cat([g.detach().float().flatten() for g in grads])


def reference(shape: StepShape, batch: Batch, device: torch.device, loss: Callable) -> dict:
    """Loss and gradient in float32, a few clips at a time, by torch's operations."""
    student = make_student(shape, device)
    for block in student.blocks:
        block.attn.forward = MethodType(plain_attention, block.attn)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    total, size = torch.zeros((), device=device), min(8, shape.clips)
    for start in range(0, shape.clips, size):
        part = slice(start, min(start + size, shape.clips))
        middle = batch.middle
        middle = middle[:, part] if isinstance(middle, Tensor) else middle.clips(part)
        piece = Batch(
            batch.patches[part], batch.tokens[part], middle, batch.pooled[part], batch.keep[:, part]
        )
        one = plain_objective(student, piece, in_its_dtype(loss)) * (
            (part.stop - start) / shape.clips
        )
        one.backward()
        total += one.detach()
    torch.set_float32_matmul_precision(before)
    return {"loss": total, "gradient": flat_gradient(student)}


def ways(bits: int | None, backend: SDPBackend) -> list[tuple[str, str, Way]]:
    """Names, kinds and ways of the contenders; plain ones take `backend` when compiled."""
    loss = in_its_dtype(eager_loss if bits is None else eager_coded)

    def plain(student: DistillStudent, batch: Batch) -> Tensor:
        return plain_objective(student, batch, loss)

    sdpa = f"torch.compile, SDPA {backend.name.removesuffix('_ATTENTION').lower()}"
    return [
        ("eager, cleaned up", "eager", Way(plain, "torch", True, False, None)),
        ("kernels", "ours", Way(folded_objective, "triton", False, False, None)),
        (sdpa, "compile", Way(plain, "torch", True, True, backend)),
        ("kernels, compiled", "ours", Way(folded_objective, "triton", False, True, None)),
        ("kernels, linear apart", "ours", Way(kernel_objective, "triton", False, False, None)),
    ]


def step_case(
    name: str, size_name: str, shape: StepShape, device: torch.device, *, bits: int | None = None
) -> Case:
    """Its contenders are those of `ways`, which change what they run on."""
    kept = "bf16 targets" if bits is None else f"{bits}-bit codes"
    goals = (Goal("mfu", (), None, MFU.get(size_name)),)
    if size_name == "S14":
        goals = (Goal("time", ("eager",), 1.5, 2.0), Goal("time", ("compile",), 1.15, 1.35), *goals)
    return Case(
        name=name,
        title=f"a whole training step of {size_name}",
        shape=f"{shape.clips} clips x {shape.visible + 1} tokens, width {shape.size.width}, depth "
        f"{shape.size.depth}, {kept}",
        make_inputs=lambda seed: Inputs((), (), ()),
        work=step_work(shape),
        contenders=[],
        exact=lambda inputs: {},
        results=("loss", "gradient"),
        goals=goals,
        dtype="float32 weights, bf16 autocast",
        note="Forward, backward, AdamW; memory includes weights, optimiser and three batches.",
    )


def measure_step(
    case: Case,
    shape: StepShape,
    row: Row,
    way: Way,
    batches: list[Batch],
    exact: dict[str, Tensor],
    *,
    device: torch.device,
    seconds: float,
    compile_by: str,
) -> Row:
    """One contender's row: right first, then timed as launched and in a graph."""
    try:
        runner = Runner(shape, way, device, compile_by=compile_by)
        row.errors = errors_of(case, runner.results(batches[0]), exact)
        calls = [partial(runner.step, batch) for batch in batches]
        for call in calls:
            call()
        if device.type == "cuda":
            before = torch.cuda.memory_allocated()
            row.peak_bytes = before + peak_bytes(calls[0], device=device)
            row.timings[STEP] = events(calls, seconds=seconds, is_ahead=False)
            free_memory(device)
            row.timings[REPLAY] = _in_a_graph(row, calls, seconds=seconds)
        else:
            row.timings[STEP] = clock(calls, seconds=seconds)
        row.timings = {phase: timing for phase, timing in row.timings.items() if timing}
    except Exception as error:  # noqa: BLE001 - a contender that fails is a row that says so
        traceback.print_exc(limit=-2)
        row.note = first_line(error)
        error.__traceback__ = None
    synchronize(device)
    return row


def _in_a_graph(row: Row, calls: list[Callable], *, seconds: float) -> Timing | None:
    try:
        return replays(calls, seconds=seconds)
    except Exception as error:  # noqa: BLE001 - the row has its time as launched
        row.note = f"no graph: {first_line(error)}"
        torch.cuda.synchronize()
        return None


def run_step(
    case: Case,
    shape: StepShape,
    *,
    bits: int | None,
    device: torch.device,
    ceilings: Ceilings,
    seconds: float,
    deadline: float,
    done: list[Row],
    save: Callable[[Table], None],
    compile_by: str,
) -> Table:
    """As `run_case`: a contender at a time, each with a student of its own."""
    table = table_of(case, ceilings)
    table.rows = list(done)
    known = {row.name for row in done}
    batches = [make_batch(shape, device, seed, bits) for seed in range(NUM_BATCHES)]
    loss = eager_loss if bits is None else eager_coded
    exact = reference(shape, batches[0], device, loss)
    free_memory(device)
    for name, kind, way in ways(bits, fastest_backend(shape, device)):
        if name in known:
            continue
        table.rows.append(Row(name, kind, note=RUNNING))
        save(table)
        row = table.rows[-1] = Row(name, kind)
        if time.monotonic() > deadline and not (kind == "eager" or name == "kernels"):
            row.note = "not run: no time left"
        else:
            arguments = (case, shape, row, way, batches, exact)
            settings = {"device": device, "seconds": seconds, "compile_by": compile_by}
            measure_step(*arguments, **settings)
        free_memory(device)
        save(table)
    return table
