"""What a report says of a run: numbers, figures and pictures, ready for the template."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distill import log
from distill.evaluation.metrics import class_rows, confusion_matrix, merge_views
from distill.report import clips, figures
from distill.report.figures import Figure
from distill.report.gather import Evaluated, RunFiles
from distill.run.pictures import data_uri
from distill.run.watch import FOLDER as WATCHED_FOLDER
from distill.run.watch import ROWS

METRICS = {
    "top1": "Top-1",
    "top5": "Top-5",
    "mean_class_accuracy": "Mean class accuracy",
    "map": "mAP",
    "video_top1": "Top-1, of videos",
    "video_map_interpolated": "mAP of videos, interpolated as ActivityNet's",
}
CONFUSED_PAIRS = 10
SHOWN_QUARANTINED = 50


@dataclass
class EvaluationPart:
    """An evaluation on the page."""

    title: str
    rows: list[dict[str, str]]
    num_clips: int
    missing: list[tuple[str, str]]
    classes: Figure | None = None
    confusion: Figure | None = None
    pairs: list[tuple[str, str, int]] = field(default_factory=list)
    mistakes: list[clips.ShownClip] = field(default_factory=list)
    hardest: list[clips.ShownClip] = field(default_factory=list)


@dataclass
class RunPart:
    """A run on the page. `tiles` are its main numbers: value, what it is, and more about it."""

    name: str
    folder: str
    kind: str
    status: str
    is_finished: bool
    tiles: list[tuple[str, str, str]]
    evaluations: list[EvaluationPart]
    cosines: list[Figure]
    training: list[Figure]
    watched: list[dict[str, Any]]
    watched_rows: dict[str, str]
    sweep: list[dict[str, Any]]
    quarantined: list[dict[str, Any]]
    num_quarantined: int
    facts: list[tuple[str, list[tuple[str, str]]]]
    recipe_text: str
    notes: list[str]


def make_run(run: RunFiles) -> RunPart:
    """All that the page shows of a run; decodes the clips that it shows, where they are there."""
    notes = list(run.notes)
    evaluations = [_evaluation(one, run, notes) for one in run.evaluations]
    sweep = run.summary.get("sweep") or {}
    return RunPart(
        name=run.name,
        folder=str(run.folder),
        kind=_kind(run),
        status=_status(run),
        is_finished=bool(run.summary),
        tiles=_tiles(run),
        evaluations=evaluations,
        cosines=figures.cosine_figures(run.lines, run.watched),
        training=figures.training_figures(run.lines),
        watched=_watched(run),
        watched_rows=ROWS,
        sweep=[{**row, "chosen": row == sweep.get("chosen")} for row in sweep.get("settings", [])],
        quarantined=run.quarantined[:SHOWN_QUARANTINED],
        num_quarantined=len(run.quarantined),
        facts=_facts(run),
        recipe_text=run.recipe_text,
        notes=list(dict.fromkeys(notes)),
    )


def _kind(run: RunFiles) -> str:
    section = run.recipe.objective if run.recipe else None
    match run.kind:
        case "distill":
            return "distillation"
        case "classify" if section is None:
            return "classification"
        case "classify" if not run.recipe.optim.epochs:
            return "weights as they are"
        case "classify":
            probed = {"pool": "attentive probe", "head": "linear probe"}
            text = probed.get(section.trainable, "finetuning")
            return f"sweep of {text}s" if section.sweep else text
    return "evaluation" if run.evaluations else "run"


def _status(run: RunFiles) -> str:
    if run.summary:
        return "finished"
    if run.steps:
        return f"not finished: at step {int(run.steps[-1]['step']):,}"
    return "no steps yet" if run.recipe_text else "evaluated"


def percent(value: float) -> str:
    return f"{value:.2f} %"


def duration(seconds: float) -> str:
    """For people: 42 s, 12 min, 3.4 h, 5.1 days."""
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}" if unit < 3600 else f"{seconds / unit:.1f} {name}"
    return f"{seconds / 86400:.1f} days"


def _tiles(run: RunFiles) -> list[tuple[str, str, str]]:
    tiles = []
    for one in run.evaluations[:1]:
        intervals = one.result.get("confidence_intervals", {})
        for name in ("top1", "top5"):
            more = ""
            if name in intervals:
                low, high = intervals[name]
                more = f"{low:.1f} to {high:.1f}"
            tiles.append((percent(one.result[name]), f"{METRICS[name]}, {one.title}", more))
    steps = run.steps
    last = run.summary.get("last") or (steps[-1] if steps else {})
    if run.kind == "distill" and last:
        tiles.append(
            (f"{last['loss']:.4f}", "loss", f"at step {int(steps[-1]['step']):,}" if steps else "")
        )
        looks = [line for line in run.lines if "watched/layer_00_mean" in line]
        if looks:
            values = {
                key: [
                    value
                    for name, value in looks[-1].items()
                    if name.startswith("watched/") and name.endswith(key)
                ]
                for key in ("_mean", "_p05")
            }
            tiles.append(
                (
                    f"{np.mean(values['_mean']):.3f}",
                    "cosine with the teacher",
                    f"worst twentieth below {min(values['_p05']):.2f}",
                )
            )
    checks = [line for line in run.lines if "monitor/knn_top1" in line]
    if checks:
        text = f"nearest neighbours on val, epoch {int(checks[-1]['epoch']) + 1}"
        tiles.append((percent(checks[-1]["monitor/knn_top1"]), text, ""))
    if run.summary.get("parameters"):
        tiles.append((count_text(run.summary["parameters"]), "parameters", ""))
    if run.summary.get("train_seconds"):
        tiles.append(
            (
                duration(run.summary["train_seconds"]),
                "training",
                f"{run.summary.get('steps', 0):,} steps",
            )
        )
    rates = [line["clips_per_second"] for line in steps if "clips_per_second" in line]
    if rates:
        waits = [line["data_wait"] for line in steps if "data_wait" in line]
        more = f"{np.median(waits):.0%} waiting for data" if waits else ""
        tiles.append((f"{np.median(rates):.4g}", "clips / s", more))
    if run.summary.get("hit_rate") is not None:
        tiles.append((f"{run.summary['hit_rate']:.0%}", "read from the cache", ""))
    return tiles


def count_text(value: int) -> str:
    """For people: 432,586 as it is, 29.2 M, 1.04 B."""
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:,}"


def _evaluation(one: Evaluated, run: RunFiles, notes: list[str]) -> EvaluationPart:
    result = one.result
    intervals = result.get("confidence_intervals", {})
    has_videos = result.get("num_videos", 0) < result.get("num_clips", 0)
    rows = []
    for name, text in METRICS.items():
        if name not in result or (name.startswith("video_") and not has_videos):
            continue
        interval = intervals.get(name)
        rows.append(
            {
                "name": text,
                "value": percent(result[name]),
                "interval": f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else "",
                "read": percent(result[f"{name}_of_read"]) if result.get("num_missing") else "",
            }
        )
    reasons = result.get("unreadable", {})
    missing = [(name, reasons.get(name, "")) for name in result.get("missing", [])]
    part = EvaluationPart(one.title, rows, result.get("num_clips", 0), missing)
    if one.scores is not None:
        _add_answers(part, one, run, notes)
    return part


def _add_answers(part: EvaluationPart, one: Evaluated, run: RunFiles, notes: list[str]) -> None:
    num_classes = one.scores.manifest["question"]["classes"]
    answers = merge_views(one.scores.scores, one.scores.clips, num_classes=num_classes)
    names = class_texts(run.class_names, num_classes)
    counts = confusion_matrix(answers)
    part.classes = figures.class_figure(class_rows(answers), names)
    part.confusion = figures.confusion_figure(counts, names)
    part.pairs = confused_pairs(counts[:, :-1], names)
    split = one.scores.manifest["run"]["split"]
    listed = clips.listed_clips(run.recipe, split, notes)
    mistakes = clips.mistakes(answers)
    shown = {"recipe": run.recipe, "listed": listed, "names": names}
    part.mistakes = clips.show(mistakes, one.scores, answers, **shown)
    hardest = clips.hardest(answers, but=mistakes)
    part.hardest = clips.show(hardest, one.scores, answers, **shown)


def class_texts(names: Sequence[str] | None, count: int) -> list[str]:
    """What classes are called on the page: by their names, or by their numbers."""
    if names is not None and len(names) == count:
        return [str(name) for name in names]
    return [f"class {number}" for number in range(count)]


def confused_pairs(counts: np.ndarray, names: Sequence[str]) -> list[tuple[str, str, int]]:
    """Label, answer and how often, of counts [C,C], for the classes taken for others most."""
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSED_PAIRS]
    pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
    return [(names[i], names[j], int(wrong[i, j])) for i, j in pairs if wrong[i, j]]


def _watched(run: RunFiles) -> list[dict[str, Any]]:
    """The clips of the latest look that there are pictures of, the worst first."""
    found = []
    for number, clip in enumerate(run.watched.get("clips", [])):
        strips = {}
        for row in run.watched.get("rows", []):
            path = run.folder / WATCHED_FOLDER / f"{number}-{Path(row).name}.png"
            if path.exists():
                strips[row] = data_uri(path.read_bytes())
        if strips:
            found.append({**clip, "strips": strips})
    return sorted(found, key=lambda clip: clip["cosine"])


def _facts(run: RunFiles) -> list[tuple[str, list[tuple[str, str]]]]:
    """Tables about what was run and on what."""
    tables = []
    known, hardware = run.provenance, run.provenance.get("hardware", {})
    rows = [
        ("command", known.get("command")),
        ("started", known.get("started")),
        ("folder", str(run.folder)),
    ]
    if hardware:
        memory = hardware.get("memory_bytes")
        rows += [
            ("device", hardware.get("device")),
            ("processor", hardware.get("processor")),
            ("cores", hardware.get("cores")),
            ("processes", hardware.get("processes")),
            ("memory", log.size_text(memory) if memory else None),
        ]
    tables.append(("Run", rows))
    if run.recipe is not None and run.recipe.objective.kind == "distill":
        for name, teacher in run.recipe.objective.teachers.items():
            title = f"Teacher {name}".strip()
            tables.append((title, _flat(teacher.model_dump(mode="json", exclude_defaults=True))))
    cache = known.get("cache") or {}
    if cache.get("identity"):
        tables.append(("Cache", [("folder", cache.get("folder")), *_flat(cache["identity"])]))
    for one in run.evaluations:
        ran = one.result.get("manifest", {}).get("run", {})
        kept = ("list", "list_sha256", "weights", "weights_sha256", "device", "precision")
        tables.append((f"Evaluation: {one.title}", [(name, ran.get(name)) for name in kept]))
    if known.get("versions"):
        tables.append(("Versions", list(known["versions"].items())))
    return [
        (title, [(name, str(value)) for name, value in rows if value is not None])
        for title, rows in tables
    ]


def _flat(section: dict[str, Any], above: str = "") -> list[tuple[str, Any]]:
    rows = []
    for name, value in section.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{above}{name}.")
        else:
            rows.append((above + name, value))
    return rows
