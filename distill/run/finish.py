"""What a run leaves when its last step is done: weights, an evaluation, a summary."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from distill import recipe as schema
from distill.checkpoint import (
    EMA_FILE,
    WEIGHTS_FILE,
    load_checkpoint,
    step_folder,
    write_json,
    write_tensors,
)
from distill.dist import joined_part, wait_for_all
from distill.evaluation.evaluate import evaluate, score_views
from distill.job import Job, has_evaluation
from distill.probe import sweep_summary
from distill.run.folder import SUMMARY
from distill.run.interrupt import StopRequest
from distill.use.describe import describe_model

logger = logging.getLogger(__name__)


@dataclass
class Position:
    """Where a run stands: steps done in all and in this epoch, the last and the best values.

    Of clips that a hybrid run has `read`, `cached` came from the cache. `sweep` says how each
    setting of a sweep does, and `monitor` what a distillation's told last.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    read: int = 0
    cached: int = 0
    last: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    sweep: list[dict[str, float]] = field(default_factory=list)
    monitor: dict[str, float] = field(default_factory=dict)


def finish(
    recipe: schema.Recipe,
    job: Job,
    folder: Path,
    at: Position,
    *,
    models: Mapping[str, Callable[[], torch.nn.Module]],
    device: torch.device,
    stop: StopRequest,
) -> dict:
    """Write the final weights, evaluate a classifier with all its views, write the summary.

    Of a sweep they are those of the setting, and of the epoch, that did best on `val`. `models`
    gives the model and, where there are averaged weights, as `ema` that with them; its results
    are in the folder of that name. They are asked for one by one, as each may be a copy.
    """
    sweep = None
    if job.sweep:
        wait_for_all()  # for the first process to have saved
        best = load_checkpoint(step_folder(folder / "checkpoints", int(at.best["step"])))
        job.sweep.take(best.weights, int(at.best["setting"]))
        sweep = sweep_summary(job.sweep.settings, at.sweep, int(at.best["setting"]))
    is_first = joined_part().index == 0
    files = {"": folder / WEIGHTS_FILE, "ema": folder / EMA_FILE}
    num_parameters, evaluations = 0, {}
    for name, get_model in models.items():
        model = get_model().to(device)
        if is_first:
            write_tensors(files[name], model.state_dict(), metadata=describe_model(recipe))
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        evaluations[name] = _evaluate(
            recipe, job, model, folder=folder / name, weights=files[name], device=device, stop=stop
        )
        del model
    summary = {
        "name": recipe.name,
        "objective": recipe.objective.kind,
        "parameters": num_parameters,
        "epochs": recipe.optim.epochs,
        "steps": at.step,
        "train_seconds": at.seconds,
        "last": at.last,
        "best_on_val": at.best,
        "monitor": at.monitor or None,
        "quarantined": job.quarantine.num_counted if job.quarantine else 0,
        "hit_rate": at.cached / at.read if at.read else None,
        "evaluation": evaluations[""],
        "weights": str(folder / WEIGHTS_FILE),
        "ema": None,
        "sweep": sweep,
        "device": str(device),
    }
    if "ema" in models:
        summary["ema"] = {"evaluation": evaluations["ema"], "weights": str(files["ema"])}
    if at.best:
        best = step_folder(folder / "checkpoints", int(at.best["step"]))
        file = folder / WEIGHTS_FILE if job.sweep else best / WEIGHTS_FILE
        summary["best_on_val"] = {**at.best, "weights": str(file)}
    if job.quarantine and job.quarantine.num_counted:
        logger.warning(
            "%s: went on without %d clips that could not be read; %s says why",
            folder,
            job.quarantine.num_counted,
            folder / "quarantine.jsonl",
        )
    if is_first:
        write_json(folder / SUMMARY, summary)
    return summary


def _evaluate(
    recipe: schema.Recipe,
    job: Job,
    model: torch.nn.Module,
    *,
    folder: Path,
    weights: Path,
    device: torch.device,
    stop: StopRequest,
) -> dict | None:
    """The short form of a classifier's result with all its views, the rest written to `folder`."""
    if not isinstance(recipe.objective, schema.Classify) or not has_evaluation(recipe):
        return None
    section = recipe.evaluate
    views = (section.split, section.clips, section.crops)
    folder.mkdir(exist_ok=True)
    result = evaluate(
        model,
        recipe,
        split=section.split,
        num_clips=section.clips,
        num_crops=section.crops,
        device=device,
        folder=folder,
        weights=weights,
        score=job.scorers.get(views, score_views),
        on_batch=stop.check_alone,
    )
    long = ("missing", "incomplete", "unreadable", "manifest")  # they are in evaluation.json
    return {key: result[key] for key in result if key not in long}
