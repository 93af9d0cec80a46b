"""Evaluating probes: from cached features, and all settings of a sweep at once."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from distill import log
from distill import recipe as schema
from distill.cache.read import Cache, CachedBatches
from distill.data.index import Clip
from distill.dist import WHOLE, Part
from distill.engines.plain import autocast, to_device
from distill.errors import StateError
from distill.evaluation.evaluate import Share, labelled_clips
from distill.evaluation.metrics import merge_views
from distill.evaluation.scores import Scores
from distill.features import of_record
from distill.probe import ProbeSweep

DECODER = "cached features"  # in a manifest, where decoders stand


def score_features(
    features: Cache,
    unreadable: Mapping[int, str],
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
    on_batch: Callable[[], None] = lambda: None,
) -> Share:
    """As `score_views`, of the views that there are features of: `data` is not read.

    `unreadable` says by clip id why there are none.
    """
    names = {clip.id: clip.name for clip in clips}
    batches = CachedBatches(features, batch_size=batch_size, seed=0)
    rows, logits = [torch.empty(4, 0, dtype=torch.int64)], [torch.empty(0, num_classes)]
    was_training = model.training
    model.eval()
    try:
        with log.progress("evaluate", total=features.rows.size, unit="views") as bar:
            for view in range(num_clips * num_crops):
                for number, batch in enumerate(batches.epoch(view)):
                    if number % part.count == part.index:
                        ids, hashes = batch["clip_id"], batch["pixels_hash"][:, 0]
                        place = torch.tensor([view // num_crops, view % num_crops])
                        clip_index, crop_index = place[:, None].expand(2, len(ids))
                        is_there = torch.ones(len(ids), dtype=torch.bool)
                        is_there[batch.get("missing", [])] = False
                        inputs = of_record(to_device(batch, device))
                        with torch.inference_mode(), autocast(device, precision):
                            found = model(features=inputs).float().cpu()[is_there]  # [B,C]
                        row = torch.stack([ids, clip_index, crop_index, hashes])[:, is_there]
                        is_sound = found.isfinite().all(dim=1)
                        if not bool(is_sound.all()):
                            name = names[int(row[0, is_sound.int().argmin()])]
                            raise StateError(
                                f"evaluation: the model's scores of {name} are not finite"
                            )
                        rows.append(row)
                        logits.append(found)
                    bar.advance(len(batch["clip_id"]))
                    on_batch()
    finally:
        model.train(was_training)
    columns = (column.clone() for column in torch.cat(rows, dim=1))
    scores = Scores(*columns, torch.cat(logits))
    return Share(scores, Counter({DECODER: len(scores.logits)}), dict(unreadable))


def evaluate_settings(
    sweep: ProbeSweep,
    recipe: schema.Recipe,
    *,
    device: torch.device,
    score: Callable[..., Share],
    on_batch: Callable[[], None] = lambda: None,
) -> list[dict[str, float]]:
    """Top-1 and top-5 of each setting of a sweep, on one view of each clip of `val`.

    Clips that cannot be read count as wrong.
    """
    clips = labelled_clips(recipe, "val")
    num_classes = recipe.objective.num_classes
    scores = score(
        sweep,
        clips,
        data=recipe.data,
        num_classes=num_classes * len(sweep.settings),
        num_clips=1,
        num_crops=1,
        batch_size=recipe.evaluate.batch_size,
        precision=recipe.optim.precision,
        device=device,
        on_batch=on_batch,
    ).scores
    results = []
    for logits in sweep.split(scores.logits):
        own = replace(scores, logits=logits)
        hits = merge_views(own, clips, num_classes=num_classes).hits  # [n,5]
        results.append({"top1": 100 * hits[:, 0].mean(), "top5": 100 * hits.any(axis=1).mean()})
    return [{name: float(value) for name, value in one.items()} for one in results]
