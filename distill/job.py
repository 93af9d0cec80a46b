"""From a recipe to what a training loop needs: everything a run reads is opened here."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from distill import recipe as schema
from distill.cache.build import build_cache
from distill.cache.hybrid import HybridBatches, open_hybrid
from distill.cache.identity import cache_identity
from distill.cache.live import other_teachers, tuned_teachers
from distill.cache.read import Cache, CachedBatches
from distill.data.index import check_videos, read_list
from distill.data.load import ClipBatches, Quarantine
from distill.dist import exchange, joined_part, wait_for_all
from distill.errors import StateError
from distill.evaluation.evaluate import Share, labelled_clips
from distill.evaluation.probe_scores import score_features
from distill.features import FeatureInputs, evaluation_shelf, open_features, training_shelf
from distill.mask import make_redraw
from distill.mixing import augmented_inputs
from distill.models import build_classifier, build_student, load_recipe_weights
from distill.objective import ClassifyObjective, DistillObjective
from distill.probe import ProbeSweep
from distill.students.vit import VideoViT
from distill.targets import CachedTargets, LiveTargets

WATCHED_CLIPS = 8  # of a distillation, see distill/run/watch.py

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What the loop trains on. `prepare` turns a batch as read into one the objective takes.

    Without epochs to train for, `batches` is None. `scorers` are, by list, clips and crops, what
    scores the views of an evaluation where that is not `score_views`. `watched` reads the same
    views as `batches`, few at a time, and the same ones in any number of processes.
    """

    model: VideoViT
    objective: nn.Module
    batches: ClipBatches | CachedBatches | HybridBatches | None
    prepare: Callable[[dict], dict]
    clip_names: Callable[[Sequence[int]], list[str]]
    quarantine: Quarantine | None
    scorers: Mapping[tuple[str, int, int], Callable[..., Share]] = field(default_factory=dict)
    watched: ClipBatches | CachedBatches | HybridBatches | None = None

    @property
    def sweep(self) -> ProbeSweep | None:
        """The probes of many settings that are trained in the model's place."""
        return self.objective.sweep if isinstance(self.objective, ClassifyObjective) else None


def build_job(
    recipe: schema.Recipe, folder: Path, *, device: torch.device, cache: Cache | None = None
) -> Job:
    """Open everything a run reads, before its optimiser is built.

    `cache` is the recipe's where it is open already.
    """
    objective, seed, batch_size = recipe.objective, recipe.run.seed, recipe.optim.batch_size
    if isinstance(objective, schema.Distill) and objective.targets != "live":
        quarantine = None
        if objective.targets == "hybrid":
            batches = open_hybrid(recipe, folder)
            cache, names = batches.cached.cache, batches.clip_names
            quarantine = batches.live and batches.live.quarantine
            few = CachedBatches(cache, batch_size=WATCHED_CLIPS, seed=seed)
            watched = HybridBatches(few, batches.clips, batches.live)
        else:
            cache = cache or open_cache(recipe)
            batches = CachedBatches(cache, batch_size=batch_size, seed=seed, part=joined_part())
            watched = CachedBatches(cache, batch_size=WATCHED_CLIPS, seed=seed)
            names = cache.clip_names
        student = with_weights(build_student(recipe), recipe)
        loss = DistillObjective(student, objective, seed=seed)
        prepare = CachedTargets(
            cache.codec, make_redraw(recipe), layers=cache.layers, pixels=seen_pixels(recipe)
        )
        return Job(student, loss, batches, prepare, names, quarantine, watched=watched)

    is_live = isinstance(objective, schema.Distill)
    if not is_live and not recipe.optim.epochs:  # weights to evaluate: no list to train on
        model = with_weights(build_classifier(recipe), recipe)
        loss = ClassifyObjective(model, objective, seed=seed)
        return Job(model, loss, None, _as_read, lambda ids: [], None)
    if not is_live and objective.features is not None:
        return _build_features_job(recipe, device=device)
    clips = read_list(recipe.data.train, seed=seed) if is_live else labelled_clips(recipe, "train")
    check_videos(clips, recipe.data.train)
    part = joined_part()
    quarantine = Quarantine(
        folder / part.name("quarantine.jsonl"),
        total=-(-len(clips) // part.count),
        max_share=recipe.data.max_quarantined,
        clips=clips,
    )
    names = {clip.id: clip.name for clip in clips}
    # Live views and masks are those that a cache would hold.
    cache = objective.cache if is_live else None
    read = partial(
        ClipBatches,
        clips,
        recipe.data.model_copy(update={"views": schema.read_views(recipe)}),
        seed=seed,
        views_per_clip=cache.views if cache else None,
        quarantine=quarantine,
        views_seed=schema.views_seed(recipe) if is_live else seed,
        mixing=None if is_live else objective.mixing,
    )
    if is_live:
        model = with_weights(build_student(recipe), recipe)
        loss = DistillObjective(model, objective, seed=seed)
        prepare = live_targets(recipe, device=device)
    else:
        model = with_weights(build_classifier(recipe), recipe)
        loss = ClassifyObjective(model, objective, seed=seed)
        prepare = partial(augmented_inputs, num_classes=objective.num_classes)
    return Job(
        model,
        loss,
        read(batch_size=batch_size, part=part),
        prepare,
        lambda ids: [names[clip_id] for clip_id in ids],
        quarantine,
        watched=read(batch_size=WATCHED_CLIPS) if is_live else None,
    )


def _build_features_job(recipe: schema.Recipe, *, device: torch.device) -> Job:
    """A probe's job whose frozen backbone looks at each view once, now."""
    model = with_weights(build_classifier(recipe), recipe)
    loss = ClassifyObjective(model, recipe.objective, seed=recipe.run.seed)
    clips = labelled_clips(recipe, "train")
    cache, quarantine = open_features(recipe, model, training_shelf(recipe), clips, device=device)
    scorers = {}
    for key in evaluation_views(recipe):
        shelf = evaluation_shelf(recipe, key[0], num_clips=key[1], num_crops=key[2])
        listed = labelled_clips(recipe, key[0])
        found, left_out = open_features(recipe, model, shelf, listed, device=device)
        reasons = {entry["id"]: entry["reason"] for entry in left_out.entries}
        scorers[key] = partial(score_features, found, reasons)
    seed, part = recipe.run.seed, joined_part()
    batches = CachedBatches(cache, batch_size=recipe.optim.batch_size, seed=seed, part=part)
    prepare = FeatureInputs(clips, device=device)
    return Job(model, loss, batches, prepare, cache.clip_names, quarantine, scorers)


def live_targets(recipe: schema.Recipe, *, device: torch.device) -> LiveTargets:
    """What a distillation's teachers say of views, with the masks that the recipe draws."""
    section, optim = recipe.objective, recipe.optim
    teachers = tuned_teachers(
        recipe, batch_size=optim.micro_batch or optim.batch_size, device=device
    )
    return LiveTargets(
        teachers[schema.MAIN],
        section.mask,
        schema.views_seed(recipe),
        precision=section.teacher.precision,
        tokens=section.cache.tokens if section.cache else "visible",
        pixels=seen_pixels(recipe),
        redraw=make_redraw(recipe),
        others=other_teachers(recipe, teachers),
    )


def seen_pixels(recipe: schema.Recipe) -> schema.KeptPixels:
    """What a student takes: a model of timm's cannot leave patches out."""
    return "full" if recipe.model.timm else "visible"


def _as_read(batch: dict) -> dict:
    return batch


def open_cache(recipe: schema.Recipe) -> Cache:
    """The recipe's view cache, made or completed first where records are missing."""
    folder = recipe.objective.cache.folder
    identity = cache_identity(recipe)  # once: it may take reading all of a teacher's file
    try:
        cache = Cache.open(folder, recipe, identity=identity)
    except StateError:
        if recipe.data.train.list is None:
            raise  # there are no videos to make the missing records from
        cache = None
    # Before any of the processes begins to write, so that all of them decide alike.
    if all(is_whole for (is_whole,) in exchange(cache is not None)):
        return cache
    build_cache(recipe, identity=identity, part=joined_part())
    wait_for_all()
    return Cache.open(folder, recipe, identity=identity)


def with_weights(model: VideoViT, recipe: schema.Recipe) -> VideoViT:
    """The model with the recipe's starting weights, if it names any."""
    if recipe.model.weights is not None:
        for report in load_recipe_weights(model, recipe.model.weights):
            for line in report.lines():
                logger.info("%s", line)
    return model


def check_evaluation(recipe: schema.Recipe) -> None:
    """Raise InputError now for what would stop an evaluation after hours of training."""
    if not isinstance(recipe.objective, schema.Classify):
        return
    has_features = recipe.objective.features is not None and recipe.optim.epochs > 0
    for split, _, _ in evaluation_views(recipe):
        clips = labelled_clips(recipe, split)
        if not has_features:  # which look for the videos of missing ones alone
            check_videos(clips, getattr(recipe.data, split))


def evaluation_views(recipe: schema.Recipe) -> list[tuple[str, int, int]]:
    """Lists that a classifier's run evaluates it on, each with its clips and crops."""
    section, found = recipe.evaluate, []
    if recipe.data.val is not None and recipe.optim.epochs and section.every_epochs:
        found.append(("val", 1, 1))
    if has_evaluation(recipe):
        found.append((section.split, section.clips, section.crops))
    return list(dict.fromkeys(found))


def has_evaluation(recipe: schema.Recipe) -> bool:
    """Whether there is a list to evaluate on; a run without one only trains."""
    return recipe.data.val is not None or recipe.data.test is not None
