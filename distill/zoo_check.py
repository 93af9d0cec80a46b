"""A released file against its row of the zoo: does it fit, and does it reach its number?"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill import zoo
from distill.checks.recipe import missing_inputs
from distill.errors import InputError
from distill.evaluation.evaluate import evaluate_recipe
from distill.models import build_model
from distill.recipe import Classify, Recipe
from distill.students.warmstart import LoadReport, WeightsError, load_weights
from distill.zoo import Row

METRICS = {"top1": "top-1", "map": "mAP"}
# Published of whole videos, also where a list has intervals of them, and mAP as ActivityNet has it.
MEASURED = {"top1": "video_top1", "map": "video_map_interpolated"}


def check_file(row: Row, recipe: Recipe, checkpoint: str) -> LoadReport:
    """Load a file into the row's model: every tensor of the model from it, none of another shape.

    Raises WeightsError that says what does not fit, and which file would.
    """
    try:
        is_classifier = isinstance(recipe.objective, Classify)
        report = load_weights(
            build_model(recipe), checkpoint, head="keep" if is_classifier else "reset"
        )
        if report.resized:
            name = report.resized[0]
            raise WeightsError(
                f"{checkpoint}: made for another number of frames or pixels: {name} would have to "
                f"go from {report.details[name]}"
            )
    except WeightsError as error:
        raise WeightsError(f"{error}\n{row.recipe}: {_expected(row, recipe)}") from None
    return report


def _expected(row: Row, recipe: Recipe) -> str:
    views = recipe.data.views
    what = f"the weights of {row.model}, {views.frames} frames of {views.image_size} pixels"
    if isinstance(recipe.objective, Classify):
        what += f" with {recipe.objective.num_classes} classes"
    where = f", as in {row.link}" if row.link else ""
    return f"expected {what}{where}"


def check_row(row: Row, recipe: Recipe, checkpoint: str) -> dict[str, Any]:
    """Load the file, and evaluate it on the recipe's list where there is one; JSON values.

    The views are those of the row's recipe. Raises WeightsError for a file that does not fit.
    """
    report = check_file(row, recipe, checkpoint)
    found: dict[str, Any] = {
        "row": row.report(),
        "checkpoint": checkpoint,
        "loaded": report.lines(),
        "missing": [],
        "evaluation": None,
        "numbers": {},
        "differs": list(differences(row, recipe)),
    }
    if not isinstance(recipe.objective, Classify):
        return found
    split = recipe.evaluate.split
    clips = getattr(recipe.data, split)
    if clips is None or clips.list is None:
        source = f" ({clips.source})" if clips is not None and clips.source else ""
        found["missing"] = [f"data.{split}.list: not set{source}; set data.{split}.list=FILE"]
        return found
    missing = missing_inputs(recipe, "evaluate")
    if missing:
        raise InputError("\n".join(missing))
    folder = Path(recipe.run.folder) / f"check-{Path(checkpoint).stem}"
    result = evaluate_recipe(recipe, checkpoint, folder=folder)
    found["evaluation"] = result
    found["folder"] = str(folder)
    for key, name in MEASURED.items():
        if key == "top1" or row.map is not None:
            found["numbers"][key] = {
                "measured": result[name],
                "interval": result["confidence_intervals"][name],
                "published": getattr(row, key),
            }
    return found


def differences(row: Row, recipe: Recipe) -> Iterator[str]:
    """What the recipe at hand has otherwise than the row's own, of what bears on its number."""
    views, section = recipe.data.views, recipe.evaluate
    for key, here, published in (
        ("data.views.frames", views.frames, row.frames),
        ("evaluate.crops", section.crops, row.crops),
        ("evaluate.clips", section.clips, row.clips),
    ):
        if published is not None and here != published:
            yield f"{key}: {here}, published with {published}"
    clips = getattr(recipe.data, section.split)
    if clips is not None and clips.share < 1:
        yield f"data.{section.split}.share: {clips.share:g} of the list"
    if recipe.run.toy:
        yield "run.toy: a toy's model and pixels"


def check_lines(found: dict[str, Any]) -> list[str]:
    """What `check_row` found, for the terminal."""
    row = zoo.find_row(found["row"]["recipe"])
    lines = [*found["loaded"], f"{row.recipe}: the file fits"]
    for key, number in found["numbers"].items():
        low, high = number["interval"]
        text = f"{METRICS[key]}: measured {number['measured']:.2f} ({low:.2f} to {high:.2f})"
        published = number["published"]
        if published is None:
            lines.append(f"{text}, {zoo.ABSENT}")
            continue
        within = low <= published <= high
        gap = number["measured"] - published
        verdict = "within the interval" if within else "outside the interval"
        lines.append(f"{text}, published {published:.1f}: {gap:+.2f}, {verdict}")
    result = found["evaluation"]
    if result:
        unread = f", of which {result['num_missing']:,} could not be read and count as wrong"
        gone = unread if result["num_missing"] else ""
        lines.append(f"of {result['num_clips']:,} clips{gone}; details in {found['folder']}")
    lines += [f"unlike the published setting: {line}" for line in found["differs"]]
    lines += [f"not measured: {line}" for line in found["missing"]]
    return lines
