"""From runs to a page: one HTML file with its style, script, plots and pictures in it.

Text goes into the page through Jinja's escaping alone, and plots as JSON that no `<` is left in.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.evaluation.manifest import package_version
from distill.report.figures import Figure, comparison_figures
from distill.report.gather import RunFiles, find_runs, read_run
from distill.report.run_page import RunPart, count_text, duration, make_run, percent
from distill.run.provenance import changed_settings

PAGE_FILE = "report.html"
COLUMNS = {  # of the table of several runs
    "top1": "top-1",
    "interval": "95 % interval",
    "top5": "top-5",
    "loss": "last loss",
    "parameters": "parameters",
    "steps": "steps",
    "time": "training",
    "rate": "clips / s",
}
NOT_COMPARED = ("run.folder", "name")  # settings that always differ


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side; `settings` are those that differ, with a value for each run.

    `columns` are keys of the rows, with a heading, of which any row has something.
    """

    rows: list[dict[str, str]]
    columns: list[tuple[str, str]]
    figures: list[Figure]
    settings: list[tuple[str, list[str]]]


def write_report(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Write a page about the runs in these folders; returns where it is.

    By default that is in the folder given, or of several in the working directory. Raises
    InputError for a folder without a run, and where the page cannot be written.
    """
    folders = find_runs(paths)
    output = output or (paths[0] / PAGE_FILE if len(paths) == 1 else Path(PAGE_FILE))
    runs = [
        read_run(one, name=name) for one, name in zip(folders, short_names(folders), strict=True)
    ]
    title = paths[0].resolve().name if len(paths) == 1 else f"{len(runs)} runs"
    parts = [make_run(run) for run in runs]
    comparison = compare_runs(runs, parts) if len(runs) > 1 else None
    write_page(output, render("runs.html", title=title, runs=parts, comparison=comparison))
    return output


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the folders' paths, as many as tell them apart."""
    whole = [folder.resolve().parts for folder in folders]
    deepest = max(len(parts) for parts in whole)
    for count in range(1, deepest + 1):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(names):
            break
    return names


def compare_runs(runs: Sequence[RunFiles], parts: Sequence[RunPart]) -> Comparison:
    """Tables and curves of several runs."""
    rows = []
    for run, part in zip(runs, parts, strict=True):
        result = run.evaluations[0].result if run.evaluations else {}
        interval = result.get("confidence_intervals", {}).get("top1")
        last = run.summary.get("last") or (run.steps[-1] if run.steps else {})
        rates = sorted(line["clips_per_second"] for line in run.steps if "clips_per_second" in line)
        rows.append(
            {
                "name": run.name,
                "kind": part.kind,
                "status": part.status,
                "top1": percent(result["top1"]) if result else "",
                "interval": f"{interval[0]:.1f} to {interval[1]:.1f}" if interval else "",
                "top5": percent(result["top5"]) if result else "",
                "loss": f"{last['loss']:.4f}" if "loss" in last else "",
                "parameters": count_text(run.summary["parameters"])
                if run.summary.get("parameters")
                else "",
                "steps": f"{int(last_step(run)):,}" if run.steps else "",
                "time": duration(run.summary["train_seconds"])
                if run.summary.get("train_seconds")
                else "",
                "rate": f"{rates[len(rates) // 2]:.4g}" if rates else "",
            }
        )
    return Comparison(
        rows,
        [(key, text) for key, text in COLUMNS.items() if any(row[key] for row in rows)],
        comparison_figures([(run.name, run.lines) for run in runs]),
        differing_settings(runs),
    )


def last_step(run: RunFiles) -> float:
    """The last step that is told of."""
    return run.steps[-1]["step"]


def differing_settings(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Settings of the recipes that are not the same in all runs; empty text for the default."""
    settings = [changed_settings(run.recipe) if run.recipe else {} for run in runs]
    names = sorted(set().union(*settings) - set(NOT_COMPARED))
    rows = [(name, [str(own.get(name, "")) for own in settings]) for name in names]
    return [row for row in rows if len(set(row[1])) > 1]


def render(template: str, **values: Any) -> str:
    """A page from a template of this package."""
    import jinja2  # not at the top: neither is needed until there is a page
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plot"] = plot_json
    return environment.get_template(template).render(
        **values,
        version=package_version("distill-video"),
        style=_read("page.css"),
        script=_read("page.js"),
        plotly=get_plotlyjs(),
    )


def plot_json(figure: Figure) -> str:
    """A figure for a `<script type="application/json">`: nothing in it can end the element."""
    text = json.dumps({"data": figure["data"], "layout": figure["layout"]}, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _read(name: str) -> str:
    return (resources.files("distill.report") / "templates" / name).read_text(encoding="utf-8")


def write_page(path: Path, text: str) -> None:
    """Write a page; raises InputError where that cannot be."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{path}: a page is HTML; give it a name that ends in .html")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
