"""From a recipe file and overrides to a checked `Recipe` or `Study`.

Strict: every key must be known, every mistake is reported at once, and each message names the
file and the dotted path (or the override) that is to be put right.
"""

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from distill.errors import InputError
from distill.recipe import Recipe, Study
from distill.recipe_check import Keys, Origins, check_recipe, check_run, nearest

Change = tuple[Keys, Any, str]  # an override: keys, value and the text it was given as

PATH_KEYS = ("checkpoint", "folder", "list", "prefix")
# Settings that may differ between a run and its resume: they say where and how often, not what.
HARMLESS = re.compile(
    r"name|run\.(folder|save_minutes|keep_checkpoints|log_steps)|data\.(workers|"
    r"decode_timeout_seconds)|data\.(train|val|test)\.(prefix|num_clips)|.*\.source|"
    r"objective\.cache\.(folder|shard_mb|shard_minutes)"
)


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe | Study:
    """Read a recipe: its bases merged under it, `section.key=value` overrides on top.

    `./x` and `../x` in a file are relative to that file, other paths and those of overrides to
    the working directory. In a study, an override that names no stage holds for all of them.
    Raises InputError with a line for each mistake.
    """
    path = find_recipe(path_or_name)
    tree, origins = _read(path)
    changes = [_parse_override(text) for text in overrides]
    mistakes: list[str] = []
    if "stages" in tree:
        recipe = _build_study(path, tree, origins, changes, mistakes)
    else:
        for keys, value, text in changes:
            _set(tree, origins, keys, value, text)
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
    """Name and path of every recipe that comes with the package."""
    folder = Path(str(resources.files("distill.recipes")))
    files = sorted(folder.rglob("*.yaml"))
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
    whole = {**schema, "properties": {**schema["properties"], "base": {"type": "string"}}}
    definitions = {**schema.pop("$defs"), "Stage": schema}
    whole["properties"]["stages"] = {
        "type": "object",
        "additionalProperties": {"$ref": "#/$defs/Stage"},
        "description": Study.__doc__,
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


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, keys are names and none is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, ((key, _), name) in enumerate(zip(node.value, names, strict=True)):
            if not isinstance(name, str):
                problem = f"{key.value!r} is read as {name!r}, but a key must be a name"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if name in names[:place]:
                problem = f"{name!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _parse(text: str, label: str) -> Any:
    loader = _Loader(text)
    try:
        return _whole(loader.get_single_data())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{label}{line}: not valid YAML: {problem}") from error
    finally:
        loader.dispose()


def _whole(value: Any) -> Any:
    """1.1e6 may stand where a whole number is wanted."""
    if isinstance(value, dict):
        return {key: _whole(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_whole(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _read(path: Path, *, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], Origins]:
    label = _label(path)
    if path.resolve() in above:
        raise InputError(f"{label}: base: is its own base, by way of {_label(above[-1])}")
    try:
        tree = _parse(path.read_text(encoding="utf-8"), label)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{label}: cannot be read as a text file: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{label}: expected sections such as 'model:' and 'optim:'")
    base = tree.pop("base", None)
    tree = _anchored(tree, path.parent)
    origins = {keys: f"{label}: {'.'.join(keys)}" for keys, _ in _walk(tree)}
    if base is None:
        return tree, origins
    below = path.parent / str(base)
    if not below.is_file():
        raise InputError(f"{label}: base: {_label(below)}: no such file")
    base_tree, base_origins = _read(below, above=(*above, path.resolve()))
    base_tree.pop("name", None)  # or two recipes would share a run folder
    return _merged(base_tree, tree), base_origins | origins


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
    value = _anchored(_parse(value, text), Path())
    return keys, _anchor(value, Path()) if keys[-1] in PATH_KEYS else value, text


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


def _build_study(
    path: Path,
    tree: dict[str, Any],
    origins: Origins,
    changes: Sequence[Change],
    mistakes: list[str],
) -> Study | None:
    label = _label(path)
    stages = tree.pop("stages")
    if not isinstance(stages, dict) or not stages:
        raise InputError(f"{label}: stages: expected at least one stage by name")
    shared = [change for change in changes if change[0][0] != "stages"]
    single = [change for change in changes if change[0][0] == "stages"]
    for keys, _, text in single:
        if len(keys) < 3 or keys[1] not in stages:
            known = ", ".join(stages)
            mistakes.append(f"{text}: expected stages.NAME.section.key=value, NAME of {known}")
    for change in shared:
        _set(tree, origins, *change)
    name = tree.pop("name", None) or path.stem
    run = check_run(tree.get("run", {}), origins, f"{label}: ", mistakes=mistakes)
    folder = run.folder.replace("{name}", name)
    built: dict[str, Recipe | None] = {}
    for stage, own in stages.items():
        own = {} if own is None else own
        where = f"{label}: stages.{stage}"
        if not isinstance(own, dict) or not re.fullmatch(r"[\w-]+", stage):
            mistakes.append(f"{where}: expected a plain name and sections below it")
            continue
        if "name" in own or "folder" in (own.get("run") or {}):
            mistakes.append(f"{where}: has no name or folder but those the study gives it")
        draft = {**_merged(tree, own), "name": f"{name}/{stage}"}
        draft_origins = dict(origins)
        for keys, origin in origins.items():
            if keys[:2] == ("stages", stage):
                draft_origins[keys[2:]] = origin
        for change in shared:
            _set(draft, draft_origins, *change)
        for keys, value, text in single:
            if keys[1] == stage:
                _set(draft, draft_origins, keys[2:], value, text)
        built[stage] = check_recipe(
            draft, draft_origins, f"{label}: stages.{stage}.", mistakes=mistakes, earlier=built
        )
    if mistakes:
        return None
    stages = {stage: _in_folder(recipe, f"{folder}/{stage}") for stage, recipe in built.items()}
    return Study(name=name, run=run.model_copy(update={"folder": folder}), stages=stages)


def _in_folder(recipe: Recipe, folder: str) -> Recipe:
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"folder": folder})})


def _settings(recipe: Recipe) -> dict[str, Any]:
    leaves = _walk(recipe.model_dump(mode="json"))
    return {
        ".".join(keys): value
        for keys, value in leaves
        if not isinstance(value, dict) and not HARMLESS.fullmatch(".".join(keys))
    }
