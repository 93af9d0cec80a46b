"""What a cache is: every setting that its records depend on, by the name the recipe gives it.

The revisions are raised by hand when code changes what the same settings produce (tests pin
bytes). Package versions, decoder and device are no part of it.
"""

from pathlib import Path

from distill.errors import InputError, StateError
from distill.recipe import Distill, Recipe, Teacher, vit_size
from distill.students.vit import SIZES, resolve_size
from distill.students.warmstart import file_sha256
from distill.teachers import return_layers

REVISIONS = {"layout": 2, "sampling": 1, "augmentation": 1, "mask": 1, "codes": 2}
MEANS_FILE = "means.safetensors"
BLOCKS = "teacher blocks"  # whose outputs are kept: by objective.teacher's layers and interval
MEANS = "codes means (sha256)"  # of shards alone: measured once for a cache, and kept beside them


def cache_identity(recipe: Recipe) -> dict:
    """The identity that a recipe's records have, as a flat dict of JSON values.

    Reads the teacher's whole file where the recipe does not hold its hash (`teacher_hash`).
    Raises InputError for a recipe without a cache.
    """
    section = distill_section(recipe)
    views = recipe.data.views.model_dump(mode="json", exclude={"decoder", "sampling"})
    sampling = recipe.data.views.sampling.model_dump(mode="json")
    return {
        "teacher weights (sha256)": teacher_hash(recipe),
        "objective.teacher.size": _size_name(section.teacher.size),
        "objective.teacher.activation": section.teacher.activation,
        "objective.teacher.precision": section.teacher.precision,
        BLOCKS: _blocks(section.teacher),
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
    weights = section.teacher.weights
    if section.cache.teacher_hash is not None:
        return section.cache.teacher_hash.lower()
    if weights is None:
        tables = "" if section.teacher.positions == "joint" else ", separable positions"
        return f"random, seed {recipe.run.seed}{tables}"
    if weights.sha256 is not None:
        return weights.sha256.lower()
    if not Path(weights.checkpoint).exists():
        raise InputError(
            f"teacher {weights.checkpoint}: no such file; to train from its cache without it, "
            "set objective.cache.teacher_hash to its sha256"
        )
    return file_sha256(weights.checkpoint)


def adopt_blocks(found: dict, expected: dict) -> tuple[dict, list[int] | None]:
    """The expected identity of a cache that keeps more of the teacher's blocks than are asked for.

    With it come the places, among those it keeps, of the ones asked for; None for all of them.
    """
    have, want = found.get(BLOCKS), expected[BLOCKS]
    if have == want or not isinstance(have, list) or not set(want) <= set(have):
        return expected, None
    return {**expected, BLOCKS: have}, [have.index(block) for block in want]


def require_identity(found: dict, expected: dict, *, where: str) -> None:
    """Refuse a cache that is not the recipe's: StateError, one line, on the first difference."""
    for name in sorted({**expected, **found}, key=MEANS.__eq__):  # they differ where settings do
        have, want = found.get(name), expected.get(name)
        if have == want and (name in found) == (name in expected):
            continue
        if name == MEANS:
            raise StateError(
                f"{where}: its codes need the means {_text(have)}, but {MEANS_FILE} "
                f"{'is not there' if want is None else f'holds {want}'}; put that file back, or "
                "delete the folder and run 'distill cache-teacher' again"
            )
        raise StateError(
            f"{where}: holds {name} {_text(have)}, the recipe asks for {_text(want)}; "
            f"{_advice(name, have)}set objective.cache.folder to a new folder and run "
            "'distill cache-teacher'"
        )


def _advice(name: str, have) -> str:
    is_setting = name.startswith(("data.", "objective."))
    return f"set {name}={_text(have)}, or " if is_setting and have is not None else ""


def _text(value) -> str:
    if isinstance(value, list):
        return "[" + ",".join(str(item) for item in value) + "]"
    return "none" if value is None else str(value)


def _blocks(teacher: Teacher) -> list[int]:
    depth = resolve_size(vit_size(teacher.size)).depth
    return list(return_layers(depth, teacher.layers, teacher.interval))


def _size_name(size) -> str:
    resolved = resolve_size(vit_size(size))
    for name, known in SIZES.items():
        if known == resolved:
            return name
    return (
        f"{resolved.width}x{resolved.depth}x{resolved.heads}, mlp_ratio {resolved.mlp_ratio}, "
        f"pooled_width {resolved.pooled_width}"
    )
