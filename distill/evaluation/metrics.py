"""Numbers from the scores of views: how views become clips, clips videos, and those percentages.

Views of a clip are merged by the mean of their softmaxes, and the clips of a video (intervals of
an untrimmed one, told by equal names in the list) by the mean of theirs. A clip without any view
is missing: it counts as wrong in every number, and `NAME_of_read` is the number without it.

top1, top5: share of the clips whose label has the highest score, or is among the five highest.
mean_class_accuracy: top-1 within each class that has clips, then the mean over those classes.
map: average precision within each class that has clips, over all clips by their score of that
class: sum over thresholds of (recall gained) x precision, equal scores being one threshold, not
interpolated, as scikit-learn's `average_precision_score`; then the mean over those classes. What
is missing is never retrieved, so a class's recall ends at the share of its clips that were read.
video_top1, video_top5, video_mean_class_accuracy, video_map: the same over videos. A video has
the labels of all its intervals, and any of them is right.
video_map_interpolated: with precision replaced by the highest one at any greater recall. This is
what ActivityNet's own code calls mAP (activitynet/ActivityNet: Evaluation/eval_classification.py
and utils.py, interpolated_prec_rec), so the number to put beside ActivityNet's and HACS's
published classification mAP. InternVideo2 publishes such numbers without any code for them, so
which of the two it means is not known; they differ little.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from distill import draw
from distill.data.index import Clip
from distill.evaluation.scores import Evaluation, Scores, clip_title

TOP = 5
RESAMPLES = 1000
CONFIDENCE = 0.95
_CHUNK = 100  # resamples at a time
_CLIP_METRICS = ("top1", "top5", "mean_class_accuracy", "map")


@dataclass(frozen=True)
class _Ranking:
    """Who is retrieved for a class, the highest score first, as far as the last right answer.

    Rows of the answers: `retrieved` in order, `right` those of them that are, `never` the right
    ones that were not read. Equal scores are retrieved together: `ends` are the places at which
    a group with something right ends, `firsts` where in `right` it begins.
    """

    retrieved: np.ndarray
    right: np.ndarray
    never: np.ndarray
    ends: np.ndarray
    firsts: np.ndarray


@dataclass(frozen=True)
class Answers:
    """Scores [n,C] of n clips or videos in float64, and which classes are right: bool [n,C].

    `is_read` [n] is false where there are no scores. `video` [n] numbers the video of each: the
    unit that a resample takes or leaves, for intervals of one are not independent.
    """

    scores: np.ndarray
    is_right: np.ndarray
    is_read: np.ndarray
    video: np.ndarray

    @cached_property
    def of_videos(self) -> "Answers":
        """The answer for each video: the mean of its clips' that were read, the labels of all."""
        count = int(self.video.max()) + 1
        sums, is_right = np.zeros((2, count, self.scores.shape[1]))
        np.add.at(sums, self.video, self.scores)
        np.add.at(is_right, self.video, self.is_right)
        num_read = np.bincount(self.video, weights=self.is_read, minlength=count)
        means = sums / np.maximum(num_read, 1)[:, None]
        return Answers(means, is_right > 0, num_read > 0, np.arange(count))

    @cached_property
    def best(self) -> np.ndarray:
        """The classes with the highest scores [n,TOP]; the lower class of equal ones."""
        return np.argsort(-self.scores, axis=1, kind="stable")[:, :TOP]

    @cached_property
    def hits(self) -> np.ndarray:
        """Whether each of the best classes is right: bool [n,TOP]."""
        return np.take_along_axis(self.is_right, self.best, axis=1) & self.is_read[:, None]

    @cached_property
    def rankings(self) -> list[_Ranking | None]:
        """Of each class, None for one that nothing belongs to."""
        read = np.flatnonzero(self.is_read)
        return [self._rank(number, read) for number in range(self.scores.shape[1])]

    def _rank(self, number: int, read: np.ndarray) -> _Ranking | None:
        is_right = self.is_right[:, number]
        if not is_right.any():
            return None
        order = read[np.argsort(-self.scores[read, number], kind="stable")]
        places = np.flatnonzero(is_right[order])
        scores = self.scores[order, number]
        last = np.searchsorted(-scores, -scores[places], side="right") - 1  # of equal scores
        ends, firsts = np.unique(last, return_index=True)
        never = np.flatnonzero(is_right & ~self.is_read)
        return _Ranking(
            order[: ends[-1] + 1 if len(ends) else 0], order[places], never, ends, firsts
        )


def merge_views(scores: Scores, clips: Sequence[Clip], *, num_classes: int) -> Answers:
    """The answer for each clip of the list: the mean of its views' softmaxes, in float64."""
    means, views = mean_over_views(scores, scores.logits.double().softmax(dim=1), clips)
    is_right = np.zeros((len(clips), num_classes), bool)
    is_right[np.arange(len(clips)), [clip.label for clip in clips]] = True
    number_of: dict[str, int] = {}
    video = [number_of.setdefault(clip.name, len(number_of)) for clip in clips]
    return Answers(means, is_right, views > 0, np.array(video))


def mean_over_views(
    scores: Scores, values: torch.Tensor, clips: Sequence[Clip]
) -> tuple[np.ndarray, np.ndarray]:
    """The mean [n,C] of each clip's rows of `values` [R,C], and how many it has [n]."""
    rows = torch.from_numpy(_rows(scores, clips))
    sums = torch.zeros(len(clips), values.shape[1], dtype=values.dtype)
    sums.index_add_(0, rows, values)
    views = torch.bincount(rows, minlength=len(clips)).numpy()
    return sums.numpy() / np.maximum(views, 1)[:, None], views


def weighted_metrics(answers: Answers, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Percentages [W] for each of W ways to weigh the answers [W,n], as counting some repeatedly.

    Names are those of this module without `video_`; `map_interpolated` is among them.
    """
    totals = weights.sum(axis=1, dtype=np.float64)
    top1 = (weights @ answers.hits[:, 0].astype(weights.dtype)).astype(np.float64)
    top5 = (weights @ answers.hits.any(axis=1).astype(weights.dtype)).astype(np.float64)
    right, members = class_counts(answers, weights)
    plain, interpolated = average_precisions(answers, weights)
    return {
        "top1": 100 * top1 / totals,
        "top5": 100 * top5 / totals,
        "mean_class_accuracy": 100 * _mean_of_present(right / np.maximum(members, 1), members),
        "map": 100 * _mean_of_present(plain, members),
        "map_interpolated": 100 * _mean_of_present(interpolated, members),
    }


def class_counts(answers: Answers, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight [W,C] of the answers right at first guess, and of all, among those of each class."""
    is_right = answers.is_right.astype(weights.dtype)
    is_hit = np.zeros_like(is_right)
    np.put_along_axis(is_hit, answers.best[:, :1], answers.hits[:, :1], axis=1)
    return (weights @ is_hit).astype(np.float64), (weights @ is_right).astype(np.float64)


def average_precisions(answers: Answers, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average precision of each class [W,C] in float64, plain and interpolated; 0 for no members.

    scikit-learn's takes a few milliseconds for each, and a thousand resamples of some hundred
    classes half an hour; here a class is sorted once for all of them.
    """
    plain, interpolated = np.zeros((2, len(weights), answers.scores.shape[1]))
    columns = np.ascontiguousarray(weights.T)  # [n,W], so that a row is gathered at once
    for number, ranking in enumerate(answers.rankings):
        if ranking is None or not len(ranking.right):
            continue
        starts = np.concatenate([[0], ranking.ends[:-1] + 1])
        seen = np.add.reduceat(columns[ranking.retrieved], starts).cumsum(axis=0, dtype=np.float64)
        gained = np.add.reduceat(columns[ranking.right], ranking.firsts).astype(np.float64)
        found = gained.cumsum(axis=0)
        total = np.maximum(found[-1] + columns[ranking.never].sum(axis=0), 1)
        precision = found / np.maximum(seen, 1)  # without weight so far both are 0
        highest = np.maximum.accumulate(precision[::-1])[::-1]
        plain[:, number] = (gained * precision).sum(axis=0) / total
        interpolated[:, number] = (gained * highest).sum(axis=0) / total
    return plain, interpolated


def measure(evaluation: Evaluation, *, resamples: int = 0) -> dict:
    """All numbers of an evaluation, in percent, as JSON values; see this module.

    With `resamples`, `confidence_intervals` has the percentiles of so many bootstrap resamples.
    """
    views, clips = evaluation.manifest["views"], evaluation.clips
    answers = merge_views(
        evaluation.scores, clips, num_classes=evaluation.manifest["question"]["classes"]
    )
    per_view = np.bincount(_rows(evaluation.scores, clips), minlength=len(clips))
    num_views = views["clips"] * views["crops"]
    titles = np.array([clip_title(clip) for clip in clips], object)
    missing = titles[~answers.is_read].tolist()
    incomplete = titles[answers.is_read & (per_view < num_views)].tolist()
    result = {
        "split": evaluation.manifest["run"]["split"],
        "clips": views["clips"],
        "crops": views["crops"],
        **numbers(answers),
        "num_clips": len(clips),
        "num_videos": int(answers.video.max()) + 1,
        "num_missing": len(missing),
        "num_incomplete": len(incomplete),
        "missing": missing,
        "incomplete": incomplete,
        "unreadable": {
            clip_title(clip): evaluation.unreadable[clip.id]
            for clip in clips
            if clip.id in evaluation.unreadable
        },
    }
    if resamples:
        result["confidence_intervals"] = confidence_intervals(answers, resamples=resamples)
    return result | {"manifest": evaluation.manifest}


def numbers(answers: Answers) -> dict[str, float]:
    """Every metric over all clips and, with `_of_read`, over those that could be read."""
    ones = np.ones(len(answers.scores))
    both = all_metrics(answers, np.stack([ones, answers.is_read * ones]))
    whole = {name: float(values[0]) for name, values in both.items()}
    return whole | {f"{name}_of_read": float(values[1]) for name, values in both.items()}


def all_metrics(answers: Answers, weights: np.ndarray) -> dict[str, np.ndarray]:
    """`weighted_metrics` of the clips, and under `video_` names of their videos.

    Weights [W,n] are of clips; a video has the highest of its clips'.
    """
    clips = weighted_metrics(answers, weights)
    videos = clips
    num_videos = int(answers.video.max()) + 1
    if num_videos < len(answers.video):
        of_videos = np.zeros((num_videos, len(weights)), weights.dtype)
        np.maximum.at(of_videos, answers.video, weights.T)
        videos = weighted_metrics(answers.of_videos, of_videos.T)
    return {
        **{name: clips[name] for name in _CLIP_METRICS},
        **{f"video_{name}": value for name, value in videos.items()},
    }


def resampled_weights(answers: Answers, *, resamples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each clip [w,n] is in a resample, in float32; clips of a video stay together."""
    num_videos = int(answers.video.max()) + 1
    rng = draw.generator("bootstrap", seed)
    for start in range(0, resamples, _CHUNK):
        count = min(_CHUNK, resamples - start)
        taken = rng.integers(num_videos, size=(count, num_videos))
        taken += num_videos * np.arange(count)[:, None]
        weights = np.bincount(taken.ravel(), minlength=count * num_videos)
        weights = weights.reshape(count, num_videos).astype(np.float32)
        yield weights[:, answers.video]


def confidence_intervals(answers: Answers, *, resamples: int, seed: int = 0) -> dict:
    """Percentile bootstrap of every metric: resamples of the videos with replacement."""
    chunks = [
        all_metrics(answers, weights)
        for weights in resampled_weights(answers, resamples=resamples, seed=seed)
    ]
    return {
        "confidence": CONFIDENCE,
        "resamples": resamples,
        **{name: percentiles(np.concatenate([c[name] for c in chunks])) for name in chunks[0]},
    }


def percentiles(values: np.ndarray) -> list[float]:
    """The ends of the middle part of resampled values."""
    tail = 50 * (1 - CONFIDENCE)
    return [float(value) for value in np.percentile(values, [tail, 100 - tail])]


def class_rows(answers: Answers) -> list[dict]:
    """A row for each class: how many clips, how many of them were read, top-1 and AP in percent.

    Both are None for a class without clips.
    """
    ones = np.ones((1, len(answers.scores)))
    (right,), (members,) = class_counts(answers, ones)
    (precision,), _ = average_precisions(answers, ones)
    read = answers.is_right[answers.is_read].sum(axis=0)
    return [
        {
            "class": number,
            "clips": int(members[number]),
            "read": int(read[number]),
            "top1": 100 * right[number] / members[number] if members[number] else None,
            "ap": 100 * precision[number] if members[number] else None,
        }
        for number in range(len(members))
    ]


def confusion_matrix(answers: Answers) -> np.ndarray:
    """Clips [C,C+1] by label and by best class; the last column counts those without scores."""
    num_classes = answers.scores.shape[1]
    labels = answers.is_right.argmax(axis=1)
    found = np.where(answers.is_read, answers.best[:, 0], num_classes)
    counts = np.zeros((num_classes, num_classes + 1), np.int64)
    np.add.at(counts, (labels, found), 1)
    return counts


def _mean_of_present(values: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Mean [W] over the classes that have members [W,C]."""
    present = members > 0
    return (values * present).sum(axis=1) / np.maximum(present.sum(axis=1), 1)


def _rows(scores: Scores, clips: Sequence[Clip]) -> np.ndarray:
    row_of = {clip.id: row for row, clip in enumerate(clips)}
    return np.array([row_of[clip_id] for clip_id in scores.clip_id.tolist()], np.int64)
