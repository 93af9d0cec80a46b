"""The command line. What a command needs is imported inside it, so that --help is quick."""

import json
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import rich
import typer
from rich.console import Console
from rich.table import Table

from distill.errors import InputError, StateError

if TYPE_CHECKING:
    from distill.recipe import Recipe, Students, Study

EXIT_INPUT = 2  # as for a wrong option
EXAMPLE = "quickstart"

app = typer.Typer(
    help=(
        "Distil video foundation models: run the teacher once, keep what it says of every clip "
        "in a cache, and train small students from that as often as you like.\n\n"
        "A RECIPE is a YAML file, or the name of one that comes with the package. "
        "SECTION.KEY=VALUE after it replaces a setting: "
        "`distill train quickstart optim.lr=1e-3`"
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

RecipeArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or the name of a shipped one, such as quickstart or L14.",
        show_default=False,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SECTION.KEY=VALUE",
        help="Settings that replace the recipe's, in a study those of all its stages; "
        "stages.NAME.SECTION.KEY=VALUE replaces one stage's, students.NAME... one student's.",
        show_default=False,
    ),
]


@app.command()
def train(recipe: RecipeArgument = None, overrides: OverridesArgument = None) -> None:
    """Train what a recipe describes; a rerun goes on where the last one stopped.

    Distilling, finetuning, probing, training from scratch, a study of several such stages, or
    several students from one reading of a cache. The teacher's cache is made first where it is
    missing. Everything is written to run.folder. Ctrl-C saves and exits.
    """
    with _clean_exit():
        loaded = _load("train", recipe, overrides)
        from distill.recipe import Students, Study
        from distill.study import results_table, run_students, run_study, table_rows
        from distill.train import train as train_recipe

        rows = []
        if isinstance(loaded, Study):
            rows = run_study(loaded)["rows"]
        elif isinstance(loaded, Students):
            for name, summary in run_students(loaded)["students"].items():
                loss = f", loss {summary['last']['loss']:.4f}" if summary["last"] else ""
                _say(f"{name}: {summary['steps']:,} steps{loss}: {summary['weights']}")
        else:
            rows = table_rows({loaded.name: train_recipe(loaded, Path(loaded.run.folder))})
        if rows:
            rich.print(results_table(rows, title=loaded.name))
        _say(f"{loaded.run.folder}: done; summary.json holds the results")


@app.command()
def cache_teacher(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Only the list's first clips.", show_default=False),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Only the I-th of N equal parts of the work, such as 2/4; others may do the rest "
            "at the same time, on any machine.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run a recipe's teacher over its clips and keep what students learn from.

    Goes on where an earlier call stopped, and does nothing where all is there. With several GPUs:
    `torchrun --nproc-per-node 8 -m distill cache-teacher RECIPE`.
    """
    with _clean_exit():
        from distill.dist import num_ranks, read_part

        part = read_part(shard)
        if num_ranks() > 1:
            rich.reconfigure(force_terminal=False)  # several bars cannot share a screen
        loaded = _load("cache-teacher", recipe, overrides)
        from distill.cache.build import build_cache
        from distill.dist import use_own_gpu

        use_own_gpu()
        for name, stage in _stages(loaded, with_cache=True).items():
            for line in build_cache(_resolved(stage, loaded), limit=limit, part=part).lines():
                _say(line if name is None else f"{name}: {line}")


@app.command()
def evaluate(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The classifier's weights; those of the recipe's run when not given.",
            show_default=False,
        ),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The stage of a study.", show_default=False),
    ] = None,
) -> None:
    """Score a classifier on several views of every clip: top-1 and top-5.

    Which list and how many views is said in the recipe's evaluate section.
    """
    with _clean_exit():
        loaded = _load("evaluate", recipe, overrides, stage=stage)
        from distill.evaluate import evaluate_recipe

        one = _one_stage(loaded, stage)
        path = Path(checkpoint or Path(one.run.folder) / "model.safetensors")
        if not path.exists():
            raise InputError(f"{path}: no such file; train first, or give --checkpoint FILE")
        result = evaluate_recipe(one, path)
        table = Table("", "top-1 %", "top-5 %", "clips", title=str(path), title_justify="left")
        for label, suffix in (("all clips", ""), ("clips that could be read", "_of_read")):
            clips = result["num_clips"] - (result["num_missing"] if suffix else 0)
            scores = (f"{result[name + suffix]:.2f}" for name in ("top1", "top5"))
            table.add_row(label, *scores, f"{clips:,}")
        rich.print(table)


@app.command()
def plan(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    tflops: Annotated[
        float | None,
        typer.Option(min=1, help="What a device sustains, for the hours: 400.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a recipe will take before anything runs.

    Parameters, steps, learning rate, FLOPs, bytes, memory and hours. Needs neither the videos nor
    the weights.
    """
    with _clean_exit():
        loaded = _load("plan", recipe, overrides)
        from dataclasses import asdict

        from distill.plan import (
            SUSTAINED_TFLOPS,
            make_plan,
            plan_rows,
            plan_together,
            together_rows,
        )
        from distill.recipe import Students

        plans = {
            name: make_plan(stage, sustained_tflops=tflops or SUSTAINED_TFLOPS)
            for name, stage in _stages(loaded).items()
        }
        tables = [(made.name, plan_rows(made)) for made in plans.values()]
        whole = {name: asdict(made) for name, made in plans.items()}
        if isinstance(loaded, Students):
            together = plan_together(loaded.name, plans)
            tables.append((f"{loaded.name}, together", together_rows(together)))
            whole = {"students": whole, "together": asdict(together)}
        if as_json:
            _print_plain(json.dumps(whole.get(None, whole), indent=1))
            return
        for title, rows in tables:
            table = Table(show_header=False, title=title, title_justify="left")
            for row in rows:
                table.add_row(*row)
            rich.print(table)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors that complete and check YAML."""
    from distill.recipe_file import recipe_schema

    _print_plain(json.dumps(recipe_schema(), indent=1))


def main() -> None:
    """What `distill` and `python -m distill` run."""
    app()


def _load(
    verb: Literal["train", "cache-teacher", "evaluate", "plan"],
    name: str | None,
    overrides: list[str] | None,
    *,
    stage: str | None = None,
) -> "Recipe | Study | Students":
    """The recipe, once all that `verb` will read is there."""
    from distill import log
    from distill.recipe import Students
    from distill.recipe_check import missing_inputs
    from distill.recipe_file import load_recipe, shipped_recipes

    if name is None:
        raise InputError(
            f"name a recipe, as in: distill {verb} {EXAMPLE} "
            f"(shipped: {', '.join(shipped_recipes())})"
        )
    loaded = load_recipe(name, overrides or ())
    log.configure(logging.INFO)
    if verb == "plan":
        return loaded
    stages = _stages(loaded, with_cache=verb == "cache-teacher")
    if verb == "evaluate":
        stages = {stage: _one_stage(loaded, stage)}
    kind = "student" if isinstance(loaded, Students) else "stage"
    lines = [
        f"{name}: {line}"
        for part, one in stages.items()
        for line in missing_inputs(one, verb, **{kind: part})
    ]
    if lines:
        raise InputError("\n".join(dict.fromkeys(lines)))  # students miss the same list
    for demo in dict.fromkeys(one.data.demo for one in stages.values() if one.data.demo):
        from distill.data.demo import make_demo

        make_demo(demo)
    return loaded


def _stages(
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


def _one_stage(loaded: "Recipe | Study | Students", stage: str | None) -> "Recipe":
    stages = _stages(loaded)
    if stage not in stages:
        known = ", ".join(name for name in stages if name)
        problem = f"choose one with --stage: {known}" if known else "has no stages; leave --stage"
        raise InputError(f"{loaded.name}: {problem}")
    return stages[stage]


def _resolved(recipe: "Recipe", loaded: "Recipe | Study | Students") -> "Recipe":
    from distill.recipe import Study
    from distill.study import resolve_stages

    return resolve_stages(recipe, loaded) if isinstance(loaded, Study) else recipe


@contextmanager
def _clean_exit() -> Iterator[None]:
    """Errors of the person at the shell as lines; SIGTERM as an exception, so that workers end."""
    before = signal.signal(signal.SIGTERM, _terminate)
    from distill.students.warmstart import WeightsError

    try:
        yield
    except (InputError, StateError, WeightsError) as error:
        _print_plain(str(error), stderr=True)
        raise typer.Exit(EXIT_INPUT) from None
    except KeyboardInterrupt:
        _print_plain("Interrupted; the same command goes on from here.", stderr=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(signum: int, _: object) -> NoReturn:
    raise SystemExit(128 + signum)


def _say(text: str) -> None:
    rich.get_console().print(text, markup=False, highlight=False, soft_wrap=True)


def _print_plain(text: str, *, stderr: bool = False) -> None:
    """Exactly the text, whatever the width of the terminal."""
    console = Console(stderr=stderr)
    console.print(text, markup=False, highlight=False, soft_wrap=True, emoji=False)
