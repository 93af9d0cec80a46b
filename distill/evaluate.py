"""Top-1 and top-5 of a classifier: several views of every clip, averaged after the softmax.

No clip is left out silently: what could not be read is named, counted as wrong, and the score
without it is given beside the score with it.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from distill import log
from distill import recipe as schema
from distill.checkpoint import write_json, write_tensors
from distill.data.index import Clip, read_list
from distill.data.load import ClipLoader, Quarantine, Task, collate, load_eval_task
from distill.engine import autocast, pick_device, take_kernels, to_device
from distill.errors import InputError, StateError
from distill.models import build_classifier
from distill.students.warmstart import load_weights

TOP = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """Logits [R,V] in float32 of R views, with each view's clip id and place in its clip [R]."""

    clip_id: Tensor
    clip_index: Tensor
    crop_index: Tensor
    logits: Tensor


def merge_views(scores: Scores, clips: Sequence[Clip], *, num_views: int) -> dict:
    """Top-1 and top-5 in percent over `clips`, from the mean of each clip's softmaxes.

    A clip without any view is `missing` and counts as wrong; `top1_of_read` and `top5_of_read`
    leave such clips out. A clip with fewer than `num_views` views is scored by those it has and
    named under `incomplete`. Views are told apart by clip id, not by name. Sums in float64.
    """
    row_of = {clip.id: row for row, clip in enumerate(clips)}
    rows = torch.tensor([row_of[clip_id] for clip_id in scores.clip_id.tolist()], dtype=torch.long)
    labels = torch.tensor([clip.label for clip in clips])
    sums = torch.zeros(len(clips), scores.logits.shape[1], dtype=torch.float64)
    sums.index_add_(0, rows, scores.logits.double().softmax(dim=1))
    views = torch.bincount(rows, minlength=len(clips))

    is_read = views > 0
    best = sums.topk(min(TOP, sums.shape[1]), dim=1).indices  # a clip's sum ranks as its mean
    hits = (best == labels[:, None]) & is_read[:, None]
    num_hits = {"top1": int(hits[:, 0].sum()), "top5": int(hits.sum())}
    num_read = int(is_read.sum())
    missing = [clip.name for clip, seen in zip(clips, views.tolist(), strict=True) if seen == 0]
    incomplete = [
        clip.name for clip, seen in zip(clips, views.tolist(), strict=True) if 0 < seen < num_views
    ]
    return {
        **{name: 100 * count / len(clips) for name, count in num_hits.items()},
        **{f"{name}_of_read": 100 * count / max(num_read, 1) for name, count in num_hits.items()},
        "num_clips": len(clips),
        "num_missing": len(missing),
        "num_incomplete": len(incomplete),
        "missing": missing,
        "incomplete": incomplete,
    }


def score_views(
    model: nn.Module,
    clips: Sequence[Clip],
    *,
    data: schema.Data,
    num_clips: int,
    num_crops: int,
    batch_size: int,
    precision: str,
    device: torch.device,
    quarantine: Quarantine,
    on_batch: Callable[[], None] = lambda: None,
) -> Scores:
    """Run `model` on `num_clips` x `num_crops` views of every clip that can be read.

    `on_batch` is called after every batch and may raise to stop. Raises StateError naming the
    clip for which the model's scores are not finite, or when no clip could be read.
    """
    loader = ClipLoader(
        partial(load_eval_task, views=data.views, num_clips=num_clips, num_crops=num_crops),
        workers=data.workers,
        timeout_seconds=data.decode_timeout_seconds,
        quarantine=quarantine,
    )
    tasks = [
        Task(clip, clip_index=clip_index, crop_index=crop_index)
        for clip in clips
        for clip_index in range(num_clips)
        for crop_index in range(num_crops)
    ]
    seen: list[Task] = []
    logits: list[Tensor] = []
    was_training = model.training
    model.eval()
    try:
        with log.progress("evaluate", total=len(tasks), unit="views") as bar:
            for items in loader.run(_batches(tasks, batch_size)):
                if items:
                    pixels = to_device(collate(items), device)["pixels"]
                    with torch.inference_mode(), autocast(device, precision):
                        logits.append(model(pixels).float().cpu())  # [B,V]
                    seen += [task for task, _ in items]
                bar.advance(len(items))
                on_batch()
    finally:
        model.train(was_training)
    if not seen:
        raise StateError(
            f"evaluation: none of {len(clips)} clips could be read, e.g. {clips[0].path}"
        )
    scores = Scores(
        clip_id=torch.tensor([task.clip.id for task in seen]),
        clip_index=torch.tensor([task.clip_index for task in seen]),
        crop_index=torch.tensor([task.crop_index for task in seen]),
        logits=torch.cat(logits),
    )
    is_sound = scores.logits.isfinite().all(dim=1)
    if not bool(is_sound.all()):
        clip = seen[int(is_sound.int().argmin())].clip
        raise StateError(f"evaluation: the model's scores of {clip.name} are not finite")
    return scores


def evaluate(
    model: nn.Module,
    recipe: schema.Recipe,
    *,
    split: str,
    num_clips: int,
    num_crops: int,
    device: torch.device,
    folder: Path | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> dict:
    """Evaluate on one of the recipe's lists; returns what `merge_views` does, and the settings.

    With a `folder`, the result is written to its evaluation.json and every view's logits to
    scores.safetensors.
    """
    started = time.monotonic()
    clips = labelled_clips(recipe, split)
    quarantine = Quarantine(None, total=len(clips), max_share=1.0)  # missing clips are scored
    scores = score_views(
        model,
        clips,
        data=recipe.data,
        num_clips=num_clips,
        num_crops=num_crops,
        batch_size=recipe.evaluate.batch_size,
        precision=recipe.optim.precision,
        device=device,
        quarantine=quarantine,
        on_batch=on_batch,
    )
    merged = merge_views(scores, clips, num_views=num_clips * num_crops)
    result = {
        "split": split,
        "clips": num_clips,
        "crops": num_crops,
        **merged,
        "seconds": time.monotonic() - started,
    }
    if merged["num_missing"]:
        logger.warning(
            "%s: %d of %d clips could not be read and count as wrong, e.g. %s; "
            "top-1 is %.2f with and %.2f without them",
            split,
            merged["num_missing"],
            len(clips),
            merged["missing"][0],
            merged["top1"],
            merged["top1_of_read"],
        )
    if folder is not None:
        write_tensors(folder / "scores.safetensors", vars(scores), metadata={"split": split})
        write_json(folder / "evaluation.json", result)
    return result


def evaluate_recipe(
    recipe: schema.Recipe, checkpoint: str | Path, *, folder: Path | None = None
) -> dict:
    """Evaluate the classifier in `checkpoint` with the views of the recipe's `evaluate` section.

    Writes evaluation.json and scores.safetensors to `folder`, by default evaluate-SPLIT in the
    recipe's run folder.
    """
    if not isinstance(recipe.objective, schema.Classify):
        raise InputError(
            f"{recipe.name}: objective.kind is {recipe.objective.kind!r}; only a classifier has "
            "classes to evaluate"
        )
    section = recipe.evaluate
    device = pick_device()
    take_kernels(recipe.run.kernels, device)
    model = build_classifier(recipe).to(device)
    load_weights(model, checkpoint, head="keep")
    folder = folder or Path(recipe.run.folder) / f"evaluate-{section.split}"
    folder.mkdir(parents=True, exist_ok=True)
    return evaluate(
        model,
        recipe,
        split=section.split,
        num_clips=section.clips,
        num_crops=section.crops,
        device=device,
        folder=folder,
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
