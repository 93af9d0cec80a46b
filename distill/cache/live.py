"""A recipe's teachers looking at views: for building a cache, filling its gaps and checking it."""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from distill.cache.calibrate import measure_means, write_codec
from distill.cache.codes import Codec
from distill.cache.identity import teacher_hash
from distill.cache.store import Folder
from distill.data.index import Clip
from distill.data.load import ClipLoader, Quarantine, Task, View, collate, load_task
from distill.engines.plain import AUTOCAST, pick_device, to_device
from distill.errors import StateError
from distill.models import build_teacher
from distill.recipe import MAIN, Recipe, of_teacher, read_views, views_seed
from distill.targets import OtherTeacher, view_records
from distill.teachers import Teacher


def cached_teachers(recipe: Recipe) -> dict[str, Teacher]:
    """The recipe's teachers on the device that runs them, made ready for their batches.

    Raises StateError when the main one's weights are not those that the cache is to hold.
    """
    check_teacher_hash(recipe)
    batch_size = recipe.objective.cache.batch_size
    return tuned_teachers(recipe, batch_size=batch_size, device=pick_device())


def check_teacher_hash(recipe: Recipe) -> None:
    """Raise StateError when the main teacher's weights are not those that a cache is to hold."""
    section = recipe.objective
    if section.cache is not None and section.cache.teacher_hash is not None:
        expected = section.cache.teacher_hash.lower()
        own = section.cache.model_copy(update={"teacher_hash": None})
        objective = section.model_copy(update={"cache": own})
        found = teacher_hash(recipe.model_copy(update={"objective": objective}))
        if found != expected:
            raise StateError(
                f"objective.cache.teacher_hash is {expected}, but the teacher's is {found}; drop "
                "the hash from the recipe, or give the teacher it belongs to"
            )


def tuned_teachers(recipe: Recipe, *, batch_size: int, device: torch.device) -> dict[str, Teacher]:
    """The recipe's teachers by name on a device, made ready for batches of this size."""
    teachers = {}
    for name, section in recipe.objective.teachers.items():
        teachers[name] = build_teacher(recipe, name).to(device)
        dtype = AUTOCAST.get(section.precision, torch.float32)
        teachers[name].tune(dtype, batch_size=batch_size)
    return teachers


def other_teachers(recipe: Recipe, teachers: Mapping[str, Teacher]) -> dict[str, OtherTeacher]:
    """Those beside the main one, with the precisions that they run in."""
    others = recipe.objective.others
    return {name: OtherTeacher(teachers[name], others[name].precision) for name in others}


def view_loader(recipe: Recipe, quarantine: Quarantine) -> ClipLoader:
    """Decodes the views that the recipe's cache holds, or would."""
    data = recipe.data
    return ClipLoader(
        functools.partial(load_task, views=read_views(recipe), seed=views_seed(recipe)),
        workers=data.workers,
        timeout_seconds=data.decode_timeout_seconds,
        quarantine=quarantine,
    )


def make_records(
    recipe: Recipe, teachers: Mapping[str, Teacher], items: Sequence[tuple[Task, View]]
) -> dict[str, torch.Tensor]:
    """`view_records` of loaded views with the recipe's settings, on the device."""
    section = recipe.objective
    return view_records(
        teachers[MAIN],
        to_device(collate(items), pick_device()),
        mask=section.mask,
        seed=section.cache.seed,
        precision=section.teacher.precision,
        tokens=section.cache.tokens,
        pixels=section.cache.pixels,
        others=other_teachers(recipe, teachers),
    )


def calibrate(
    recipe: Recipe,
    folder: Folder,
    identity: dict,
    clips: Sequence[Clip],
    teachers: Mapping[str, Teacher],
    *,
    advance: Callable[[int], None],
) -> Codec:
    """Measure the means of a new cache on the given clips, and keep them in its folder."""
    # Clips that fail here go to no quarantine: they may lie beyond what is to be cached.
    quarantine = Quarantine(None, total=len(clips), max_share=1.0)

    def middle(items: Sequence[tuple[Task, View]]) -> dict[str, torch.Tensor]:
        records = make_records(recipe, teachers, items)
        return {name: records[of_teacher("middle", name)] for name in teachers}

    means = measure_means(
        clips,
        loader=view_loader(recipe, quarantine),
        middle=middle,
        batch_size=recipe.objective.cache.batch_size,
        advance=advance,
    )
    return write_codec(folder, identity, means.pop(MAIN), means)
