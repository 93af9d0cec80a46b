"""The command line. What a command needs is imported inside it, so that --help is quick."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich
import typer
from rich.table import Table

from distill.cli.cache import OverridesArgument, cache_app
from distill.cli.doctor import doctor
from distill.cli.report import report
from distill.cli.shell import (
    EXIT_INPUT,
    clean_exit,
    configure_log,
    load_inputs,
    missing_of,
    one_stage,
    print_plain,
    recipes_of,
    resolved_stage,
    say,
)
from distill.cli.use import add_use_commands
from distill.dist import adopt_slurm
from distill.errors import InputError

if TYPE_CHECKING:
    from distill.recipe import Recipe, Students, Study

app = typer.Typer(
    help=(
        "Distil video foundation models: run the teacher once, keep what it says of every clip "
        "in a cache, and train small students from that as often as you like.\n\n"
        "A RECIPE is a YAML file, or the name of one that comes with the package. "
        "SECTION.KEY=VALUE after it replaces a setting: "
        "`distill train quickstart optim.lr=1e-3`"
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

app.add_typer(cache_app, name="cache")
add_use_commands(app)

RecipeArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or the name of a shipped one, such as quickstart or L14.",
        show_default=False,
    ),
]


@app.command()
def train(recipe: RecipeArgument = None, overrides: OverridesArgument = None) -> None:
    """Train what a recipe describes; a rerun goes on where the last one stopped.

    Distilling, finetuning, probing, training from scratch, a study of several such stages, or
    several students from one reading of a cache. The teacher's cache is made first where it is
    missing. Everything is written to run.folder. Ctrl-C saves and exits.

        distill train quickstart
        distill train own data.folder=videos
        distill train L14 data.train.list=clips.csv data.train.prefix=videos optim.epochs=50
    """
    with clean_exit():
        from distill.dist import joined, use_own_gpu

        with joined() as part:
            if part.count > 1:
                use_own_gpu()
                rich.reconfigure(force_terminal=False)  # several bars cannot share a screen
            for line in _trained(load_inputs("train", recipe, overrides)):
                if part.index == 0:
                    rich.print(line) if isinstance(line, Table) else say(line)


def _trained(loaded: "Recipe | Study | Students") -> Iterator[str | Table]:
    """Train, and give what there is to say of it."""
    from distill.probe import sweep_table
    from distill.recipe import Students, Study
    from distill.study import results_table, run_students, run_study, table_rows
    from distill.train import train as train_recipe

    rows, summaries = [], {}
    if isinstance(loaded, Study):
        summary = run_study(loaded)
        rows, summaries = summary["rows"], summary["stages"]
    elif isinstance(loaded, Students):
        for name, summary in run_students(loaded)["students"].items():
            loss = f", loss {summary['last']['loss']:.4f}" if summary["last"] else ""
            yield f"{name}: {summary['steps']:,} steps{loss}: {summary['weights']}"
    else:
        summaries = {loaded.name: train_recipe(loaded, Path(loaded.run.folder))}
        rows = table_rows(summaries)
    for name, summary in summaries.items():
        if summary.get("sweep"):
            yield sweep_table(summary["sweep"], title=name)
    if rows:
        yield results_table(rows, title=loaded.name)
    yield f"{loaded.run.folder}: done; summary.json holds the results"


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

        distill cache-teacher L14 data.train.list=clips.csv --limit 100
        distill cache-teacher L14 --shard 2/8
    """
    with clean_exit():
        from distill.dist import num_ranks, read_part

        part = read_part(shard)
        if num_ranks() > 1:
            rich.reconfigure(force_terminal=False)  # several bars cannot share a screen
        loaded = load_inputs("cache-teacher", recipe, overrides)
        from distill.cache.build import build_cache
        from distill.dist import use_own_gpu

        use_own_gpu()
        for name, stage in recipes_of(loaded, with_cache=True).items():
            for line in build_cache(resolved_stage(stage, loaded), limit=limit, part=part).lines():
                say(line if name is None else f"{name}: {line}")


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
    folder: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Where results go; evaluate-SPLIT in run.folder when not given.",
            show_default=False,
        ),
    ] = None,
    scores: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Only the numbers again, from an evaluation's scores.safetensors.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B",
            help="Only compare two evaluations, by their folders or evaluation.json.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a classifier on several views of every clip: top-1, top-5, per class, and mAP.

    Which list and how many views is said in the recipe's evaluate section. Intervals are what
    1,000 bootstrap resamples of the clips give. With several processes, with the same result:
    `torchrun --nproc-per-node 8 -m distill evaluate RECIPE --checkpoint FILE`. Neither `--scores`
    nor `--compare` needs the recipe, the videos or the weights.

        distill evaluate k400/L14 --checkpoint FILE data.test.list=k400/test.csv
        distill evaluate own --stage finetuned data.folder=videos evaluate.split=val
        distill evaluate --compare runs/one runs/other
    """
    with clean_exit():
        if scores is not None or compare is not None:
            if recipe is not None or (scores is not None and compare is not None):
                raise InputError("give a RECIPE, --scores FILE or --compare A B: one of the three")
            configure_log()
            if compare is not None:
                _compare(*compare, as_json=as_json)
                return
            from distill.evaluation.metrics import RESAMPLES, measure
            from distill.evaluation.scores import read_evaluation

            result = measure(read_evaluation(Path(scores)), resamples=RESAMPLES)
            _show_result(result, title=scores, as_json=as_json)
            return
        from distill.dist import joined, num_ranks

        if num_ranks() > 1:
            rich.reconfigure(force_terminal=False)  # several bars cannot share a screen
        if as_json:
            rich.reconfigure(stderr=True)  # all but the result
        loaded = load_inputs("evaluate", recipe, overrides, stage=stage)
        from distill.dist import use_own_gpu
        from distill.evaluation.evaluate import evaluate_recipe

        one = one_stage(loaded, stage)
        path = Path(checkpoint or Path(one.run.folder) / "model.safetensors")
        if not path.exists():
            raise InputError(f"{path}: no such file; train first, or give --checkpoint FILE")
        use_own_gpu()
        with joined() as part:
            result = evaluate_recipe(one, path, folder=None if folder is None else Path(folder))
        if part.index == 0:
            _show_result(result, title=str(path), as_json=as_json)


app.command()(report)


def _show_result(result: dict, *, title: str, as_json: bool) -> None:
    from distill.evaluation.score_tables import result_table

    if as_json:
        print_plain(json.dumps(result, indent=1))
    else:
        rich.print(result_table(result, title=title))


def _compare(first: str, second: str, *, as_json: bool) -> None:
    from distill.evaluation.compare import compare
    from distill.evaluation.score_tables import comparison_tables, mcnemar_line

    found = compare(first, second)
    if as_json:
        print_plain(json.dumps(found.report(), indent=1))
        return
    for table in comparison_tables(found):
        rich.print(table)
    if found.differences is not None:
        say(mcnemar_line(found.differences))
    say(found.verdict)


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

    Parameters, steps, learning rate, FLOPs, bytes, memory and hours, and which of its inputs are
    missing. Needs neither the videos nor the weights.

        distill plan L14 objective.cache.codes=2bit
        distill plan SBL14 --tflops 300
    """
    with clean_exit():
        loaded = load_inputs("plan", recipe, overrides)
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
            for name, stage in recipes_of(loaded).items()
        }
        tables = [(made.name, plan_rows(made)) for made in plans.values()]
        missing = {
            name: missing_of(loaded, name, stage, verb="train")
            for name, stage in recipes_of(loaded).items()
        }
        whole = {name: {**asdict(made), "missing": missing[name]} for name, made in plans.items()}
        if isinstance(loaded, Students):
            together = plan_together(loaded.name, plans)
            tables.append((f"{loaded.name}, together", together_rows(together)))
            whole = {"students": whole, "together": asdict(together)}
        if as_json:
            print_plain(json.dumps(whole.get(None, whole), indent=1))
            return
        for title, rows in tables:
            table = Table(show_header=False, title=title, title_justify="left")
            for row in rows:
                table.add_row(*row)
            rich.print(table)
        lines = dict.fromkeys(line for part in missing.values() for line in part)
        if lines:
            print_plain("\n  ".join(["missing before it can train:", *lines]))


@app.command()
def zoo(
    overrides: OverridesArgument = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Rows of a data set, such as k400.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Rows of a model, such as L14.", show_default=False),
    ] = None,
    row: Annotated[
        str | None,
        typer.Option(
            metavar="ROW",
            help="All that is known of one row, such as k400/L14.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Load a released file into the model of --row and, with data.test.list=FILE, "
            "measure it with the row's views.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """The published model zoo: numbers, weights that can be had, and the recipe of each row.

    The numbers are those that InternVideo2's authors publish, and the files those that they offer
    on the Hugging Face hub.

        distill zoo --data k400
        distill zoo --row k400/L14
        distill zoo --check FILE --row k400/L14 data.test.list=k400/test.csv
    """
    with clean_exit():
        from distill.zoo import find_row, row_lines, select_rows, zoo_markdown, zoo_tables

        if as_markdown and (as_json or check is not None):
            other = "--json" if as_json else "--check"
            raise InputError(f"--markdown is for the table, not with {other}; drop one of them")
        if row is not None and (data is not None or model is not None):
            raise InputError("--row is one row already; drop --data and --model, or --row")
        if check is not None:
            if row is None:
                raise InputError("--check takes the row that the file should be of: add --row ROW")
            from distill.recipe_file import load_recipe
            from distill.zoo_check import check_lines, check_row

            configure_log()
            if as_json:
                rich.reconfigure(stderr=True)  # all but the result
            found = check_row(
                find_row(row), load_recipe(find_row(row).recipe, overrides or ()), check
            )
            lines = check_lines(found)
            print_plain(json.dumps(found, indent=1) if as_json else "\n".join(lines))
            return
        if overrides:
            raise InputError(f"{overrides[0]}: settings are for --check FILE --row ROW")
        rows = [find_row(row)] if row else select_rows(data=data, model=model)
        if as_json:
            print_plain(json.dumps([one.report() for one in rows], indent=1))
        elif as_markdown:
            print_plain(zoo_markdown(rows))
        elif row:
            print_plain("\n".join(row_lines(rows[0])))
        else:
            for table in zoo_tables(rows):
                rich.print(table)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors that complete and check YAML.

    Most editors take it as the schema of a YAML language server, and then complete the keys and
    underline what the command would refuse.

        distill schema > recipe.schema.json
    """
    from distill.recipe_file import recipe_schema

    print_plain(json.dumps(recipe_schema(), indent=1))


app.command()(doctor)


def main() -> None:
    """What `distill` and `python -m distill` run."""
    try:
        adopt_slurm()
    except InputError as error:
        print_plain(str(error), stderr=True)
        sys.exit(EXIT_INPUT)
    app()
