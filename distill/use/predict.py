"""A trained model at work: classes and features of videos, with the views of an evaluation."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from distill import recipe as schema
from distill.checkpoint import write_tensors
from distill.data.folder import SUFFIXES
from distill.data.index import Clip, clip_id, read_list
from distill.data.load import Task, collate, load_eval_view
from distill.engines.plain import autocast, pick_device, to_device
from distill.errors import InputError
from distill.evaluation.evaluate import Share, score_views
from distill.evaluation.metrics import TOP, mean_over_views
from distill.evaluation.scores import clip_title
from distill.students.encoder import embed
from distill.students.warmstart import file_sha256
from distill.use.describe import Description, Model, load_described

LISTS = (".csv", ".tsv", ".txt")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
BATCH_SIZE = 32  # views in a forward
NO_CLASSES = "a distilled student has features and no classes; finetune it, or ask for features"


class Guess(NamedTuple):
    """A class by its number, its name (the number again where none is known), and how likely."""

    label: int
    name: str
    probability: float


@dataclass(frozen=True)
class Result:
    """What became of a clip: `values` [C], the mean over its views, or None without any.

    `problem` says why views are missing.
    """

    clip: Clip
    values: np.ndarray | None
    problem: str | None

    @property
    def title(self) -> str:
        """What the clip is called."""
        return clip_title(self.clip)


class Embedder(nn.Module):
    """A model of which the pooled vector is wanted, classifier or not."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, clip: Tensor) -> Tensor:
        return embed(self.model, clip)


class LoadedModel:
    """A model on its device, and how its clips are made; see `distill.load_model`."""

    def __init__(self, model: Model, description: Description, file: Path) -> None:
        self.device = pick_device()
        self.model, self.description, self.file = model.to(self.device), description, file

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of all classes, in the order of labels; their numbers where names are not known."""
        names = self.description.class_names
        return names or tuple(map(str, range(self.description.num_classes)))

    def predict(
        self,
        video: str | PathLike[str],
        *,
        top: int = TOP,
        clips: int | None = None,
        crops: int | None = None,
    ) -> list[Guess]:
        """The likeliest classes of a video file or folder of frames, the best first.

        Scores are the mean of the softmaxes over `clips` x `crops` views, by default those of the
        model's evaluation. Raises InputError for a video that cannot be decoded, and for a model
        without classes.
        """
        self.check_classes()
        found = self.description
        views = self._views(video, clips=clips or found.clips, crops=crops or found.crops)
        logits = self._run(self.model, views)
        return self.guesses(logits.double().softmax(dim=1).mean(dim=0).numpy(), top=top)

    def features(self, video: str | PathLike[str], *, clips: int = 1, crops: int = 1) -> Tensor:
        """The pooled vector [P] of a video in float32, the mean over `clips` x `crops` views.

        It is what the attention pool emits, below any classifier. Raises InputError for a video
        that cannot be decoded.
        """
        views = self._views(video, clips=clips, crops=crops)
        return self._run(Embedder(self.model), views).mean(dim=0)

    def check_classes(self) -> None:
        """Raise InputError for a model that has no classes to name."""
        if not self.description.num_classes:
            raise InputError(f"{self.file}: {NO_CLASSES}")

    def guesses(self, probabilities: np.ndarray, *, top: int) -> list[Guess]:
        """The `top` classes of probabilities [C], the likeliest first; of equal ones the lower."""
        order = np.argsort(-probabilities, kind="stable")[:top].tolist()
        return [Guess(n, self.class_names[n], float(probabilities[n])) for n in order]

    def predict_all(
        self, videos: Sequence[Clip], *, clips: int | None, crops: int | None, workers: int
    ) -> list[Result]:
        """The probabilities [C] of many videos, which worker processes decode."""
        self.check_classes()
        found = self.description
        share = self._score(
            self.model,
            videos,
            width=found.num_classes,
            clips=clips or found.clips,
            crops=crops or found.crops,
            workers=workers,
            title="predict",
        )
        return _results(share, share.scores.logits.double().softmax(dim=1), videos)

    def features_of_all(
        self, videos: Sequence[Clip], *, clips: int, crops: int, workers: int
    ) -> list[Result]:
        """The pooled vectors [P] of many videos, which worker processes decode."""
        share = self._score(
            Embedder(self.model),
            videos,
            width=self.pooled_width,
            clips=clips,
            crops=crops,
            workers=workers,
            title="features",
        )
        return _results(share, share.scores.logits, videos)

    @property
    def pooled_width(self) -> int:
        """How wide features are."""
        return pooled_width(self.model)

    def _views(self, video: str | PathLike[str], *, clips: int, crops: int) -> Tensor:
        """Views uint8 [clips*crops,3,T,S,S], made in this process."""
        clip = as_clip(video)
        load = partial(
            load_eval_view, clip, num_clips=clips, num_crops=crops, views=self.description.views
        )
        made = [
            (Task(clip), load(clip_index=number, crop_index=crop))
            for number in range(clips)
            for crop in range(crops)
        ]
        return collate(made)["pixels"]

    def _run(self, network: nn.Module, views: Tensor) -> Tensor:
        parts = []
        for part in views.split(BATCH_SIZE):
            pixels = to_device({"pixels": part}, self.device)["pixels"]
            with torch.inference_mode(), autocast(self.device, self.description.precision):
                parts.append(network(pixels).float().cpu())
        return torch.cat(parts)

    def _score(
        self,
        network: nn.Module,
        videos: Sequence[Clip],
        *,
        width: int,
        clips: int,
        crops: int,
        workers: int,
        title: str,
    ) -> Share:
        return score_views(
            network.eval(),
            videos,
            data=schema.Data(
                train=schema.ClipList(list=None), views=self.description.views, workers=workers
            ),
            num_classes=width,
            num_clips=clips,
            num_crops=crops,
            batch_size=BATCH_SIZE,
            precision=self.description.precision,
            device=self.device,
            title=title,
        )


def _results(share: Share, values: Tensor, videos: Sequence[Clip]) -> list[Result]:
    means, views = mean_over_views(share.scores, values, videos)
    return [
        Result(clip, mean if count else None, share.unreadable.get(clip.id))
        for clip, mean, count in zip(videos, means, views.tolist(), strict=True)
    ]


def pooled_width(model: Model) -> int:
    """P of what `embed` gives."""
    return model.size.pooled_width if hasattr(model, "size") else model.pooled_width


def load_model(
    checkpoint: str | PathLike[str], *, recipe: str | None = None, names: str | None = None
) -> LoadedModel:
    """See `distill.load_model`; `names` is a file of class names."""
    return LoadedModel(*load_described(Path(checkpoint), recipe=recipe, names=names))


def write_features(
    path: str | Path, loaded: LoadedModel, results: Sequence[Result], *, clips: int, crops: int
) -> tuple[int, int]:
    """Write `features` float32 [n,P] with the names of the n videos that were read; its shape.

    Raises InputError where none was, or where the file cannot be written.
    """
    read = [result for result in results if result.values is not None]
    if not read:
        raise InputError("\n".join(str(result.problem) for result in results))
    features = torch.from_numpy(np.stack([result.values for result in read])).float()
    metadata = {
        "names": json.dumps([result.title for result in read], ensure_ascii=False),
        "model": loaded.description.recipe,
        "weights_sha256": file_sha256(loaded.file),
        "views": json.dumps({"clips": clips, "crops": crops}),
    }
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_tensors(Path(path), {"features": features}, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written: {error}") from None
    return tuple(features.shape)


def as_clip(video: str | PathLike[str]) -> Clip:
    """A whole video file or folder of frames as a clip; InputError where there is none."""
    path = Path(video).expanduser()
    if not path.exists():
        raise InputError(f"{video}: no such video; check the path")
    return Clip(id=clip_id(str(video)), path=str(path), name=str(video))


def find_videos(places: Sequence[str], *, prefix: str | None = None) -> list[Clip]:
    """The clips of videos, folders of them at any depth, and list files; each once.

    A folder of numbered images alone is a video. `prefix` is where a list's videos lie. Raises
    InputError for a place that is not there or holds no video.
    """
    clips = {clip.id: clip for place in places for clip in _find(place, prefix)}
    return list(clips.values())


def _find(place: str, prefix: str | None) -> Iterator[Clip]:
    path = Path(place).expanduser()
    if path.is_file() and path.suffix.lower() in LISTS:
        yield from read_list(schema.ClipList(list=place, prefix=prefix))
        return
    if not path.is_dir():
        yield as_clip(place)
        return
    files = sorted(file for file in path.rglob("*") if file.is_file())
    videos = [file for file in files if file.suffix.lower() in SUFFIXES]
    if videos:
        yield from map(as_clip, videos)
    elif any(file.suffix.lower() in IMAGES for file in path.iterdir()):
        yield as_clip(place)
    else:
        raise InputError(f"{place}: no video in it (a file that ends in {', '.join(SUFFIXES)})")
