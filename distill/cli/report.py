"""`distill report`. What the command needs is imported inside it, as in cli.py."""

from pathlib import Path
from typing import Annotated

import typer

from distill.cli.shell import clean_exit, configure_log, say


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Run folders, finished or not; that of a study or of students stands for all "
            "runs in it.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Where the page goes; report.html in the folder given, or of several here.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write one HTML page about a run, or about several side by side.

    Results, curves, pictures and settings, all in a file that opens offline. Runs under way and
    folders with pieces missing show what is there.

        distill report runs/L14
        distill report runs/S14 runs/B14 --output both.html
    """
    with clean_exit():
        configure_log()
        from distill.log import size_text
        from distill.report.page import write_report

        path = write_report(runs, output)
        say(f"{path}: {size_text(path.stat().st_size)}; open it in any browser")
