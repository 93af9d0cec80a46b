"""What a frozen backbone makes of every view, kept once, so that probes are trained without it.

Below `objective.features.folder` each list has a folder of shards of its own (see distill/cache):
`train`, and by the clips and crops of a video `val-1x1` and, say, `test-4x3`. A record holds, in
half precision, what the part that is trained takes:

    hidden [1+N,D]             of an attentive probe: all tokens of the last block
    pooled [P]                 of a linear probe, and of a merge that takes it in
    tokens [1+1,D] or [1+t,D]  of a merge: the class token, and the mean of all or of each frame

and a hash of the view's pixels, for an evaluation's manifest. For an attentive probe of a 1B
model a view of 16 frames takes 11.5 MB, so Kinetics takes terabytes; for a linear probe it takes
kilobytes. `distill plan` says how much.
"""

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill import log
from distill.cache.build import check_writable, fixed_batches
from distill.cache.identity import REVISIONS
from distill.cache.index import found_identity, load_index
from distill.cache.quarantine import open_quarantine, quarantine_files, quarantined_ids
from distill.cache.read import Cache
from distill.cache.store import Folder, open_folder, remove_leftovers
from distill.cache.writer import RecordWriter
from distill.data.index import Clip, check_videos
from distill.data.load import (
    ClipLoader,
    Quarantine,
    Task,
    View,
    collate,
    load_eval_task,
    load_repeats,
)
from distill.dist import joined_part, wait_for_all
from distill.engines.plain import autocast, to_device
from distill.errors import StateError
from distill.evaluation.scores import hash_pixels
from distill.mixing import augmented_inputs
from distill.objective import frozen_features
from distill.recipe import Recipe
from distill.students.classifier import VideoClassifier
from distill.students.warmstart import file_sha256

MEGABYTE = 2**20
SHARD_SECONDS = 300.0
REVISION = 1  # raised by hand when code changes what the same settings produce
NAMES = ("hidden", "tokens", "pooled")
MADE_BY = "distill train"


@dataclass(frozen=True)
class Shelf:
    """The views of one list that lie together: which they are, and the settings they depend on.

    `load` gives what a `Task` asks for: a view, or a list that holds it.
    """

    split: str
    name: str
    num_views: int
    num_crops: int
    max_quarantined: float
    load: Callable[[Task], View | list[View]]
    settings: dict


def training_shelf(recipe: Recipe) -> Shelf:
    """The views that probes learn from."""
    section, data = recipe.objective.features, recipe.data
    return Shelf(
        split="train",
        name="train",
        num_views=section.views,
        num_crops=1,
        max_quarantined=data.max_quarantined,
        load=functools.partial(
            load_repeats, views=data.views, seed=section.seed, augmented=data.augment
        ),
        settings={
            "objective.features.seed": section.seed,
            "data.augment": _text(data.augment.model_dump(mode="json")),
            "augmentation revision": REVISIONS["augmentation"],
        },
    )


def evaluation_shelf(recipe: Recipe, split: str, *, num_clips: int, num_crops: int) -> Shelf:
    """The views of an evaluation; what of them cannot be decoded is left for it to count."""
    return Shelf(
        split=split,
        name=f"{split}-{num_clips}x{num_crops}",
        num_views=num_clips * num_crops,
        num_crops=num_crops,
        max_quarantined=1.0,
        load=functools.partial(
            load_eval_task, views=recipe.data.views, num_clips=num_clips, num_crops=num_crops
        ),
        settings={"clips": num_clips, "crops": num_crops},
    )


def features_identity(recipe: Recipe, shelf: Shelf) -> dict:
    """Every setting that a shelf's records depend on, as a flat dict of JSON values.

    Reads a whole file of weights where the recipe does not hold its hash.
    """
    model, views, section = recipe.model, recipe.data.views, recipe.objective
    is_merge = section.trainable == "head"
    size = model.size if isinstance(model.size, str) else model.size.model_dump(mode="json")
    return {
        **_weights_identity(recipe),
        "model.size": _text(size),
        "model.tubelet": model.tubelet,
        "model.positions": model.positions,
        "model.activation": model.activation,
        "objective.trainable": section.trainable,
        "objective.probe": section.probe if is_merge else None,
        "optim.precision": recipe.optim.precision,
        **{
            f"data.views.{name}": _text(value)
            for name, value in views.model_dump(mode="json", exclude={"decoder"}).items()
        },
        **shelf.settings,
        "sampling revision": REVISIONS["sampling"],
        "layout revision": REVISIONS["layout"],
        "features revision": REVISION,
    }


def _weights_identity(recipe: Recipe) -> dict:
    weights, seed = recipe.model.weights, recipe.run.seed
    if weights is None:  # what a model draws depends on all of it
        section = recipe.objective
        probe = f"{section.probe}, " if section.probe else ""
        drawn = f"random, seed {seed}, {probe}{section.num_classes} classes"
        return {"model.weights (sha256)": drawn}
    files = {"model.weights": weights}
    if weights.extra is not None:
        files["model.weights.extra"] = weights.extra
    identity = {}
    for name, file in files.items():
        known = file.sha256.lower() if file.sha256 else file_sha256(file.checkpoint)
        identity |= {f"{name} (sha256)": known, f"{name}.frames": file.frames}
    if weights.allow_missing:
        identity["weights at init"] = f"{_text(weights.allow_missing)}, seed {seed}"
    return identity


def open_features(
    recipe: Recipe,
    model: VideoClassifier,
    shelf: Shelf,
    clips: Sequence[Clip],
    *,
    device: torch.device,
) -> tuple[Cache, Quarantine]:
    """A shelf's records of the clips, once those that are missing have been made.

    What is committed is never made again; a kill loses at most the open shard. Processes that
    have joined make a part each, and all wait for the last. Returns with them the clips that
    cannot be decoded. Raises StateError for a folder that holds another recipe's, naming the
    setting, and when too many clips of a training list cannot be decoded.
    """
    section = recipe.objective.features
    folder = open_folder(f"{section.folder}/{shelf.name}", made_by=MADE_BY)
    identity = features_identity(recipe, shelf)
    _require(folder, identity)
    remove_leftovers(folder)
    clip_ids = np.fromiter((clip.id for clip in clips), np.int64, len(clips))
    is_there = _find(folder, identity, clip_ids, shelf.num_views)[1] >= 0  # [C,V]
    wanted = ~is_there & ~np.isin(clip_ids, quarantined_ids(folder))[:, None]
    part = joined_part()  # of the batches, whose places are fixed
    part_of = np.arange(len(clips)) // section.batch_size % part.count
    wanted &= (part_of == part.index)[:, None]
    quarantine = open_quarantine(folder, clips=clips, max_share=shelf.max_quarantined)
    if wanted.any():
        check_writable(folder)
        check_videos(
            [clips[i] for i in np.flatnonzero(wanted.any(axis=1))],
            getattr(recipe.data, shelf.split),
        )
        title = f"features {folder}"
        with (
            log.progress(title, total=wanted.size, unit="views", done=int(is_there.sum())) as bar,
            closing(
                _make(recipe, model.to(device), shelf, folder, clips, wanted, identity, quarantine)
            ) as made,
        ):
            for count, size_bytes, waited in made:
                bar.advance(count)
                size = log.size_text(size_bytes)
                bar.note(f"{size}, {waited:.0%} of the time waiting for videos")
    wait_for_all()
    quarantine = open_quarantine(folder, clips=clips, max_share=shelf.max_quarantined)
    quarantine.check()  # with what other processes have found
    index, rows = _find(folder, identity, clip_ids, shelf.num_views)
    if shelf.split == "train":
        is_whole = (rows >= 0).all(axis=1)
        clip_ids, rows = clip_ids[is_whole], rows[is_whole]
    if not (rows >= 0).any():
        raise StateError(
            f"features {folder}: none of {len(clips)} clips could be decoded; "
            f"{quarantine_files(folder)} says why"
        )
    return Cache(folder, index, rows, clip_ids=clip_ids), quarantine


def _find(folder: Folder, identity: dict, clip_ids: np.ndarray, num_views: int):
    """The records of a folder, and those of the clips among them: places [C,V], -1 for none."""
    index = load_index(folder, identity)
    return index, np.stack([index.find(clip_ids, view) for view in range(num_views)], axis=1)


def _require(folder: Folder, identity: dict) -> None:
    """Refuse other settings' records, naming the first that differs."""
    found = found_identity(folder)
    if found is None:
        return
    for name in dict.fromkeys((*identity, *found)):
        have, want = found.get(name), identity.get(name)
        if have != want:
            raise StateError(
                f"features {folder}: made with {name} {have}, the recipe asks for {want}; put that "
                "back, or set objective.features.folder to a new folder"
            )


def _make(
    recipe: Recipe,
    model: VideoClassifier,
    shelf: Shelf,
    folder: Folder,
    clips: Sequence[Clip],
    wanted: np.ndarray,
    identity: dict,
    quarantine: Quarantine,
) -> Iterator[tuple[int, int, float]]:
    """Make the wanted records [C,V].

    Yields how many a batch added, all bytes so far and the share of the time that was spent
    waiting for videos.
    """
    section = recipe.objective.features
    loader = ClipLoader(
        shelf.load,
        workers=recipe.data.workers,
        timeout_seconds=recipe.data.decode_timeout_seconds,
        quarantine=quarantine,
    )
    started = time.monotonic()
    was_training = model.training
    model.eval()
    try:
        with (
            RecordWriter(
                folder,
                identity=identity,
                clip_ids=np.array([clips[i].id for i in np.flatnonzero(wanted.any(axis=1))]),
                shard_bytes=section.shard_mb * MEGABYTE,
                shard_seconds=SHARD_SECONDS,
            ) as writer,
            closing(loader.run(_tasks(shelf, clips, wanted, section.batch_size))) as batches,
        ):
            for loaded in batches:
                items = [(task, _only(view)) for task, view in loaded]
                if items:
                    writer.put(items, make_features(recipe, model, items))
                elapsed = max(time.monotonic() - started, 1e-9)
                yield len(items), writer.record_bytes, min(loader.wait_seconds / elapsed, 1.0)
    finally:
        model.train(was_training)


def _tasks(
    shelf: Shelf, clips: Sequence[Clip], wanted: np.ndarray, size: int
) -> Iterator[list[Task]]:
    for batch in fixed_batches(clips, wanted.T, size=size):
        yield [
            Task(
                task.clip,
                task.view,
                clip_index=task.view // shelf.num_crops,
                crop_index=task.view % shelf.num_crops,
            )
            for task in batch
        ]


def _only(view: View | list[View]) -> View:
    return view[0] if isinstance(view, list) else view


def make_features(
    recipe: Recipe, model: VideoClassifier, items: Sequence[tuple[Task, View]]
) -> dict[str, Tensor]:
    """What records of loaded views hold, on the model's device: the batch in front, in float16.

    Raises StateError naming a clip whose features are too large for half precision.
    """
    device = next(model.parameters()).device
    batch = collate(items)
    if any(view.erased for _, view in items):
        batch["erased"] = torch.tensor([view.erased or (0, 0, 0, 0) for _, view in items])
    batch = augmented_inputs(to_device(batch, device), num_classes=recipe.objective.num_classes)
    with autocast(device, recipe.optim.precision):
        found = frozen_features(model, batch["pixels"], trainable=recipe.objective.trainable)
    hashes = [[hash_pixels(view.pixels)] for _, view in items]
    fields = {"pixels_hash": torch.tensor(hashes)}
    for name, value in found.items():
        fields[name] = value.half()
        is_finite = fields[name].flatten(1).isfinite().all(dim=1)
        if not bool(is_finite.all()):
            clip = items[int(is_finite.int().argmin())][0].clip
            raise StateError(
                f"features: {name} of {clip.name} does not fit half precision (largest value "
                f"{value.abs().max().item():g}); drop objective.features"
            )
    return fields


class FeatureInputs:
    """Turns a batch of records into one that a `ClassifyObjective` takes."""

    def __init__(self, clips: Sequence[Clip], *, device: torch.device) -> None:
        order = sorted(clips, key=lambda clip: clip.id)
        self.clip_ids = torch.tensor([clip.id for clip in order], device=device)
        self.labels = torch.tensor([clip.label for clip in order], device=device)

    def __call__(self, batch: dict) -> dict:
        """Of fields in float16: clip_id, label [B], epoch and `features` in float32."""
        place = torch.searchsorted(self.clip_ids, batch["clip_id"])
        return {
            "clip_id": batch["clip_id"],
            "label": self.labels[place],
            "epoch": batch["epoch"],
            "features": of_record(batch),
        }


def of_record(batch: dict) -> dict[str, Tensor]:
    """The features in a batch of records, in float32."""
    return {name: batch[name].float() for name in NAMES if name in batch}


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
