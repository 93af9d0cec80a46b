"""Views of clips, and batches of them made by worker processes.

A training view is a function of (clip, view, recipe's views, seed) and of nothing else.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np

from distill import draw
from distill.data import augment, sample
from distill.data.decode import Frames, Video, open_video
from distill.data.index import Clip
from distill.data.rand_augment import draw_operations
from distill.data.workers import ClipLoader, Quarantine
from distill.dist import WHOLE, Part
from distill.errors import InputError, StateError
from distill.recipe import Augment, Data, Mixing, Views

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ClipBatches",
    "ClipLoader",
    "Quarantine",
    "Task",
    "View",
    "collate",
    "load_eval_task",
    "load_eval_view",
    "load_repeats",
    "load_task",
    "load_view",
    "load_views",
    "replay_view",
]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a worker is asked for: a training view, or a clip and crop of an evaluation."""

    clip: Clip
    view: int = 0
    clip_index: int = 0
    crop_index: int = 0


@dataclasses.dataclass(frozen=True)
class View:
    """One look at a clip, and what is needed to make it again.

    pixels uint8 [3,T,S,S]; `frames` int64 [T] are numbers in the whole video, `pts_seconds`
    float64 [T] their times (NaN for folders of frames); `crop` is (x, y, width, height) in
    pixels of the decoded frame or, where there is a `resize` (width, height), of the frame
    resized to that. `number` and `seed` are what a training view was drawn with. `operations`
    came before the crop; the box (x, y, width, height) of the pixels that is `erased` holds noise.
    """

    pixels: np.ndarray
    frames: np.ndarray
    pts_seconds: np.ndarray
    crop: tuple[int, int, int, int]
    flip: bool
    decoder: str
    resize: tuple[int, int] | None = None
    number: int | None = None
    seed: int | None = None
    operations: tuple[tuple[str, float], ...] = ()
    erased: tuple[int, int, int, int] | None = None


def load_view(clip: Clip, view: int, *, views: Views, seed: int) -> View:
    """Training view number `view` of a clip; equal arguments give equal bits in any process.

    Raises `InputError` for a clip that cannot be decoded.
    """
    (only,) = load_views(clip, view, views=views, seed=seed, augmented=Augment())
    return only


def load_views(clip: Clip, view: int, *, views: Views, seed: int, augmented: Augment) -> list[View]:
    """The training views from number `view` on that show the frames of the first, decoded once.

    There are `augmented.repeats` of them, and a view of a number is else the same as in any
    other company. Raises `InputError` for a clip that cannot be decoded.
    """
    numbers = range(view, view + augmented.repeats)
    rngs = [draw.generator("augment", seed, clip.id, number) for number in numbers]
    with open_video(clip.path, decoder=views.decoder) as video:
        first, length = sample.trim(clip, _num_frames(clip, video))
        # Each draws its own frames, so that what it draws after them is its own too.
        drawn = [sample.train_indices(views.sampling, length, views.frames, rng) for rng in rngs]
        indices = first + drawn[0]
        frames = video.read(indices)
    height, width = frames.pixels.shape[1:3]
    made = []
    for number, rng in zip(numbers, rngs, strict=True):
        crop = augment.draw_crop(views, width=width, height=height, rng=rng)
        flip = bool(rng.random() < views.flip) and clip.source not in views.never_flip
        operations, erased = (), None
        if augmented.rand_augment is not None:
            operations = tuple(draw_operations(augmented.rand_augment, rng))
        if augmented.erase is not None:
            probability = augmented.erase.probability
            erased = augment.draw_erased(views.image_size, probability=probability, rng=rng)
        one = _finish(
            video,
            indices,
            frames,
            crop,
            flip=flip,
            antialias=views.antialias,
            number=number,
            seed=seed,
            operations=operations,
            erased=erased,
        )
        if erased is not None:
            augment.erase(one.pixels, erased, rng=rng)
        made.append(one)
    return made


def load_eval_view(
    clip: Clip, *, clip_index: int, num_clips: int, crop_index: int, num_crops: int, views: Views
) -> View:
    """Evaluation view: clip `clip_index` in time and crop `crop_index` in space; never flipped.

    Raises `InputError` for a clip that cannot be decoded.
    """
    with open_video(clip.path, decoder=views.decoder) as video:
        first, length = sample.trim(clip, _num_frames(clip, video))
        indices = first + sample.eval_indices(
            views.sampling, length, views.frames, clip=clip_index, num_clips=num_clips
        )
        frames = video.read(indices)
    height, width = frames.pixels.shape[1:3]
    size = views.image_size
    crop = augment.eval_crop(width, height, size=size, crop=crop_index, num_crops=num_crops)
    return _finish(video, indices, frames, crop, flip=False, antialias=views.antialias)


def replay_view(clip: Clip, info: dict, *, image_size: int) -> View:
    """Make a cached view again from what its record says (`view_info`); draws nothing.

    The pixels are the first ones bit for bit: decoders that are trusted with a file agree on it.
    Raises `InputError` for a clip that cannot be decoded, or is not the one that was cached.
    """
    x, y, width, height = info["crop"]
    resize = None if info["resize"] is None else tuple(info["resize"])
    crop = augment.Crop(x, y, width, height, image_size, resize)
    indices = np.array(info["frames"], np.int64)
    decoder = "pyav" if info["decoder"].startswith("pyav") else "auto"
    with open_video(clip.path, decoder=decoder) as video:
        if indices.max() >= video.num_frames:
            raise InputError(
                f"{clip.path}: {video.num_frames} frames, but its record has frame "
                f"{indices.max()}; it is not the video that was cached"
            )
        frames = video.read(indices)
    have = np.nan_to_num(frames.pts_seconds, nan=-1.0)
    want = np.full(len(have), -1.0) if info["pts_seconds"] is None else info["pts_seconds"]
    if not np.array_equal(have, want):
        raise InputError(
            f"{clip.path}: its frames are shown at other times than its record says; it is not "
            "the video that was cached"
        )
    flip, number, seed = info["flip"], info["view"], info["seed"]
    return _finish(video, indices, frames, crop, flip=flip, number=number, seed=seed)


def load_task(task: Task, *, views: Views, seed: int) -> View:
    """`load_view` for a `ClipLoader`, bound with `functools.partial`."""
    return load_view(task.clip, task.view, views=views, seed=seed)


def load_repeats(task: Task, *, views: Views, seed: int, augmented: Augment) -> list[View]:
    """`load_views` for a `ClipLoader`, bound with `functools.partial`."""
    return load_views(task.clip, task.view, views=views, seed=seed, augmented=augmented)


def load_eval_task(task: Task, *, views: Views, num_clips: int, num_crops: int) -> View:
    """`load_eval_view` for a `ClipLoader`, bound with `functools.partial`."""
    return load_eval_view(
        task.clip,
        clip_index=task.clip_index,
        num_clips=num_clips,
        crop_index=task.crop_index,
        num_crops=num_crops,
        views=views,
    )


def collate(items: Sequence[tuple[Task, View]]) -> "dict[str, Tensor]":
    """A batch: clip_id, view, label int64 [B] (-1 for no label), pixels uint8 [B,3,T,S,S]."""
    import torch  # not at the top: workers import this module and do without it

    def column(values: Iterable[int]) -> "Tensor":
        return torch.tensor(list(values), dtype=torch.int64)

    return {
        "clip_id": column(task.clip.id for task, _ in items),
        "view": column(task.view for task, _ in items),
        "label": column(-1 if task.clip.label is None else task.clip.label for task, _ in items),
        "pixels": torch.from_numpy(np.stack([view.pixels for _, view in items])),
    }


class ClipBatches:
    """Training batches from videos, in an order drawn from (seed, epoch).

    Epoch e uses view e, or e mod `views_per_clip`; views are drawn with `views_seed`, by default
    `seed`. With r `repeats` it uses the r views from e * r on, side by side, and `batch_size`
    counts them all. Clips that cannot be decoded go to the quarantine and are left out of their
    batches, which keep their places; only a batch that loses all its clips takes the next one in
    the order instead. A `part` gets its own share of every batch, and where no clip is left for
    it the first one, with "is_spare".
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        data: Data,
        *,
        batch_size: int,
        seed: int,
        views_per_clip: int | None,
        quarantine: Quarantine,
        views_seed: int | None = None,
        mixing: Mixing | None = None,
        part: Part = WHOLE,
    ):
        if not clips:
            raise InputError("there are no clips to train with: data.train.list names none")
        self._clips, self._part = clips, part
        self._augmented, self._mixing = data.augment, mixing
        self._image_size = data.views.image_size
        self._clips_per_batch = batch_size // data.augment.repeats
        self._seed = seed
        self._views_seed = seed if views_seed is None else views_seed
        self._views_per_clip = views_per_clip
        self._loader = ClipLoader(
            functools.partial(
                load_repeats, views=data.views, seed=self._views_seed, augmented=data.augment
            ),
            workers=data.workers,
            timeout_seconds=data.decode_timeout_seconds,
            quarantine=quarantine,
        )

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._clips) // self._clips_per_batch)

    @property
    def wait_seconds(self) -> float:
        """How long the consumer has waited for batches, in all."""
        return self._loader.wait_seconds

    def keeping_workers(self) -> AbstractContextManager[None]:
        """Let epochs inside the block take the workers of those before them."""
        return self._loader.keeping_workers()

    def epoch(self, epoch: int, first_step: int = 0) -> "Iterator[dict[str, Tensor | int]]":
        """Batches of an epoch from step `first_step` on, as `collate` makes them, and more.

        That is "epoch"; "repeat" int64 [B], which of its clip's views each is; and where the
        recipe asks for it, boxes "erased" int64 [B,4] (empty for none) and "mix" float32 [B,5],
        what `augment.draw_mixing` gives for each view. Raises `StateError` when too many clips
        cannot be decoded.
        """
        order = draw.generator("shuffle", self._seed, epoch).permutation(len(self._clips))
        view = epoch if self._views_per_clip is None else epoch % self._views_per_clip
        first_view = view * self._augmented.repeats
        tasks = [Task(self._clips[i], first_view) for i in order]
        size = self._clips_per_batch
        starts = range(first_step * size, len(tasks), size)
        shares = [self._part.share(tasks[start : start + size]) for start in starts]
        batches = self._loader.run(own for own, _ in shares)
        for start, (_, is_spare), items in zip(starts, shares, batches, strict=True):
            batch = {**self._collate(items or self._next_good(tasks, start)), "epoch": epoch}
            yield {**batch, "is_spare": True} if is_spare else batch

    def _collate(self, items: list[tuple[Task, list[View]]]) -> "dict[str, Tensor]":
        import torch  # as in `collate`

        flat = [
            (dataclasses.replace(task, view=view.number), view)
            for task, views in items
            for view in views
        ]
        batch = collate(flat)
        batch["repeat"] = batch["view"] % self._augmented.repeats
        if self._augmented.erase is not None:
            batch["erased"] = torch.tensor([view.erased or (0, 0, 0, 0) for _, view in flat])
        if self._mixing is not None:
            draws = [
                augment.draw_mixing(
                    self._mixing,
                    self._image_size,
                    rng=draw.generator("mix", self._views_seed, task.clip.id, task.view),
                )
                for task, _ in flat
            ]
            batch["mix"] = torch.tensor(draws, dtype=torch.float32)
        return batch

    def _next_good(self, tasks: list[Task], start: int) -> list[tuple[Task, list[View]]]:
        following = tasks[start:] + tasks[:start]
        for items in self._loader.run([task] for task in following):
            if items:
                return items
        raise StateError("none of the clips can be decoded; see the quarantine for the reasons")


def _num_frames(clip: Clip, video: Video) -> int:
    """The video's frames; of a folder those that the list states, which have to be there."""
    if clip.num_frames is None:
        return video.num_frames
    if clip.num_frames > video.num_frames:
        raise InputError(
            f"{clip.path}: {video.num_frames} frames where the list states {clip.num_frames}"
        )
    return clip.num_frames


def _finish(
    video: Video,
    indices: np.ndarray,
    frames: Frames,
    crop: augment.Crop,
    *,
    flip: bool,
    antialias: bool = True,
    number: int | None = None,
    seed: int | None = None,
    operations: tuple[tuple[str, float], ...] = (),
    erased: tuple[int, int, int, int] | None = None,
) -> View:
    pixels = augment.apply(
        frames.pixels, crop, flip=flip, operations=operations, antialias=antialias
    )
    return View(
        pixels=pixels,
        frames=indices.astype(np.int64),
        pts_seconds=frames.pts_seconds,
        crop=(crop.x, crop.y, crop.width, crop.height),
        flip=flip,
        decoder=video.backend,
        resize=crop.resize,
        number=number,
        seed=seed,
        operations=operations,
        erased=erased,
    )
