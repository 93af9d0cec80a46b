"""The commands of `distill cache`. What a command needs is imported inside it, as in cli.py."""

import json
from pathlib import Path
from typing import Annotated

import rich
import typer

from distill.cli.shell import (
    EXIT_INPUT,
    clean_exit,
    configure_log,
    print_plain,
    recipe_of_cache,
    say,
)
from distill.errors import InputError

cache_app = typer.Typer(help="Look into a view cache and check it.", no_args_is_help=True)

OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SECTION.KEY=VALUE",
        help="Settings that replace the recipe's, in a study those of all its stages; "
        "stages.NAME.SECTION.KEY=VALUE replaces one stage's, students.NAME... one student's.",
        show_default=False,
    ),
]
FolderArgument = Annotated[
    str, typer.Argument(metavar="FOLDER", help="A cache's folder, or its URL: s3://bucket/cache.")
]


@cache_app.command("inspect")
def inspect_cache(
    folder: FolderArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    sheet: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.png", help="Write some clips with their masks.", show_default=False
        ),
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.html",
            help="Write a page with plots and views, to be opened offline.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say what a cache holds: settings, sizes, and statistics of some of its records.

    Needs no recipe: a cache says itself what it is, down to the teacher's hash and the version of
    every rule that made its records.

        distill cache inspect caches/kmash-1B-stage2 --sheet sheet.png
        distill cache inspect caches/kmash-1B-stage2 --html cache.html
    """
    with clean_exit():
        configure_log()
        from distill.cache import inspect
        from distill.cache.sheet import write_sheet

        report = inspect.inspect_cache(folder)
        if sheet:
            write_sheet(folder, sheet)
        if html:
            from distill.report.cache_page import write_cache_page

            write_cache_page(report, Path(html))
        if as_json:
            print_plain(json.dumps(inspect.report_json(report), indent=1))
            return
        for part in inspect.report_lines(report):
            rich.print(part)
        if sheet:
            say(f"{sheet}: clips with their masks")
        if html:
            say(f"{html}: the same with plots and views; open it in any browser")


@cache_app.command("verify")
def verify_cache(
    folder: FolderArgument,
    overrides: OverridesArgument = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE", help="Also compare with what it asks for.", show_default=False
        ),
    ] = None,
    recompute: Annotated[
        int, typer.Option(min=0, help="Make so many records of the recipe again, and compare.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Which records are made again.")] = 0,
    delete_damaged: Annotated[
        bool,
        typer.Option("--delete-damaged", help="Delete damaged shards, to be made again."),
    ] = False,
) -> None:
    """Read all of a cache and compare every record with its checksum.

    Prints a line for each damaged file and for what a recipe asks for and is not there, and ends
    with exit code 2 where anything is wrong.

        distill cache verify caches/kmash-1B-stage2
        distill cache verify caches/kmash-1B-stage2 --recipe L14 --recompute 100
    """
    with clean_exit():
        configure_log()
        from distill.cache import inspect, verify
        from distill.cache import recompute as again

        one = recipe and recipe_of_cache(folder, recipe, overrides, reads_videos=recompute > 0)
        if one is None and (recompute or overrides):
            raise InputError("to make records again takes their recipe: give it by --recipe RECIPE")
        report = verify.verify_cache(folder, recipe=one, delete_damaged=delete_damaged)
        for line in report.lines():
            say(line)
        problems = report.problems
        if recompute and not problems:
            found = again.recompute(inspect.open_any(folder), one, recompute, seed=seed)
            rich.print(again.recompute_table(found))
            for line in again.recompute_lines(found):
                say(line)
            problems = found.problems
        if problems:
            print_plain("\n".join(problems), stderr=True)
            raise typer.Exit(EXIT_INPUT)
