"""Several runs that build on each other or learn together, and one table of what came out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from distill.checkpoint import latest_checkpoint, write_json
from distill.checks.recipe import STAGE
from distill.dist import joined_part
from distill.errors import InputError, StateError
from distill.recipe import Distill, Model, Recipe, Students, Study, Teacher
from distill.run.folder import SUMMARY, hold_folder
from distill.students.warmstart import file_sha256
from distill.train import train, train_together

BEGAN_FROM = "began_from.json"  # in a stage's folder: hashes of the weights of other stages


def run_study(study: Study) -> dict[str, Any]:
    """Run the stages in order, each in a folder below the study's, and write summary.json there.

    Finished stages only give their summary again. Raises what `train` raises, and StateError for
    a stage that began from weights that have been trained anew since.
    """
    folder = Path(study.run.folder)
    summaries: dict[str, dict[str, Any]] = {}
    with hold_folder(folder):
        for name, recipe in study.stages.items():
            _note_weights(recipe, study)
            summaries[name] = train(resolve_stages(recipe, study), Path(recipe.run.folder))
        summary = {"name": study.name, "rows": table_rows(summaries, study), "stages": summaries}
        if joined_part().index == 0:
            write_json(folder / SUMMARY, summary)
    return summary


def run_students(students: Students) -> dict[str, Any]:
    """Train the students together, each in a folder below theirs, and write summary.json there.

    Raises what `train` raises, and InputError where processes have joined.
    """
    if joined_part().count > 1:
        raise InputError(
            f"{students.name}: students learn together in one process; without torchrun, or train "
            f"each by its own recipe: {', '.join(students.students)}"
        )
    folder = Path(students.run.folder)
    recipes = list(students.students.values())
    with hold_folder(folder):
        summaries = train_together(recipes, [Path(recipe.run.folder) for recipe in recipes])
        by_name = dict(zip(students.students, summaries, strict=True))
        summary = {"name": students.name, "students": by_name}
        write_json(folder / SUMMARY, summary)
    return summary


def _note_weights(recipe: Recipe, study: Study) -> None:
    """Write down which weights of other stages a stage begins from, or check that it still does."""
    place = Path(recipe.run.folder)
    note = place / BEGAN_FROM
    weights = {
        stage: Path(study.stages[stage].run.folder) / "model.safetensors"
        for stage in sorted(stages_used(recipe))
    }
    hashes = {stage: file_sha256(path) for stage, path in weights.items() if path.exists()}
    has_begun = (place / SUMMARY).exists() or latest_checkpoint(place / "checkpoints")
    if has_begun and note.exists():
        before = json.loads(note.read_text(encoding="utf-8"))
        for stage, found in hashes.items():
            if before.get(stage) != found:
                raise StateError(
                    f"{place}: began from {study.stages[stage].run.folder}, which has been trained "
                    f"anew since; delete {place} to train it again"
                )
    elif hashes and joined_part().index == 0:
        place.mkdir(parents=True, exist_ok=True)
        write_json(note, hashes)


def resolve_stages(recipe: Recipe, study: Study) -> Recipe:
    """The recipe with `stage:NAME` turned into the file which that stage writes."""
    objective = recipe.objective
    if isinstance(objective, Distill):
        others = {name: _with_weights(other, study) for name, other in objective.others.items()}
        teachers = {"teacher": _with_weights(objective.teacher, study), "others": others}
        objective = objective.model_copy(update=teachers)
    model = _with_weights(recipe.model, study)
    return recipe.model_copy(update={"model": model, "objective": objective})


def stages_used(recipe: Recipe) -> set[str]:
    """Names of the stages whose weights a stage starts from or learns from."""
    sections = [recipe.model.weights]
    if isinstance(recipe.objective, Distill):
        sections += [teacher.weights for teacher in recipe.objective.teachers.values()]
    checkpoints = [weights.checkpoint for weights in sections if weights is not None]
    return {path.removeprefix(STAGE) for path in checkpoints if path.startswith(STAGE)}


def _with_weights(section: Model | Teacher, study: Study) -> Model | Teacher:
    weights = section.weights
    if weights is None or not weights.checkpoint.startswith(STAGE):
        return section
    stage = study.stages[weights.checkpoint.removeprefix(STAGE)]
    path = str(Path(stage.run.folder) / "model.safetensors")
    return section.model_copy(update={"weights": weights.model_copy(update={"checkpoint": path})})


def table_rows(
    summaries: Mapping[str, Mapping[str, Any]], study: Study | None = None
) -> list[dict[str, Any]]:
    """A row for each stage that was evaluated: its name, parameters, top-1, top-5 and seconds.

    The averaged weights of a stage that has them get a row of their own.

    Seconds are those of its evaluation, its training, and the training of every stage of `study`
    that it builds on.
    """
    rows = []
    for name, summary in summaries.items():
        evaluations = {name: summary["evaluation"]}
        if summary.get("ema"):
            evaluations[f"{name}, averaged"] = summary["ema"]["evaluation"]
        trained = {name} | (stages_before(name, study) if study else set())
        rows += [
            {
                "name": title,
                "parameters": summary["parameters"],
                "top1": evaluation["top1"],
                "top5": evaluation["top5"],
                "seconds": evaluation["seconds"]
                + sum(summaries[one]["train_seconds"] for one in trained),
            }
            for title, evaluation in evaluations.items()
            if evaluation
        ]
    return rows


def stages_before(name: str, study: Study) -> set[str]:
    """Names of all stages whose weights went into a stage's, directly or by way of others."""
    used = stages_used(study.stages[name])
    return used.union(*(stages_before(one, study) for one in used))


def results_table(rows: list[dict[str, Any]], *, title: str) -> Table:
    """The rows of `table_rows` for the console."""
    table = Table("", title=title, title_justify="left")
    for heading in ("parameters", "top-1 %", "top-5 %", "seconds"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['parameters']:,}",
            f"{row['top1']:.2f}",
            f"{row['top5']:.2f}",
            f"{row['seconds']:.0f}",
        )
    return table
