"""What is wrong with a recipe, in the words of the person who wrote it."""

import difflib
import json
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from distill.cache.store import open_folder
from distill.checks.engine import engine_errors
from distill.checks.probe import probe_errors
from distill.checks.teacher import distill_errors, named_teachers
from distill.checks.timm import timm_errors
from distill.recipe import (
    Checkpoint,
    ClipList,
    Distill,
    Recipe,
    Run,
    Section,
    vit_size,
)
from distill.students.vit import PATCH, resolve_size

Keys = tuple[str, ...]
Origins = dict[Keys, str]  # what a message about the value at these keys starts with

STAGE = "stage:"  # a checkpoint of this form is an earlier stage of the study
MAPPED_CLASSES = {"k600": 600, "k700": 700}  # of model.weights.head, from Kinetics-710's rows


def check_recipe(
    tree: dict[str, Any],
    origins: Origins,
    place: str,
    *,
    mistakes: list[str],
    earlier: Collection[str] | None = None,
) -> Recipe | None:
    """Validate a tree, or append a line per mistake and return None.

    `place` starts a message about a key that nobody wrote; `earlier` names the stages before
    this one (None outside a study).
    """
    try:
        recipe = Recipe.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        mistakes += _explain(error, Recipe, tree, origins, place)
        return None
    found = list(_contradictions(recipe, earlier))
    mistakes += [f"{_origin(keys, origins, place)}: {message}" for keys, message in found]
    return None if found else recipe


def check_run(tree: Any, origins: Origins, place: str, *, mistakes: list[str]) -> Run:
    """Validate the `run` section that a study's stages share; defaults after a mistake."""
    try:
        return Run.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        below = {keys[1:]: origin for keys, origin in origins.items() if keys[:1] == ("run",)}
        mistakes += _explain(error, Run, tree, below, f"{place}run.")
        return Run()


def check_students(
    students: dict[str, Recipe], origins: dict[str, Origins], place: str
) -> list[str]:
    """A line for each setting that keeps students from learning from one stream of records."""
    lines = []
    first = next((name for name, one in students.items() if isinstance(one.objective, Distill)), "")
    largest = max(students, key=lambda name: students[name].optim.batch_size)
    largest_batch = students[largest].optim.batch_size
    shared = _shared_settings(students[first]) if first else {}
    for name, recipe in students.items():
        found: list[tuple[Keys, str]] = []
        if not isinstance(recipe.objective, Distill):
            found.append((("objective", "kind"), f"must be 'distill', as {name} is a student"))
        elif recipe.objective.targets != "cached":
            found.append((("objective", "targets"), "must be 'cached' for students of one recipe"))
        else:
            found += [
                (keys, f"is {json.dumps(mine)} for {name}, but {json.dumps(theirs)} for {first}")
                for keys, mine, theirs in _differing(_shared_settings(recipe), shared)
            ]
        if recipe.engine.kind != "ddp":
            found.append((("engine", "kind"), "must be 'ddp' for students of one recipe"))
        if largest_batch % recipe.optim.batch_size:
            message = f"{recipe.optim.batch_size} of {name} must divide the {largest_batch} of "
            found.append((("optim", "batch_size"), message + largest))
        lines += [
            f"{_origin(keys, origins[name], f'{place}students.{name}.')}: {message}"
            for keys, message in found
        ]
    return lines


def _shared_settings(recipe: Recipe) -> dict[str, Any]:
    """What all students of a recipe agree on: their order, records, targets and what is told."""
    return recipe.model_dump(
        mode="json",
        include={
            "run": {"seed", "kernels"},
            "data": {"train", "val", "views"},
            "objective": {"mask", "teacher", "others", "cache", "monitor"},
        },
        exclude={"objective": {"others": {"__all__": {"weight", "decoder"}}}},
    )


def _differing(one: Any, other: Any, above: Keys = ()) -> Iterator[tuple[Keys, Any, Any]]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            yield from _differing(one.get(key), other.get(key), (*above, key))
    elif one != other:
        yield above, one, other


def nearest(name: str, names: Iterable[str]) -> str:
    """`, did you mean 'lr'?` where one of the names comes close, and nothing otherwise."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def _explain(
    error: ValidationError, model: type[Section], tree: Any, origins: Origins, place: str
) -> list[str]:
    lines = []
    details = error.errors(include_url=False)
    places = [_keys_of(detail["loc"], tree) for detail in details]
    for detail, keys in zip(details, places, strict=True):
        kind, value = detail["type"], detail.get("input")
        # A size is a name or a section: say only what fits the form that was written.
        if kind == "literal_error" and isinstance(value, dict):
            continue
        if kind == "model_type" and places.count(keys) > 1:
            continue
        if kind.startswith("union_tag"):
            keys = (*keys, "kind")
        lines.append(f"{_origin(keys, origins, place)}: {_message(detail, model, tree, keys)}")
    return lines


def _keys_of(loc: tuple[int | str, ...], tree: Any) -> Keys:
    """Pydantic's location without the tags of unions, which nobody writes."""
    keys: list[str] = []
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        if isinstance(part, int) or (isinstance(tree, dict) and part in tree):
            keys.append(str(part))
            tree = tree[part] if isinstance(tree, dict) else None
        elif last and isinstance(tree, dict):
            keys.append(part)  # a missing key
    return tuple(keys)


def _message(detail: Any, model: type[Section], tree: Any, keys: Keys) -> str:
    kind, value = detail["type"], detail.get("input")
    if kind == "extra_forbidden":
        return _unknown(model, tree, keys)
    if kind in ("missing", "union_tag_not_found"):
        return "missing"
    if kind == "union_tag_invalid":
        tag, expected = detail["ctx"]["tag"], detail["ctx"]["expected_tags"]
        return f"must be {' or '.join(expected.split(', '))}, got {json.dumps(tag)}" + nearest(
            str(tag), re.findall(r"'([^']*)'", expected)
        )
    message = detail["msg"].replace("Input should be", "must be").replace("an object", "a section")
    message = f"{message[0].lower()}{message[1:]}, got {json.dumps(value, default=str)}"
    if kind == "literal_error":
        message += nearest(str(value), re.findall(r"'([^']*)'", detail["ctx"]["expected"]))
    return message


def _unknown(model: type[Section], tree: Any, keys: Keys) -> str:
    sections: list[type[BaseModel]] = [model]
    for key in keys[:-1]:
        tree = tree[key]
        if not any(key in section.model_fields for section in sections):
            continue  # a teacher's name
        sections = [
            below
            for section in sections
            if key in section.model_fields
            for below in _sections(section.model_fields[key].annotation)
            if _is_kind(below, tree)
        ]
    names = [name for section in sections for name in section.model_fields]
    elsewhere = [path for path in _schema_paths(model) if path.split(".")[-1] == keys[-1]]
    if ".".join(keys) in elsewhere and isinstance(tree, dict) and "kind" in tree:
        return f"is no setting of kind {tree['kind']!r}"
    hint = nearest(keys[-1], names)
    if not hint and elsewhere:
        hint = f", did you mean {' or '.join(repr(path) for path in elsewhere)}?"
    return f"unknown key{hint or '; known here: ' + ', '.join(names)}"


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [section for part in get_args(annotation) for section in _sections(part)]


def _is_kind(section: type[BaseModel], tree: Any) -> bool:
    kind = section.model_fields.get("kind")
    if kind is None or not isinstance(tree, dict):
        return True
    return tree.get("kind", kind.default) in get_args(kind.annotation)


def _schema_paths(section: type[BaseModel], above: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield above + name
        for below in _sections(field.annotation):
            yield from _schema_paths(below, f"{above}{name}.")


def _origin(keys: Keys, origins: Origins, place: str) -> str:
    if keys in origins:
        return origins[keys]
    if keys and keys[-1].isdigit() and keys[:-1] in origins:
        origin = origins[keys[:-1]]  # a list's, whose item is at fault
        return f"{origin}[{keys[-1]}]" if origin.endswith(keys[-2]) else origin
    return place + ".".join(keys)


def _contradictions(recipe: Recipe, earlier: Collection[str] | None) -> Iterator[tuple[Keys, str]]:
    """What each section alone cannot see; `earlier` are the study's stages before this one."""
    model, views, optim = recipe.model, recipe.data.views, recipe.optim
    if views.image_size % PATCH:
        yield ("data", "views", "image_size"), f"must be divisible by the patch, {PATCH} px"
    if views.frames % model.tubelet:
        yield ("data", "views", "frames"), f"must be divisible by model.tubelet, {model.tubelet}"
    if optim.epochs and optim.warmup_epochs > optim.epochs:
        yield ("optim", "warmup_epochs"), f"must be at most optim.epochs, {optim.epochs}"
    if optim.micro_batch and optim.micro_batch > optim.batch_size:
        yield ("optim", "micro_batch"), f"must be at most optim.batch_size, {optim.batch_size}"
    if recipe.run.damaged_checkpoint == "previous" and recipe.run.keep_checkpoints < 2:
        yield ("run", "keep_checkpoints"), "must be at least 2 for run.damaged_checkpoint: previous"
    for name in ("min_lr", "warmup_lr"):
        if getattr(optim, name) > optim.lr:
            yield ("optim", name), f"must be at most optim.lr, {optim.lr:g}"
    for keys, weights in _weights(recipe):
        if keys[-1] == "extra" and weights.checkpoint.startswith(STAGE):
            yield (*keys, "checkpoint"), "must be a file; stages have no vision encoder to take"
        else:
            yield from _stage_errors((*keys, "checkpoint"), weights.checkpoint, earlier)
    size = None
    if model.timm is not None:
        yield from timm_errors(recipe)
    elif model.size is None:
        yield ("model", "size"), "missing"
    else:
        try:
            size = resolve_size(vit_size(model.size))
        except ValueError as error:
            yield ("model", "size"), str(error)
    yield from engine_errors(recipe)
    if isinstance(recipe.objective, Distill):
        yield from distill_errors(recipe, recipe.objective, student=size)
        yield from _classify_only(recipe)
    else:
        names = recipe.objective.class_names
        if names is not None and len(names) != recipe.objective.num_classes:
            number = recipe.objective.num_classes
            yield ("objective", "class_names"), f"are {len(names)}, but num_classes is {number}"
        yield from probe_errors(recipe, recipe.objective)
        yield from _augment_errors(recipe)
        classes = MAPPED_CLASSES.get(model.weights.head) if model.weights else None
        if classes not in (None, recipe.objective.num_classes):
            yield (
                ("model", "weights", "head"),
                f"makes rows for {classes} classes, but objective.num_classes is "
                f"{recipe.objective.num_classes}; set head=reset, or the classes",
            )


def _classify_only(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    """Settings that would do nothing in a distillation."""
    augment = recipe.data.augment
    why = "only for objective.kind: classify; a teacher's targets are of views without it"
    if augment.rand_augment is not None:
        yield ("data", "augment", "rand_augment"), why
    if augment.erase is not None:
        yield ("data", "augment", "erase"), why
    if augment.repeats != 1:
        yield ("data", "augment", "repeats"), "must be 1, but for objective.kind: classify"
    if not recipe.data.views.antialias:
        yield ("data", "views", "antialias"), "must be true, but for objective.kind: classify"
    if recipe.model.head_drop_path:
        yield ("model", "head_drop_path"), "must be 0, as a student has no classification head"


def _augment_errors(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    optim, repeats = recipe.optim, recipe.data.augment.repeats
    if optim.batch_size % repeats:
        yield (
            ("optim", "batch_size"),
            f"counts views, and must be divisible by data.augment.repeats, {repeats}",
        )
    if recipe.objective.mixing is None:
        return
    for name in ("batch_size", "micro_batch"):
        if (getattr(optim, name) or 0) % 2:
            yield ("optim", name), "must be even, as objective.mixing mixes clips in pairs"


def _stage_errors(
    keys: Keys, checkpoint: str, earlier: Collection[str] | None
) -> Iterator[tuple[Keys, str]]:
    name = checkpoint.removeprefix(STAGE)
    if name == checkpoint:
        return
    if earlier is None:
        yield keys, f"{checkpoint!r} is a stage, but this recipe has none"
    elif name not in earlier:
        yield keys, f"no stage {name!r} comes before this one{nearest(name, earlier)}"


def _weights(recipe: Recipe) -> Iterator[tuple[Keys, Checkpoint]]:
    if recipe.model.weights is not None:
        yield ("model", "weights"), recipe.model.weights
        if recipe.model.weights.extra is not None:
            yield ("model", "weights", "extra"), recipe.model.weights.extra
    if isinstance(recipe.objective, Distill):
        for keys, teacher in named_teachers(recipe.objective):
            if teacher.weights is not None:
                yield (*keys, "weights"), teacher.weights


def missing_inputs(
    recipe: Recipe,
    verb: Literal["train", "cache-teacher", "evaluate"],
    *,
    stage: str | None = None,
    student: str | None = None,
) -> list[str]:
    """Every file that `verb` would read and that is not there, with the override that sets it.

    Clips of a `demo` section are made on the way, and a view cache whose teacher is given by its
    hash needs neither the teacher nor its videos.
    """
    prefix = "" if stage is None else f"stages.{stage}."
    is_distill = isinstance(recipe.objective, Distill)
    is_cached = verb == "train" and _has_cache(recipe)
    only_evaluates = not is_distill and not recipe.optim.epochs
    splits = [] if verb == "evaluate" or only_evaluates else ["train"]
    if verb == "train" and not (is_distill or only_evaluates) and recipe.evaluate.every_epochs:
        splits.append("val")
    if verb == "evaluate" or (verb == "train" and not is_distill):
        splits.append(recipe.evaluate.split)
    lines = []
    is_told = verb == "train" and is_distill and recipe.objective.monitor is not None
    if is_told and recipe.data.val is not None and recipe.data.val.list:
        splits.append("val")  # which without a list only tells less
    folder = recipe.data.folder
    has_folder = folder is None or Path(folder).expanduser().is_dir()
    if not has_folder and (splits or is_distill):
        lines.append(_missing("data.folder", f"{folder}: no such folder", None))
    for split in dict.fromkeys(splits):
        clips = getattr(recipe.data, split)
        if not has_folder and clips is not None and clips.part is not None:
            continue
        reads_videos = not is_cached or split == "val"
        if clips is not None and recipe.data.demo is None and (reads_videos or clips.list):
            lines += _missing_list(clips, f"{prefix}data.{split}", reads_videos=reads_videos)
    for keys, weights in _weights(recipe):
        if keys[0] == "objective":
            is_needed = verb == "cache-teacher" or (verb == "train" and not is_cached)
        else:
            is_needed = verb == "train"
        path = weights.checkpoint
        if is_needed and not path.startswith(STAGE) and not Path(path).exists():
            own = f"students.{student}." if student and keys[0] == "model" else prefix
            key = f"{own}{'.'.join(keys)}.checkpoint"
            source = weights.source
            if source and recipe.run.toy:
                source = f"{source}; of a toy, its own toy does: run.toy=true"
            lines.append(_missing(key, f"{path}: no such file", source))
    return lines


def _has_cache(recipe: Recipe) -> bool:
    """Whether there is a cache whose teachers the recipe knows by their hashes."""
    section = recipe.objective
    if not isinstance(section, Distill) or section.targets != "cached":
        return False
    hashes = [own.weights and own.weights.sha256 for own in section.teachers.values()]
    hashes[0] = section.cache.teacher_hash or hashes[0]
    return all(hashes) and bool(open_folder(section.cache.folder).sizes())


def _missing_list(clips: ClipList, key: str, *, reads_videos: bool) -> Iterator[str]:
    if clips.list is None:
        yield _missing(f"{key}.list", "not set", clips.source)
    elif not Path(clips.list).expanduser().exists():
        yield _missing(f"{key}.list", f"{clips.list}: no such file", clips.source)
    if reads_videos and clips.prefix is not None and not Path(clips.prefix).is_dir():
        yield _missing(f"{key}.prefix", f"{clips.prefix}: no such folder", None)


def _missing(key: str, what: str, source: str | None) -> str:
    return f"{key}: {what}{f' ({source})' if source else ''}; set {key}=PATH"
