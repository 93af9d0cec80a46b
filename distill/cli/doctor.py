"""`distill doctor`. What it needs is imported inside it, as in cli.py."""

import json
from pathlib import Path
from typing import Annotated

import rich
import typer
from rich.table import Table

from distill.cli.shell import print_plain

EXIT_BROKEN = 1
MARKS = {"fine": "[green]fine[/]", "note": "[yellow]note[/]", "broken": "[red]broken[/]"}


def doctor(
    folder: Annotated[
        str,
        typer.Argument(metavar="FOLDER", help="Whose disk is measured: where runs or a cache lie."),
    ] = ".",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at the machine: versions, GPU, kernels, decoders, disk, and what mends what is missing.

    Everything is tried: a video is written and decoded, a file written and read, a process group
    started. Ends with exit code 1 if something is broken that work needs.

        distill doctor
        distill doctor /mnt/caches --json
    """
    from distill.doctor import examine

    found = []
    table = Table("", "", "found", "what to do", title="distill doctor", title_justify="left")
    for finding in examine(Path(folder)):
        found.append(finding)
        table.add_row(finding.name, MARKS[finding.state], finding.found, finding.mend)
    broken = [finding.name for finding in found if finding.state == "broken"]
    if as_json:
        values = {"broken": broken, "findings": [vars(finding) for finding in found]}
        print_plain(json.dumps(values, indent=1))
    else:
        rich.print(table)
        print_plain(f"broken: {', '.join(broken)}" if broken else "nothing is broken")
    if broken:
        raise typer.Exit(EXIT_BROKEN)
