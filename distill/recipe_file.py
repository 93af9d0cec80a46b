"""From a recipe file and overrides to a checked `Recipe`, `Study` or `Students`.

Strict: every key must be known, every mistake is reported at once, and each message names the
file and the dotted path (or the override) that is to be put right.
"""

import copy
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from distill.checks.recipe import (
    Keys,
    Origins,
    check_recipe,
    check_run,
    check_students,
    nearest,
)
from distill.data.folder import fill_from_folder
from distill.errors import InputError
from distill.recipe import Recipe, Students, Study
from distill.recipe_yaml import parse_yaml
from distill.toy import SUFFIX, toy_recipe

Change = tuple[Keys, Any, str]  # an override: keys, value and the text it was given as
Draft = tuple[dict[str, Any], Origins]  # a recipe before its overrides

PATH_KEYS = ("checkpoint", "folder", "list", "prefix")
PLAIN_NAME = re.compile(r"[\w-]+")
# Settings that may differ between a run and its resume: they say where and how often, not what.
HARMLESS = re.compile(
    r"name|run\.(folder|save_minutes|keep_checkpoints|damaged_checkpoint|log_steps|hang_minutes|"
    r"peak_tflops)|"
    r"data\.(workers|decode_timeout_seconds)|data\.(train|val|test)\.(prefix|num_clips)|.*\.source|"
    r"objective\.(cache|features)\.(folder|shard_mb|shard_minutes)|objective\.monitor(\..*)?|"
    r"engine\..*"
)


def load_recipe(
    path_or_name: str | Path, overrides: Sequence[str] = ()
) -> Recipe | Study | Students:
    """Read a recipe: its bases merged under it, `section.key=value` overrides on top.

    Of several bases, `base: [a.yaml, b.yaml]`, a later one goes over an earlier one. One that is
    not beside the file may be a shipped recipe.

    `./x` and `../x` in a file are relative to that file, other paths and those of overrides to
    the working directory. With stages or students, an override that names none of them holds for
    all. A student is a recipe beside the file or, as on the command line, a shipped one.
    Raises InputError with a line for each mistake.
    """
    path = find_recipe(path_or_name)
    tree, origins = _read(path)
    changes = [_parse_override(text) for text in overrides]
    mistakes: list[str] = []
    several = next((key for key in ("stages", "students") if key in tree), None)
    if several:
        for change in [change for change in changes if change[0] == ("students",)]:
            _set(tree, origins, *change)
            changes.remove(change)
        if several == "stages":
            drafts = _stage_drafts(tree, origins, _label(path), mistakes)
        else:
            drafts = _student_drafts(tree, origins, path, mistakes)
        recipe = _build_several(
            several, path, tree, origins, drafts, changes=changes, mistakes=mistakes
        )
    else:
        tree = _with_changes((tree, origins), changes, f"{_label(path)}: ", mistakes=mistakes)
        name = tree.get("name") or path.stem
        recipe = check_recipe(
            {**tree, "name": name}, origins, f"{_label(path)}: ", mistakes=mistakes
        )
        if recipe is not None:
            recipe = _in_folder(recipe, recipe.run.folder.replace("{name}", name))
    if mistakes:
        raise InputError("\n".join(dict.fromkeys(mistakes)))
    return recipe


def find_recipe(path_or_name: str | Path) -> Path:
    """A file as it stands, or a shipped recipe by name: `L14`, `L14.yaml`, `recipes/L14.yaml`."""
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return path
    name = str(path_or_name).removeprefix("recipes/").removesuffix(".yaml")
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    what = "is a folder" if path.is_dir() else "no such file"
    raise InputError(
        f"{path_or_name}: {what}{nearest(name, shipped) or '.'} "
        f"Shipped recipes: {', '.join(shipped)}"
    )


def shipped_recipes() -> dict[str, Path]:
    """Name and path of every recipe that comes with the package.

    Files whose names begin with an underscore are bases, not recipes of their own.
    """
    folder = Path(str(resources.files("distill.recipes")))
    files = sorted(file for file in folder.rglob("*.yaml") if not file.name.startswith("_"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def dump_recipe(recipe: Recipe | Study) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal one."""
    placed = {"stages": {"__all__": {"name": True, "run": {"folder"}}}}  # follow from the study
    values = recipe.model_dump(mode="json", exclude=placed if isinstance(recipe, Study) else None)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 over every setting that has a say in the result (see `HARMLESS`)."""
    text = json.dumps(_settings(recipe), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The settings that keep `new` from resuming `old`, as `optim.lr: 0.001, now 0.002`."""
    before, after = _settings(old), _settings(new)
    return [
        f"{key}: {json.dumps(before.get(key))}, now {json.dumps(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors.

    Nothing is required, since a base or a study's shared sections may hold it.
    """
    schema = Recipe.model_json_schema()
    base = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    whole = {**schema, "properties": {**schema["properties"], "base": base}}
    definitions = {**schema.pop("$defs"), "Stage": schema}
    whole["properties"]["stages"] = {
        "type": "object",
        "additionalProperties": {"$ref": "#/$defs/Stage"},
        "description": Study.__doc__,
    }
    whole["properties"]["students"] = {
        "type": "array",
        "items": {"type": "string"},
        "description": Students.__doc__,
    }
    whole.pop("$defs", None)
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **whole,
        "$defs": definitions,
    }
    return _optional(whole)


def _optional(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_optional(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    # Without required keys a part of a section may fit several kinds, which oneOf forbids.
    names = {"oneOf": "anyOf"}
    return {
        names.get(key, key): _optional(value)
        for key, value in schema.items()
        if key not in ("required", "discriminator")
    }


def _read(path: Path, *, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], Origins]:
    label = _label(path)
    if path.resolve() in above:
        raise InputError(f"{label}: base: is its own base, by way of {_label(above[-1])}")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), label)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{label}: cannot be read as a text file: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{label}: expected sections such as 'model:' and 'optim:'")
    base = tree.pop("base", None)
    tree = _anchored(tree, path.parent)
    origins = {keys: f"{label}: {'.'.join(keys)}" for keys, _ in _walk(tree)}
    under: Draft = ({}, {})
    for one in base if isinstance(base, list) else [] if base is None else [base]:
        below = path.parent / str(one)
        if not below.is_file():
            below = shipped_recipes().get(str(one).removesuffix(".yaml"), below)
        if not below.is_file():
            raise InputError(f"{label}: base: {_label(below)}: no such file")
        base_tree, base_origins = _read(below, above=(*above, path.resolve()))
        base_tree.pop("name", None)  # or two recipes would share a run folder
        under = _merged(under[0], base_tree), under[1] | base_origins
    return _merged(under[0], tree), under[1] | origins


def _label(path: Path) -> str:
    """The path as a person would type it."""
    path = Path(os.path.normpath(path))
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_absolute() and here in path.parents else path)


def _anchored(tree: Any, folder: Path) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {
        key: _anchor(value, folder) if key in PATH_KEYS else _anchored(value, folder)
        for key, value in tree.items()
    }


def _anchor(value: Any, folder: Path) -> Any:
    """A path that means the same in any file: the run folder's recipe.yaml is read again."""
    if not isinstance(value, str):
        return value
    if value.startswith("~"):
        return os.path.expanduser(value)
    if value.split("/")[0] in (".", ".."):
        return os.path.abspath(folder / value)
    return value


def _walk(tree: Any, above: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield (*above, key), value
            yield from _walk(value, (*above, key))


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Sections merge key by key, except that another `kind` replaces the section."""
    result = dict(under)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            same = old.get("kind") == value.get("kind", old.get("kind"))
            value = _merged(old, value) if same else value
        result[key] = value
    return result


def _parse_override(text: str) -> Change:
    dotted, equals, value = text.partition("=")
    keys = tuple(dotted.strip().split("."))
    if not equals or not all(keys):
        raise InputError(f"{text}: expected section.key=value, such as optim.lr=1e-4")
    value = _anchored(parse_yaml(value, text), Path())
    return keys, _anchor(value, Path()) if keys[-1] in PATH_KEYS else value, text


def _with_changes(
    draft: Draft,
    changes: Sequence[Change],
    place: str,
    *,
    mistakes: list[str],
    earlier: Collection[str] | None = None,
) -> dict[str, Any]:
    """The draft's tree with the overrides; where they ask for a toy, they are set in the toy."""
    tree, origins = draft
    changed, changed_origins = copy.deepcopy(tree), dict(origins)
    for change in changes:
        _set(changed, changed_origins, *change)
    run = changed.get("run")
    if isinstance(run, dict) and run.get("toy") is True:
        whole = check_recipe(tree, origins, place, mistakes=mistakes, earlier=earlier)
        if whole is not None:
            tree.update(toy_recipe(whole).model_dump(mode="json"))
    for change in changes:
        _set(tree, origins, *change)
    fill_from_folder(tree)
    return tree


def _set(tree: dict[str, Any], origins: Origins, keys: Keys, value: Any, text: str) -> None:
    for key in keys[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree[key] = dict(tree[key])  # stages share their sections until one is changed
        tree = tree[key]
    tree[keys[-1]] = copy.deepcopy(value)
    for below in [other for other in origins if other[: len(keys)] == keys]:
        del origins[below]
    for depth in range(1, len(keys)):
        origins.setdefault(keys[:depth], text)
    origins[keys] = text
    for below, _ in _walk(value, keys):
        origins[below] = f"{text}: {'.'.join(below)}"


def _stage_drafts(
    tree: dict[str, Any], origins: Origins, label: str, mistakes: list[str]
) -> dict[str, Draft]:
    """Of each stage of a study, the shared sections with its own merged over them."""
    stages = tree.pop("stages")
    if not isinstance(stages, dict) or not stages:
        raise InputError(f"{label}: stages: expected at least one stage by name")
    drafts = {}
    for stage, own in stages.items():
        own = {} if own is None else own
        where = f"{label}: stages.{stage}"
        if not isinstance(own, dict) or not PLAIN_NAME.fullmatch(stage):
            mistakes.append(f"{where}: expected a plain name and sections below it")
            continue
        if "name" in own or "folder" in (own.get("run") or {}):
            mistakes.append(f"{where}: has no name or folder but those the study gives it")
        of_stage = {
            keys[2:]: origin
            for keys, origin in origins.items()
            if keys[:2] == ("stages", stage) and len(keys) > 2
        }
        drafts[stage] = _merged(tree, own), {**origins, **of_stage}
    return drafts


def _student_drafts(
    tree: dict[str, Any], origins: Origins, path: Path, mistakes: list[str]
) -> dict[str, Draft]:
    """Of each student, the recipe it names with the sections of this file merged over it."""
    entries = tree.pop("students")
    where = origins[("students",)]
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{where}: expected a list of recipes, such as [S14, B14]")
    drafts: dict[str, Draft] = {}
    for entry in map(str, entries):
        beside = [path.parent / entry, path.parent / f"{entry}.yaml"]
        try:
            file = next(filter(Path.is_file, beside), None) or find_recipe(entry)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        name = file.stem
        under, under_origins = _read(file)
        under.pop("name", None)
        if {"stages", "students"} & under.keys():
            mistakes.append(f"{where}: {entry} is several recipes, expected one of one student")
        elif name in drafts or not PLAIN_NAME.fullmatch(name):
            mistakes.append(f"{where}: {entry}: expected a plain name, and each only once")
        else:
            drafts[name] = _merged(under, tree), under_origins | origins
    return drafts


def _build_several(
    key: Literal["stages", "students"],
    path: Path,
    tree: dict[str, Any],
    origins: Origins,
    drafts: dict[str, Draft],
    *,
    changes: Sequence[Change],
    mistakes: list[str],
) -> Study | Students | None:
    """The overrides applied to what the recipes share and to each; all of them checked."""
    place = f"{_label(path)}: "
    shared = [change for change in changes if change[0][0] != key]
    single: dict[str, list[Change]] = {name: [] for name in drafts}
    for keys, value, text in changes:
        if keys[0] != key:
            continue
        if len(keys) < 3 or keys[1] not in drafts:
            known = ", ".join(drafts)
            mistakes.append(f"{text}: expected {key}.NAME.section.key=value, NAME of {known}")
        elif keys[2:] in (("name",), ("run", "folder")):
            mistakes.append(f"{text}: follows from the name and run.folder of the whole recipe")
        else:
            single[keys[1]].append((keys[2:], value, text))
    for change in shared:
        _set(tree, origins, *change)
    name = tree.get("name") or path.stem
    run = check_run(tree.get("run", {}), origins, place, mistakes=mistakes)
    folder = run.folder.replace("{name}", name)
    if run.toy and not folder.endswith(SUFFIX):
        folder += SUFFIX
    built: dict[str, Recipe | None] = {}
    for part, (draft, draft_origins) in drafts.items():
        draft = _with_changes(
            (draft, draft_origins),
            (*shared, *single[part]),
            f"{place}{key}.{part}.",
            mistakes=mistakes,
            earlier=built if key == "stages" else None,
        )
        built[part] = check_recipe(
            {**draft, "name": f"{name}/{part}"},
            draft_origins,
            f"{place}{key}.{part}.",
            mistakes=mistakes,
            earlier=built if key == "stages" else None,
        )
    if key == "students" and not mistakes:
        part_origins = {part: draft_origins for part, (_, draft_origins) in drafts.items()}
        mistakes += check_students(built, part_origins, place)
    if mistakes:
        return None
    parts = {part: _in_folder(recipe, f"{folder}/{part}") for part, recipe in built.items()}
    run = run.model_copy(update={"folder": folder})
    return (Study if key == "stages" else Students)(name=name, run=run, **{key: parts})


def _in_folder(recipe: Recipe, folder: str) -> Recipe:
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"folder": folder})})


def _settings(recipe: Recipe) -> dict[str, Any]:
    values = dict(_walk(recipe.model_dump(mode="json")))
    # Where weights lie does not matter if their hash says which they are.
    hashed = {
        (*keys[:-1], "checkpoint") for keys in values if keys[-1] == "sha256" and values[keys]
    }
    return {
        ".".join(keys): value
        for keys, value in values.items()
        if not isinstance(value, dict)
        and not HARMLESS.fullmatch(".".join(keys))
        and keys not in hashed
    }
