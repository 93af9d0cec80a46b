"""What a run has left in its folder, read with allowance for what is not there (yet)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.data.workers import parse_entries
from distill.errors import InputError
from distill.evaluation.scores import RESULT_FILE, SCORES_FILE, Evaluation, read_evaluation
from distill.recipe import Recipe
from distill.recipe_file import load_recipe
from distill.run.folder import RECIPE, SUMMARY
from distill.run.provenance import FILE as PROVENANCE_FILE
from distill.run.watch import FILE as WATCHED_FILE
from distill.run.watch import FOLDER as WATCHED_FOLDER

METRICS_FILE = "metrics.jsonl"
MARKS = (RECIPE, METRICS_FILE, RESULT_FILE)  # any of them makes a folder that of a run


@dataclass(frozen=True)
class Evaluated:
    """An evaluation's result, and the scores that it came from, where they are there."""

    title: str
    folder: Path
    result: dict[str, Any]
    scores: Evaluation | None


@dataclass(frozen=True)
class RunFiles:
    """A run as its folder tells it; `notes` are lines about what is missing or unreadable."""

    name: str
    folder: Path
    recipe: Recipe | None
    recipe_text: str
    summary: dict[str, Any]
    lines: list[dict[str, float]]
    provenance: dict[str, Any]
    watched: dict[str, Any]
    evaluations: list[Evaluated]
    quarantined: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> list[dict[str, float]]:
        """Lines about training steps."""
        return [line for line in self.lines if "loss" in line]

    @property
    def kind(self) -> str | None:
        """`distill`, `classify`, or None where that is not known."""
        return self.recipe.objective.kind if self.recipe else self.summary.get("objective")

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names in the order of labels, where the recipe has them."""
        return getattr(self.recipe.objective, "class_names", None) if self.recipe else None


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Folders of runs: those given and, of a study or of students together, the ones below.

    Raises InputError for a path that is neither.
    """
    found = []
    for path in paths:
        if not path.is_dir():
            raise InputError(f"{path}: no such folder; give the run.folder of a recipe")
        own = [path] if _is_run(path) else _below(path)
        if not own:
            raise InputError(
                f"{path}: no run there, nor in the folders in it: no {', '.join(MARKS)}; give the "
                "run.folder of a recipe"
            )
        found += own
    return list(dict.fromkeys(found))


def _is_run(path: Path) -> bool:
    return any((path / mark).exists() for mark in MARKS)


def _below(path: Path) -> list[Path]:
    """Runs in a folder's folders: in the order of its summary, or in which they were started."""
    summary = _read_json(path / SUMMARY, [])
    order = [*summary.get("stages", {}), *summary.get("students", {})]
    runs = [one for one in path.iterdir() if one.is_dir() and _is_run(one)]

    def place(run: Path) -> tuple[int, str, str]:
        listed = order.index(run.name) if run.name in order else len(order)
        return listed, _read_json(run / PROVENANCE_FILE, []).get("started", ""), run.name

    return sorted(runs, key=place)


def read_run(folder: Path, *, name: str) -> RunFiles:
    """Read a run's folder; what cannot be read is left out, with a line that says so."""
    notes: list[str] = []
    path = folder / RECIPE
    recipe, text = None, ""
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            recipe = load_recipe(path)
        except InputError as error:
            notes.append(f"The recipe is not one that this version reads: {error}")
    return RunFiles(
        name=name,
        folder=folder,
        recipe=recipe,
        recipe_text=text,
        summary=_read_json(folder / SUMMARY, notes),
        lines=_read_lines(folder / METRICS_FILE, notes),
        provenance=_read_json(folder / PROVENANCE_FILE, notes),
        watched=_read_json(folder / WATCHED_FOLDER / WATCHED_FILE, notes),
        evaluations=_evaluations(folder, notes),
        quarantined=_quarantined(folder, notes),
        notes=notes,
    )


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    """An object in a file; empty where there is none, with a note where it is something else."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return {}
    if not isinstance(found, dict):
        notes.append(f"{path.name} cannot be read: it holds no object")
        return {}
    return found


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, float]]:
    if not path.exists():
        return []
    found, bad = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            one = json.loads(line)
        except ValueError:
            bad += 1  # a run under way may be in the middle of its last one
            continue
        if isinstance(one, dict) and "step" in one:
            found.append(one)
    if bad > 1:
        notes.append(f"{path.name}: {bad} lines cannot be read and are left out")
    return found


def _evaluations(folder: Path, notes: list[str]) -> list[Evaluated]:
    """Those of the run's end, of its averaged weights, and of `distill evaluate` afterwards."""
    places = {
        "": folder,
        ", averaged weights": folder / "ema",
        **{f", {one.name}": one for one in sorted(folder.glob("evaluate-*"))},
    }
    found = []
    for title, place in places.items():
        result = _read_json(place / RESULT_FILE, notes)
        if "top1" not in result:
            continue
        scores = None
        if (place / SCORES_FILE).exists():
            try:
                scores = read_evaluation(place / SCORES_FILE)
            except InputError as error:
                notes.append(str(error))
        views = f"{result.get('clips', 1)} x {result.get('crops', 1)} views"
        split = f"{result.get('split', 'evaluation')}, {views}{title}"
        found.append(Evaluated(split, place, result, scores))
    return found


def _quarantined(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for path in sorted(folder.glob("quarantine*.jsonl")):
        try:
            for entry in parse_entries(path.read_bytes(), where=str(path)):
                found.setdefault(entry["id"], entry)
        except InputError as error:
            notes.append(str(error))
    return list(found.values())
