"""Every view of every clip through a classifier, by one process or by all those of a torchrun.

Batches of views are cut at fixed places of the list and dealt out whole, so every view is scored
once, by the same arithmetic however many processes there are, and none is padded.
"""

import csv
import io
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from distill import dist, log
from distill import recipe as schema
from distill.checkpoint import write_json, write_text
from distill.data.index import Clip, read_list
from distill.data.load import ClipLoader, Task, View, collate, load_eval_task
from distill.dist import WHOLE, Part
from distill.engines.plain import autocast, pick_device, to_device
from distill.errors import InputError, StateError
from distill.evaluation.manifest import make_manifest
from distill.evaluation.metrics import RESAMPLES, class_rows, confusion_matrix, measure, merge_views
from distill.evaluation.scores import (
    RESULT_FILE,
    SCORES_FILE,
    Evaluation,
    Scores,
    hash_pixels,
    in_order,
    join,
    write_evaluation,
)
from distill.kernel_choice import using_kernels
from distill.models import build_classifier
from distill.students.warmstart import load_weights

logger = logging.getLogger(__name__)


class Unreadable:
    """What a loader could not read: the reason by clip id.

    Unlike a quarantine it keeps no view of a clip from being tried: which ones a damaged file
    loses must not depend on the order in which workers, or processes, come to them.
    """

    def __init__(self) -> None:
        self.reasons: dict[int, str] = {}

    def __contains__(self, clip: Clip) -> bool:
        return False

    def add(self, clip: Clip, reason: str) -> None:
        """Record why a view of the clip cannot be had; of several reasons one that is fixed."""
        self.reasons[clip.id] = min(reason, self.reasons.get(clip.id, reason))


@dataclass(frozen=True)
class Share:
    """What one process has seen: scores, how many views each decoder read, what is unreadable."""

    scores: Scores
    decoders: Counter[str]
    unreadable: dict[int, str]


def score_views(
    model: nn.Module,
    clips: Sequence[Clip],
    *,
    data: schema.Data,
    num_classes: int,
    num_clips: int,
    num_crops: int,
    batch_size: int,
    precision: str,
    device: torch.device,
    part: Part = WHOLE,
    title: str = "evaluate",
    on_batch: Callable[[], None] = lambda: None,
) -> Share:
    """Run `model` on a part of the `num_clips` x `num_crops` views of every clip.

    `on_batch` is called after every batch and may raise to stop. Raises StateError naming the
    clip for which the model's scores are not finite.
    """
    unreadable = Unreadable()
    loader = ClipLoader(
        partial(load_eval_task, views=data.views, num_clips=num_clips, num_crops=num_crops),
        workers=data.workers,
        timeout_seconds=data.decode_timeout_seconds,
        quarantine=unreadable,
    )
    tasks = [
        Task(clip, clip_index=clip_index, crop_index=crop_index)
        for clip in clips
        for clip_index in range(num_clips)
        for crop_index in range(num_crops)
    ]
    batches = list(_batches(tasks, batch_size))[part.index :: part.count]
    rows: list[list[int]] = []
    logits = [torch.empty(0, num_classes)]
    decoders: Counter[str] = Counter()
    title += f", {part}" if part.count > 1 else ""
    was_training = model.training
    model.eval()
    try:
        with log.progress(title, total=sum(map(len, batches)), unit="views") as bar:
            for asked, items in zip(batches, loader.run(batches), strict=True):
                if items:
                    pixels = to_device(collate(items), device)["pixels"]
                    with torch.inference_mode(), autocast(device, precision):
                        logits.append(model(pixels).float().cpu())  # [B,C]
                    _check_finite(logits[-1], items)
                    rows += [
                        [task.clip.id, task.clip_index, task.crop_index, hash_pixels(view.pixels)]
                        for task, view in items
                    ]
                    decoders.update(view.decoder for _, view in items)
                bar.advance(len(asked))
                on_batch()
    finally:
        model.train(was_training)
    table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)
    columns = (column.clone() for column in table.T)
    return Share(Scores(*columns, torch.cat(logits)), decoders, unreadable.reasons)


def _check_finite(logits: Tensor, items: Sequence[tuple[Task, View]]) -> None:
    is_sound = logits.isfinite().all(dim=1)
    if not bool(is_sound.all()):
        name = items[int(is_sound.int().argmin())][0].clip.name
        raise StateError(f"evaluation: the model's scores of {name} are not finite")


def evaluate(
    model: nn.Module,
    recipe: schema.Recipe,
    *,
    split: str,
    num_clips: int,
    num_crops: int,
    device: torch.device,
    folder: Path | None = None,
    weights: str | Path | None = None,
    score: Callable[..., Share] = score_views,
    on_batch: Callable[[], None] = lambda: None,
) -> dict:
    """Evaluate on one of the recipe's lists; returns what `metrics.measure` does.

    With a `folder`, confidence intervals are added and the result is written to its
    evaluation.json, every view's logits to scores.safetensors, and tables of classes to
    classes.csv and confusion.csv. `weights` is the model's file, for its hash, and `score` what
    scores the views, called as `score_views` is. Where processes of a torchrun have joined
    (`distill.dist.joined`), each takes its part of the views, the first writes, and all return
    the same. Raises StateError when no clip could be read.
    """
    started = time.monotonic()
    clips = labelled_clips(recipe, split)
    part = dist.joined_part()
    share = score(
        model,
        clips,
        data=recipe.data,
        num_classes=recipe.objective.num_classes,
        num_clips=num_clips,
        num_crops=num_crops,
        batch_size=recipe.evaluate.batch_size,
        precision=recipe.optim.precision,
        device=device,
        part=part,
        on_batch=on_batch,
    )
    share = share_of_all(share, clips)
    result = {}
    if share is not None:
        manifest = make_manifest(
            recipe,
            share.scores,
            clips,
            split=split,
            num_clips=num_clips,
            num_crops=num_crops,
            decoders=share.decoders,
            weights=weights,
            device=device,
            ranks=part.count,
        )
        evaluation = Evaluation(share.scores, clips, share.unreadable, manifest)
        result = measure(evaluation, resamples=RESAMPLES if folder else 0)
        result["seconds"] = time.monotonic() - started
        _warn_of_missing(result)
        if folder is not None:
            write_result(folder, evaluation, result)
    return result if part == WHOLE else json.loads(dist.broadcast(json.dumps(result).encode()))


def write_result(folder: Path, evaluation: Evaluation, result: dict) -> None:
    """Write an evaluation's files to `folder`, the result itself last."""
    answers = merge_views(
        evaluation.scores,
        evaluation.clips,
        num_classes=evaluation.manifest["question"]["classes"],
    )
    rows = class_rows(answers)
    confusion = confusion_matrix(answers)
    write_evaluation(folder / SCORES_FILE, evaluation)
    write_text(folder / "classes.csv", _csv([rows[0], *(row.values() for row in rows)]))
    heads = ["label", *range(len(confusion)), "missing"]
    lines = [[number, *line] for number, line in enumerate(confusion.tolist())]
    write_text(folder / "confusion.csv", _csv([heads, *lines]))
    write_json(folder / RESULT_FILE, result)


def _csv(rows: Sequence[Sequence]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def share_of_all(share: Share, clips: Sequence[Clip]) -> Share | None:
    """At the first process what all have seen, in the list's order; None at the others.

    Raises StateError where nobody has seen anything.
    """
    part = dist.joined_part()
    shares = [share] if part == WHOLE else _gather_shares(share)
    if part.index:
        return None
    scores = in_order(join([share.scores for share in shares]), clips)
    reasons: dict[int, str] = {}
    for share in shares:
        for clip_id, reason in share.unreadable.items():
            reasons[clip_id] = min(reason, reasons.get(clip_id, reason))
    if not len(scores.logits):
        why = reasons[clips[0].id]
        raise StateError(f"evaluation: none of {len(clips)} clips could be read, e.g. {why}")
    return Share(scores, sum((share.decoders for share in shares), Counter()), reasons)


def _gather_shares(share: Share) -> list[Share]:
    """The shares of all processes at the first of them; nothing elsewhere."""
    notes = {
        "decoders": json.dumps(share.decoders),
        "unreadable": json.dumps(list(share.unreadable.items())),
    }
    data = safetensors.torch.save(vars(share.scores), notes)
    return [_read_share(part) for part in dist.gather(data)]


def _read_share(data: bytes) -> Share:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    notes = {name: json.loads(text) for name, text in header["__metadata__"].items()}
    scores = Scores(**safetensors.torch.load(data))
    return Share(scores, Counter(notes["decoders"]), dict(map(tuple, notes["unreadable"])))


def _warn_of_missing(result: dict) -> None:
    if result["num_missing"]:
        name = result["missing"][0]
        logger.warning(
            "%s: %d of %d clips could not be read and count as wrong, e.g. %s (%s); "
            "top-1 is %.2f with and %.2f without them",
            result["split"],
            result["num_missing"],
            result["num_clips"],
            name,
            result["unreadable"][name],
            result["top1"],
            result["top1_of_read"],
        )


def evaluate_recipe(
    recipe: schema.Recipe, checkpoint: str | Path, *, folder: Path | None = None
) -> dict:
    """Evaluate the classifier in `checkpoint` with the views of the recipe's `evaluate` section.

    Writes what `evaluate` does to `folder`, by default evaluate-SPLIT in the recipe's run folder.
    """
    if not isinstance(recipe.objective, schema.Classify):
        raise InputError(
            f"{recipe.name}: objective.kind is {recipe.objective.kind!r}; only a classifier has "
            "classes to evaluate"
        )
    section = recipe.evaluate
    device = pick_device()
    model = build_classifier(recipe).to(device)
    load_weights(model, checkpoint, head="keep")
    folder = folder or Path(recipe.run.folder) / f"evaluate-{section.split}"
    folder.mkdir(parents=True, exist_ok=True)
    with using_kernels([recipe], device):
        return evaluate(
            model,
            recipe,
            split=section.split,
            num_clips=section.clips,
            num_crops=section.crops,
            device=device,
            folder=folder,
            weights=checkpoint,
        )


def labelled_clips(recipe: schema.Recipe, split: str) -> list[Clip]:
    """The clips of a split, all with a label of the recipe's classes; raises InputError."""
    section = getattr(recipe.data, split)
    if section is None:
        raise InputError(
            f"{recipe.name}: there is no data.{split}; set data.{split}.list=FILE, "
            "or evaluate.split to a list that is there"
        )
    clips = read_list(section, seed=recipe.run.seed)
    num_classes = recipe.objective.num_classes
    wrong = [clip for clip in clips if clip.label is None or not 0 <= clip.label < num_classes]
    if wrong:
        found = "no label" if wrong[0].label is None else f"label {wrong[0].label}"
        raise InputError(
            f"{section.list}:{wrong[0].line}: {found}, expected 0 to {num_classes - 1} "
            f"({len(wrong)} such lines); correct the list or objective.num_classes"
        )
    return clips


def _batches(tasks: Sequence[Task], size: int) -> Iterator[Sequence[Task]]:
    for start in range(0, len(tasks), size):
        yield tasks[start : start + size]
