"""What all commands share: a recipe by its name, and errors as lines with an exit code."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, NoReturn

import rich
import typer
from rich.console import Console

from distill.dist import joined_part, read_part, speaker, wait_for_all
from distill.errors import InputError, StateError
from distill.run.interrupt import ENDINGS

if TYPE_CHECKING:
    from distill.recipe import Recipe, Students, Study

EXIT_INPUT = 2  # as for a wrong option
EXAMPLE = "quickstart"


def load_inputs(
    verb: Literal["train", "cache-teacher", "evaluate", "plan"],
    name: str | None,
    overrides: list[str] | None,
    *,
    stage: str | None = None,
) -> "Recipe | Study | Students":
    """The recipe, once all that `verb` will read is there; raises InputError otherwise."""
    from distill.recipe_file import load_recipe, shipped_recipes

    if name is None:
        raise InputError(
            f"name a recipe, as in: distill {verb} {EXAMPLE} "
            f"(shipped: {', '.join(shipped_recipes())})"
        )
    loaded = load_recipe(name, overrides or ())
    # Processes that train or evaluate together have the same news, parts of a cache their own.
    configure_log(only_first=verb in ("train", "evaluate"))
    if verb == "plan":
        return loaded
    stages = recipes_of(loaded, with_cache=verb == "cache-teacher")
    if verb == "evaluate":
        stages = {stage: one_stage(loaded, stage)}
    is_first = joined_part().index == 0  # who makes what is missing; the others wait for it
    for toy in [one for one in stages.values() if verb == "train" and one.run.toy and is_first]:
        from distill.toy import make_toy_weights

        make_toy_weights(toy)
    wait_for_all()
    lines = [
        f"{name}: {line}"
        for part, one in stages.items()
        for line in missing_of(loaded, part, one, verb=verb)
    ]
    if lines:
        raise InputError("\n".join(dict.fromkeys(lines)))  # students miss the same list
    demos = dict.fromkeys(one.data.demo for one in stages.values() if one.data.demo and is_first)
    for demo in demos:
        from distill.data.demo import make_demo

        make_demo(demo)
    wait_for_all()
    return loaded


def missing_of(
    loaded: "Recipe | Study | Students",
    part: str | None,
    recipe: "Recipe",
    *,
    verb: Literal["train", "cache-teacher", "evaluate"],
) -> list[str]:
    """What `verb` would read of a stage or student of a recipe and is not there, line by line."""
    from distill.checks.recipe import missing_inputs
    from distill.recipe import Students

    kind = "student" if isinstance(loaded, Students) else "stage"
    return missing_inputs(recipe, verb, **{kind: part})


def recipe_of_cache(
    folder: str, name: str, overrides: list[str] | None, *, reads_videos: bool
) -> "Recipe":
    """The recipe of a cache, in a study the stage whose cache that is.

    With `reads_videos`, once all that making its records again takes is there.
    """
    from distill.cache.store import open_folder
    from distill.checks.recipe import missing_inputs
    from distill.recipe_file import load_recipe

    loaded = load_recipe(name, overrides or ())
    found = recipes_of(loaded, with_cache=True)
    if len(found) > 1:
        where = open_folder(folder).url
        found = {
            stage: one
            for stage, one in found.items()
            if open_folder(one.objective.cache.folder).url == where
        }
    if not found:
        raise InputError(f"{name}: no stage has its cache in {folder}; set objective.cache.folder")
    stage, one = next(iter(found.items()))
    lines = missing_inputs(one, "cache-teacher", stage=stage) if reads_videos else []
    if lines:
        raise InputError("\n".join(f"{name}: {line}" for line in lines))
    return resolved_stage(one, loaded)


def configure_log(*, only_first: bool = False) -> None:
    """Show what the package logs, and of several processes who says it.

    With `only_first` the others' warnings and errors alone.
    """
    from distill import log

    part = read_part(None)
    level = logging.WARNING if only_first and part.index else logging.INFO
    log.configure(level, speaker=speaker())


def recipes_of(
    loaded: "Recipe | Study | Students", *, with_cache: bool = False
) -> "dict[str | None, Recipe]":
    """The recipes by stage or student, or the one recipe under None.

    `with_cache` leaves those that have one; all students have the same.
    """
    from distill.recipe import Distill, Students, Study

    if isinstance(loaded, Students):
        return {None: next(iter(loaded.students.values()))} if with_cache else loaded.students
    if not isinstance(loaded, Study):
        return {None: loaded}
    return {
        name: recipe
        for name, recipe in loaded.stages.items()
        if not with_cache or (isinstance(recipe.objective, Distill) and recipe.objective.cache)
    }


def one_stage(loaded: "Recipe | Study | Students", stage: str | None) -> "Recipe":
    """The stage of this name, or the recipe where there are none; raises InputError otherwise."""
    stages = recipes_of(loaded)
    if stage not in stages:
        known = ", ".join(name for name in stages if name)
        problem = f"choose one with --stage: {known}" if known else "has no stages; leave --stage"
        raise InputError(f"{loaded.name}: {problem}")
    return stages[stage]


def resolved_stage(recipe: "Recipe", loaded: "Recipe | Study | Students") -> "Recipe":
    """A stage with the files of its study's other stages in place of their names."""
    from distill.recipe import Study
    from distill.study import resolve_stages

    return resolve_stages(recipe, loaded) if isinstance(loaded, Study) else recipe


@contextmanager
def clean_exit() -> Iterator[None]:
    """Errors of the person at the shell as lines; a scheduler's signal as an exception.

    So workers end with it, and the exit code is that of SIGTERM.
    """
    before = {signum: signal.signal(signum, _terminate) for signum in ENDINGS}
    from distill.students.warmstart import WeightsError

    try:
        yield
    except (InputError, StateError, WeightsError) as error:
        print_plain(f"{speaker()}{error}", stderr=True)
        raise typer.Exit(EXIT_INPUT) from None
    except KeyboardInterrupt:
        print_plain("Interrupted; the same command goes on from here.", stderr=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def say(text: str) -> None:
    """Write a line of results."""
    rich.get_console().print(text, markup=False, highlight=False, soft_wrap=True)


def print_plain(text: str, *, stderr: bool = False) -> None:
    """Exactly the text, whatever the width of the terminal."""
    console = Console(stderr=stderr)
    console.print(text, markup=False, highlight=False, soft_wrap=True, emoji=False)
