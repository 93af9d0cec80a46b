"""What a recipe will take, worked out before anything runs."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from distill.cost import (
    PARAMETER_BYTES,
    StepCost,
    activation_bytes,
    count_parameters,
    feature_bytes,
    num_tokens,
    record_bytes,
    record_tokens,
    student_cost,
    teacher_bytes,
    teacher_macs,
    teacher_parameters,
)
from distill.data.index import read_list
from distill.errors import InputError
from distill.models import build_model
from distill.optim import make_schedule
from distill.recipe import Classify, Distill, Recipe, Size, Teacher

SUSTAINED_TFLOPS = 400.0  # a guess for one H100 in half precision, about 40 % of its peak


@dataclass(frozen=True)
class OneTeacher:
    """A teacher by itself."""

    size: str
    parameters: int
    forward_tflop: float


@dataclass(frozen=True)
class TeacherPlan:
    """What teachers add; `step_tflop_all_embedded` is the student's step as published.

    Size and parameters are the main teacher's, TFLOP and hours those of all together; `each`
    has them one by one, the main one first.
    """

    size: str
    parameters: int
    forward_tflop: float
    step_tflop_all_embedded: float
    live_hours: float
    each: dict[str, OneTeacher]


@dataclass(frozen=True)
class CachePlan:
    """What the cache takes; after `break_even_epoch` epochs it has cost less than live targets."""

    views: int
    tokens: int  # patches that a record keeps, of which a student sees all or some
    record_bytes: dict[str, int]
    view_bytes: int
    total_bytes: int
    build_memory_gb: float
    build_hours: float
    break_even_epoch: int


@dataclass(frozen=True)
class FeaturesPlan:
    """What keeping a frozen backbone's features of the training views takes, evaluations aside."""

    views: int
    record_bytes: dict[str, int]
    view_bytes: int
    total_bytes: int
    build_hours: float


@dataclass(frozen=True)
class Plan:
    """A recipe in numbers."""

    name: str
    clips: int
    repeats: int  # views of a clip in a batch, which batches are counted in
    batch_size: int
    micro_batch: int
    epochs: int
    steps_per_epoch: int
    last_batch: int
    steps: int
    warmup_steps: int
    peak_lr: float
    floor_lr: float
    size: str
    parameters: int
    tokens: int
    forward_tflop: float
    step_tflop: float
    memory_gb: float
    hours: float
    sustained_tflops: float
    teacher: TeacherPlan | None = None
    cache: CachePlan | None = None
    features: FeaturesPlan | None = None


@dataclass(frozen=True)
class TogetherPlan:
    """Students that learn from one stream of records, and what live targets would take instead.

    `live_hours` are those of a run each, `live_together_hours` those of one run whose teacher
    serves them all.
    """

    name: str
    students: tuple[str, ...]
    batch_size: int
    epoch_bytes: int
    memory_gb: float
    build_hours: float
    hours: float
    live_hours: float
    live_together_hours: float
    sustained_tflops: float


def make_plan(recipe: Recipe, *, sustained_tflops: float = SUSTAINED_TFLOPS) -> Plan:
    """Work a recipe out; its clips are counted in the list, or taken from `num_clips`.

    A classifier of no epochs has none: its weights are evaluated as they are.
    Hours are FLOPs over `sustained_tflops` of one device. Raises InputError when nothing tells
    the number of clips.
    """
    optim, section = recipe.optim, recipe.objective
    is_trained = optim.epochs > 0 or isinstance(section, Distill)
    clips = count_clips(recipe) if is_trained else 0
    views = clips * recipe.data.augment.repeats  # of an epoch
    steps_per_epoch = math.ceil(views / optim.batch_size)
    schedule = make_schedule(optim, steps_per_epoch=steps_per_epoch)
    cost = student_cost(recipe)
    parameters = count_parameters(partial(build_model, recipe))
    micro_batch = min(optim.micro_batch or optim.batch_size, optim.batch_size)
    memory = parameters * PARAMETER_BYTES + micro_batch * activation_bytes(recipe)
    teacher = cache = features = None
    if isinstance(section, Classify) and section.features is not None and is_trained:
        fields, kept = feature_bytes(recipe), section.features.views
        features = FeaturesPlan(
            views=kept,
            record_bytes=fields,
            view_bytes=sum(fields.values()),
            total_bytes=sum(fields.values()) * clips * kept,
            build_hours=_hours(kept * clips * cost.forward, sustained_tflops),
        )
    if isinstance(section, Distill):
        teacher = _plan_teacher(recipe, clips, cost, sustained_tflops)
        if section.targets == "live":
            memory += teacher_bytes(recipe, batch_size=micro_batch)
        else:
            cache = _plan_cache(recipe, clips, teacher, sustained_tflops)
    return Plan(
        name=recipe.name,
        clips=clips,
        repeats=recipe.data.augment.repeats,
        batch_size=optim.batch_size,
        micro_batch=micro_batch,
        epochs=optim.epochs,
        steps_per_epoch=steps_per_epoch,
        last_batch=views - (steps_per_epoch - 1) * optim.batch_size,
        steps=schedule.num_steps,
        warmup_steps=schedule.warmup_steps,
        peak_lr=schedule.peak,
        floor_lr=schedule.floor,
        size=f"timm {recipe.model.timm}" if recipe.model.timm else _size_name(recipe.model.size),
        parameters=parameters,
        tokens=num_tokens(recipe)[1] + 1,
        forward_tflop=cost.forward,
        step_tflop=cost.step,
        memory_gb=memory / 1e9,
        hours=_hours(optim.epochs * views * cost.step, sustained_tflops),
        sustained_tflops=sustained_tflops,
        teacher=teacher,
        cache=cache,
        features=features,
    )


def _plan_teacher(
    recipe: Recipe, clips: int, cost: StepCost, sustained_tflops: float
) -> TeacherPlan:
    each = {
        name or "main": OneTeacher(
            size=_teacher_name(section),
            parameters=teacher_parameters(recipe, name),
            forward_tflop=2e-12 * teacher_macs(recipe, name),
        )
        for name, section in recipe.objective.teachers.items()
    }
    forward_tflop = sum(teacher.forward_tflop for teacher in each.values())
    live_tflop = recipe.optim.epochs * clips * (forward_tflop + cost.step)
    return TeacherPlan(
        size=each["main"].size,
        parameters=each["main"].parameters,
        forward_tflop=forward_tflop,
        step_tflop_all_embedded=student_cost(recipe, embed_all=True).step,
        live_hours=_hours(live_tflop, sustained_tflops),
        each=each,
    )


def _plan_cache(
    recipe: Recipe, clips: int, teacher: TeacherPlan, sustained_tflops: float
) -> CachePlan:
    section = recipe.objective.cache
    fields = record_bytes(recipe)
    view_bytes = sum(fields.values())
    return CachePlan(
        views=section.views,
        tokens=record_tokens(recipe),
        record_bytes=fields,
        view_bytes=view_bytes,
        total_bytes=view_bytes * clips * section.views,
        build_memory_gb=teacher_bytes(recipe, batch_size=section.batch_size) / 1e9,
        build_hours=_hours(section.views * clips * teacher.forward_tflop, sustained_tflops),
        # A stored view costs one teacher pass over the clips, as does an epoch of live targets.
        break_even_epoch=section.views,
    )


def plan_together(name: str, plans: Mapping[str, Plan]) -> TogetherPlan:
    """Add up the plans of students by name that learn together."""
    all_plans = list(plans.values())
    one = all_plans[0]
    held = [plan.parameters * PARAMETER_BYTES / 1e9 for plan in all_plans]
    # Only one student at a time has activations.
    at_work = max(plan.memory_gb - own for plan, own in zip(all_plans, held, strict=True))
    hours = sum(plan.hours for plan in all_plans)
    teacher_tflop = max(plan.epochs for plan in all_plans) * one.clips * one.teacher.forward_tflop
    return TogetherPlan(
        name=name,
        students=tuple(plans),
        batch_size=max(plan.batch_size for plan in all_plans),
        epoch_bytes=one.cache.view_bytes * one.clips,
        memory_gb=sum(held) + at_work,
        build_hours=one.cache.build_hours,
        hours=hours,
        live_hours=sum(plan.teacher.live_hours for plan in all_plans),
        live_together_hours=hours + _hours(teacher_tflop, one.sustained_tflops),
        sustained_tflops=one.sustained_tflops,
    )


def count_clips(recipe: Recipe) -> int:
    """Clips in the training list: of the file, of the demo, or as the recipe states them."""
    section = recipe.data.train
    if section.list is not None and Path(section.list).expanduser().exists():
        return len(read_list(section, seed=recipe.run.seed))
    stated = recipe.data.demo.train_clips if recipe.data.demo else section.num_clips
    if stated is None:
        raise InputError(
            f"{recipe.name}: data.train: the number of clips is not known; set "
            "data.train.list=PATH or data.train.num_clips=N"
        )
    return round(stated * section.share)


def plan_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """The plan as labels and sentences for a table."""
    about = f"{plan.size}: {plan.parameters:,} parameters, {plan.tokens:,} tokens a clip"
    forward = _flops(plan.forward_tflop)
    if not plan.epochs and plan.teacher is None:
        yield "training", "none, as optim.epochs is 0: the weights are evaluated as they are"
        yield "model", about
        yield "forward", f"{forward} a view"
        return
    yield "clips", f"{plan.clips:,}"
    what = "clips" if plan.repeats == 1 else "views"
    pieces = "" if plan.micro_batch == plan.batch_size else f", {plan.micro_batch} at a time"
    each = "" if plan.repeats == 1 else f", {plan.repeats} of each clip"
    yield "batch", f"{plan.batch_size:,} {what}{each}{pieces}"
    is_even = plan.last_batch == plan.batch_size
    last = "" if is_even else f", the last one of {plan.last_batch:,} {what}"
    yield "steps", f"{plan.epochs} epochs of {plan.steps_per_epoch:,} steps{last}: {plan.steps:,}"
    yield (
        "learning rate",
        f"peak {plan.peak_lr:g} after {plan.warmup_steps:,} steps, floor {plan.floor_lr:g}",
    )
    yield "model", about
    if plan.features is None:
        yield "training step", f"{_flops(plan.step_tflop)} a clip, of which forward {forward}"
    else:
        yield "training step", f"{_flops(plan.step_tflop)} a clip; its features take {forward}"
        yield from _features_rows(plan.features)
    teacher, cache = plan.teacher, plan.cache
    if teacher is not None:
        yield (
            "as published",
            (
                f"{_flops(teacher.step_tflop_all_embedded)} a clip: embeds all patches, then "
                "drops the masked ones"
            ),
        )
        for name, one in teacher.each.items():
            label = "teacher" if name == "main" else f"teacher {name}"
            what = f"{one.size}: {one.parameters:,} parameters"
            if len(teacher.each) == 1:
                yield label, f"{what}, {_looks(teacher, plan)}"
            else:
                yield label, f"{what}, {_flops(one.forward_tflop)} a clip"
        if len(teacher.each) > 1:
            yield "teachers", _looks(teacher, plan)
    if cache is not None:
        fields = ", ".join(f"{name} {size:,}" for name, size in cache.record_bytes.items())
        yield "cached view", f"{cache.view_bytes:,} bytes a clip: {fields}"
        is_redrawn = "next_arrival" in cache.record_bytes
        fate = "a new mask in every epoch" if is_redrawn else "the mask of a view stays"
        yield "kept tokens", f"{cache.tokens:,} of a clip's patches; {fate}"
        yield "cache", f"{_size(cache.total_bytes)} for {cache.views} views of every clip"
        yield "memory, cache", f"about {_size(cache.build_memory_gb * 1e9)}"
    yield "memory, training", f"about {_size(plan.memory_gb * 1e9)}"
    yield from _time_rows(plan)


def _features_rows(features: FeaturesPlan) -> Iterator[tuple[str, str]]:
    fields = ", ".join(f"{name} {size:,}" for name, size in features.record_bytes.items())
    yield "features of a view", f"{features.view_bytes:,} bytes: {fields}"
    views = "1 view" if features.views == 1 else f"{features.views} views"
    yield (
        "features",
        f"{_size(features.total_bytes)} for {views} of every training clip; those of val and test "
        "come on top",
    )


def _looks(teacher: TeacherPlan, plan: Plan) -> str:
    share = teacher.forward_tflop / (teacher.forward_tflop + plan.step_tflop)
    return f"{_flops(teacher.forward_tflop)} a clip, {share:.1%} of a step with live targets"


def together_rows(plan: TogetherPlan) -> Iterator[tuple[str, str]]:
    """The plan as labels and sentences for a table."""
    yield "students", ", ".join(plan.students)
    yield (
        "records",
        f"{_size(plan.epoch_bytes)} an epoch, read once for all, {plan.batch_size:,} at a time",
    )
    yield "memory, training", f"about {_size(plan.memory_gb * 1e9)}"
    yield "time", f"with one device at a sustained {plan.sustained_tflops:g} TFLOP/s:"
    yield "  cache", f"{_time(plan.build_hours)}, once for all students"
    yield "  training", _time(plan.hours)
    whole = plan.build_hours + plan.hours
    for label, live in (
        ("  live, a run each", plan.live_hours),
        ("  live, one run", plan.live_together_hours),
    ):
        yield label, f"{_time(live)}; with the cache {live / whole:.1f} times faster"


def _time_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "time", f"with one device at a sustained {plan.sustained_tflops:g} TFLOP/s:"
    if plan.cache is None:
        if plan.features is not None:
            yield "  features", f"{_time(plan.features.build_hours)}, once for all probes"
        yield "  training", _time(plan.teacher.live_hours if plan.teacher else plan.hours)
        return
    yield "  cache", f"{_time(plan.cache.build_hours)}, once for all students"
    yield "  training", _time(plan.hours)
    whole = plan.cache.build_hours + plan.hours
    live = plan.teacher.live_hours
    yield "  live instead", f"{_time(live)}; with the cache {live / whole:.1f} times faster"
    yield "break-even", f"after epoch {plan.cache.break_even_epoch} of {plan.epochs}"


def _hours(tflop: float, sustained_tflops: float) -> float:
    return tflop / (sustained_tflops * 3600)


def _size(count: float) -> str:
    unit, name = next(
        (u, n) for u, n in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (0, "bytes")) if count >= u
    )
    return f"{count / (unit or 1):.2f} {name}"


def _flops(tflop: float) -> str:
    if tflop < 0.01:
        return f"{1000 * tflop:.3f} GFLOP"
    return f"{tflop:.{3 if tflop >= 1 else 4}f} TFLOP"


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.0f} minutes" if hours >= 1 / 60 else "under a minute"


def _teacher_name(teacher: Teacher) -> str:
    if teacher.kind == "timm":
        return f"timm {teacher.model}"
    name = _size_name(teacher.size)
    return name if teacher.kind == "internvideo2" else f"{teacher.kind} {name}"


def _size_name(size: str | Size) -> str:
    return size if isinstance(size, str) else f"{size.width}x{size.depth}"
