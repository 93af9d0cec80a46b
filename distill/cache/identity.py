"""What a cache is: every setting that its records depend on, by the name the recipe gives it.

The revisions are raised by hand when code changes what the same settings produce (tests pin
bytes). Package versions, decoder and device are no part of it.
"""

import re
from pathlib import Path

from distill.errors import InputError, StateError
from distill.models import teacher_depth
from distill.recipe import MAIN, Distill, Recipe, Teacher, vit_size
from distill.students.vit import SIZES, resolve_size
from distill.students.warmstart import file_sha256
from distill.teachers import return_layers

REVISIONS = {"layout": 2, "sampling": 1, "augmentation": 1, "mask": 1, "codes": 2}
OTHERS = "objective.others."
USUAL = {"objective.teacher.kind": "internvideo2"}  # and then no part of an identity
WEIGHTS = " weights (sha256)"
MEANS_FILE = "means.safetensors"
BLOCKS = "teacher blocks"  # whose outputs are kept: by objective.teacher's layers and interval
MEANS = "codes means (sha256)"  # of shards alone: measured once for a cache, and kept beside them


def cache_identity(recipe: Recipe) -> dict:
    """The identity that a recipe's records have, as a flat dict of JSON values.

    Reads the teacher's whole file where the recipe does not hold its hash (`teacher_hash`).
    Raises InputError for a recipe without a cache.
    """
    section = distill_section(recipe)
    # Of a recipe with a teacher, `antialias` has one value.
    views = recipe.data.views.model_dump(mode="json", exclude={"decoder", "sampling", "antialias"})
    sampling = recipe.data.views.sampling.model_dump(mode="json")
    return {
        **_main_identity(recipe),
        **{
            key: value
            for name, teacher in section.others.items()
            for key, value in _other_identity(recipe, name, teacher).items()
        },
        **{f"data.views.sampling.{name}": value for name, value in sampling.items()},
        **{f"data.views.{name}": value for name, value in views.items()},
        "objective.mask.kind": section.mask.kind,
        "objective.mask.ratio": section.mask.ratio,
        "objective.cache.tokens": section.cache.tokens,
        "objective.cache.pixels": section.cache.pixels,
        "objective.cache.codes": section.cache.codes,
        "objective.cache.seed": section.cache.seed,
        **{f"{name} revision": number for name, number in REVISIONS.items()},
    }


def _main_identity(recipe: Recipe) -> dict:
    """What the main teacher is; settings that came later are there where they are not usual."""
    section = distill_section(recipe)
    place = "objective.teacher"
    values = {
        "teacher weights (sha256)": teacher_hash(recipe),
        **_settings(section.teacher, recipe, place),
        BLOCKS: _blocks(recipe, MAIN),
    }
    return {key: value for key, value in values.items() if USUAL.get(key) != value}


def _other_identity(recipe: Recipe, name: str, teacher: Teacher) -> dict:
    place = f"{OTHERS}{name}"
    return {
        f"{place}{WEIGHTS}": _weights_hash(teacher, recipe, place),
        **_settings(teacher, recipe, place),
        f"{place} blocks": _blocks(recipe, name),
    }


def _settings(teacher: Teacher, recipe: Recipe, place: str) -> dict:
    """A teacher's settings by their names in a recipe; input of its own where it has some."""
    views = recipe.data.views
    values = {"kind": teacher.kind}
    if teacher.kind == "timm":
        values["model"] = teacher.model
    else:
        values["size"] = _size_name(teacher.size)
    if teacher.kind in ("internvideo2", "internvl"):
        values["activation"] = teacher.activation
    values["precision"] = teacher.precision
    for field in ("frames", "image_size"):
        own = getattr(teacher, field)
        if own is not None and own != getattr(views, field):
            values[field] = own
    for field in ("mean", "std"):
        if getattr(teacher, field) is not None:
            values[field] = list(getattr(teacher, field))
    return {f"{place}.{field}": value for field, value in values.items()}


def other_teachers(identity: dict) -> list[str]:
    """Names of the teachers, beside the main one, that a cache of this identity has rows of."""
    pattern = re.compile(re.escape(OTHERS) + r"([a-z0-9]+) blocks")
    return sorted(match[1] for match in map(pattern.fullmatch, identity) if match)


def distill_section(recipe: Recipe) -> Distill:
    """The objective of a recipe that has a cache; raises InputError otherwise."""
    section = recipe.objective
    if not isinstance(section, Distill) or section.cache is None:
        raise InputError(
            f"recipe {recipe.name}: no view cache; give it objective.kind: distill and "
            "objective.cache.folder"
        )
    return section


def teacher_hash(recipe: Recipe) -> str:
    """What tells a teacher's weights from others': the sha256 of their file.

    A hash in the recipe spares the file; a random teacher is known by its seed and by which
    tables it draws. Raises InputError when there is neither.
    """
    section = distill_section(recipe)
    if section.cache.teacher_hash is not None:
        return section.cache.teacher_hash.lower()
    return _weights_hash(section.teacher, recipe, "objective.teacher")


def _weights_hash(teacher: Teacher, recipe: Recipe, place: str) -> str:
    weights = teacher.weights
    if weights is None:
        tables = "" if teacher.positions == "joint" else ", separable positions"
        return f"random, seed {recipe.run.seed}{tables}"
    if weights.sha256 is not None:
        return weights.sha256.lower()
    if not Path(weights.checkpoint).exists():
        is_main = not place.startswith(OTHERS)
        key = "objective.cache.teacher_hash" if is_main else f"{place}.weights.sha256"
        raise InputError(
            f"teacher {weights.checkpoint}: no such file; to train from its cache without it, "
            f"set {key} to its sha256"
        )
    return file_sha256(weights.checkpoint)


def adopt_more(found: dict, expected: dict) -> tuple[dict, dict[str, list[int]] | None]:
    """The expected identity of a cache that keeps more of its teachers than is asked for.

    That is more blocks of a teacher, or other teachers; where these took more frames, a view has
    every n-th that was drawn for them. With it come, by teacher, the places of the blocks asked
    for where it keeps more of them; None where this is not the difference.
    """
    adopted, places = dict(expected), {}
    for name in (MAIN, *other_teachers(expected)):
        key = f"{OTHERS}{name} blocks" if name else BLOCKS
        have, want = found.get(key), expected[key]
        if have != want and isinstance(have, list) and set(want) <= set(have):
            adopted[key] = have
            places[name] = [have.index(block) for block in want]
    more = set(other_teachers(found)) - set(other_teachers(expected))
    for name in more:
        begins = (f"{OTHERS}{name} ", f"{OTHERS}{name}.")
        adopted |= {key: value for key, value in found.items() if key.startswith(begins)}
    return adopted, places if places or more else None


def require_identity(found: dict, expected: dict, *, where: str) -> None:
    """Refuse a cache that is not the recipe's: StateError, one line, on the first difference."""
    for name in sorted({**expected, **found}, key=MEANS.__eq__):  # they differ where settings do
        have, want = (identity.get(name, USUAL.get(name)) for identity in (found, expected))
        if have == want and (name in found) == (name in expected):
            continue
        if name == MEANS:
            raise StateError(
                f"{where}: its codes need the means {_text(have)}, but {MEANS_FILE} "
                f"{'is not there' if want is None else f'holds {want}'}; put that file back, or "
                "delete the folder and run 'distill cache-teacher' again"
            )
        if name.startswith(OTHERS) and name.endswith(WEIGHTS) and have is None:
            raise StateError(
                f"{where}: holds nothing of {name.removesuffix(WEIGHTS)}; leave that teacher "
                "out of the recipe, or set objective.cache.folder to a new folder and run 'distill "
                "cache-teacher'"
            )
        raise StateError(
            f"{where}: holds {name} {_text(have)}, the recipe asks for {_text(want)}; "
            f"{_advice(name, have)}set objective.cache.folder to a new folder and run "
            "'distill cache-teacher'"
        )


def _advice(name: str, have) -> str:
    is_setting = name.startswith(("data.", "objective.")) and " " not in name
    return f"set {name}={_text(have)}, or " if is_setting and have is not None else ""


def _text(value) -> str:
    if isinstance(value, list):
        return "[" + ",".join(str(item) for item in value) + "]"
    return "none" if value is None else str(value)


def _blocks(recipe: Recipe, name: str) -> list[int]:
    teacher = recipe.objective.teachers[name]
    return list(return_layers(teacher_depth(recipe, name), teacher.layers, teacher.interval))


def _size_name(size) -> str:
    resolved = resolve_size(vit_size(size))
    for name, known in SIZES.items():
        if known == resolved:
            return name
    return (
        f"{resolved.width}x{resolved.depth}x{resolved.heads}, mlp_ratio {resolved.mlp_ratio}, "
        f"pooled_width {resolved.pooled_width}"
    )
