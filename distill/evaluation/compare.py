"""Whether two evaluations may be compared, and how far apart they are."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from distill.errors import InputError
from distill.evaluation.metrics import (
    RESAMPLES,
    Answers,
    all_metrics,
    merge_views,
    percentiles,
    resampled_weights,
)
from distill.evaluation.scores import (
    RESULT_FILE,
    SCORES_FILE,
    Evaluation,
    Scores,
    in_order,
    read_evaluation,
)


@dataclass(frozen=True)
class Difference:
    """A metric of both in percent, and the paired bootstrap interval of `second` - `first`."""

    first: float
    second: float
    low: float
    high: float


@dataclass(frozen=True)
class Differences:
    """How far apart two evaluations of the same clips are.

    `only_first` and `only_second` count videos that just one of the two got right at first guess,
    and `p_value` is McNemar's exact one for these: how likely they would divide so unevenly if
    neither model were better.
    """

    num_clips: int
    num_videos: int
    metrics: dict[str, Difference]
    only_first: int
    only_second: int
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """`differing` maps a manifest's fields to the two values.

    Where the questions differ there are no `differences` of numbers.
    """

    verdict: str
    differing: dict[str, tuple]
    differences: Differences | None

    def report(self) -> dict:
        """The comparison as JSON values."""
        return asdict(self)


def compare(first: str | Path, second: str | Path, *, resamples: int = RESAMPLES) -> Comparison:
    """Compare two evaluations, each given as its folder, or a file in it; raises InputError.

    The bootstrap takes the same clips of both in each resample, all intervals of a video together.
    """
    a, b = (open_evaluation(path) for path in (first, second))
    differing = differing_fields(a.manifest, b.manifest)
    if any(field.startswith("question.") for field in differing):
        return Comparison(f"not comparable: {_what_differs(a, b)}", differing, None)
    verdict = "comparable: the same clips and labels, and the same pixels of them"
    views = [field for field in differing if field.startswith("views.")]
    if views:
        verdict = (
            "comparable with care: the same clips and labels, looked at differently "
            f"({', '.join(views)}{_how_many_pixels(a, b)})"
        )
    differences = _differences(a, _in_list_order_of(a, b), resamples=resamples)
    return Comparison(verdict, differing, differences)


def _differences(a: Evaluation, b: Evaluation, *, resamples: int) -> Differences:
    """Of two evaluations whose clips are in the same order."""
    answers = [_answers(one) for one in (a, b)]
    ones = np.ones((1, len(a.clips)))
    first, second = (all_metrics(one, ones) for one in answers)
    chunks = []
    for weights in resampled_weights(answers[0], resamples=resamples):
        of_first, of_second = (all_metrics(one, weights) for one in answers)
        chunks.append({name: of_second[name] - of_first[name] for name in of_first})
    hits = [one.of_videos.hits[:, 0] for one in answers]
    only_first, only_second = int((hits[0] & ~hits[1]).sum()), int((hits[1] & ~hits[0]).sum())
    return Differences(
        num_clips=len(a.clips),
        num_videos=len(hits[0]),
        metrics={
            name: Difference(
                float(first[name][0]),
                float(second[name][0]),
                *percentiles(np.concatenate([chunk[name] for chunk in chunks])),
            )
            for name in first
        },
        only_first=only_first,
        only_second=only_second,
        p_value=mcnemar(only_first, only_second),
    )


def open_evaluation(path: str | Path) -> Evaluation:
    """The evaluation in a folder, or of the evaluation.json or scores.safetensors given."""
    path = Path(path)
    if path.suffix != ".json":
        return read_evaluation(path / SCORES_FILE if path.is_dir() else path)
    found = read_evaluation(path.parent / SCORES_FILE)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8")).get("manifest")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; 'distill evaluate' writes it") from None
    except (ValueError, AttributeError):
        raise InputError(f"{path}: not an {RESULT_FILE} of 'distill evaluate'") from None
    if manifest != found.manifest:
        raise InputError(
            f"{path}: {SCORES_FILE} beside it is of another evaluation; keep each in a folder of "
            "its own"
        )
    return found


def differing_fields(first: dict, second: dict) -> dict[str, tuple]:
    """Fields of two manifests that differ, by their dotted names, with both values."""
    flat = [_flat(manifest) for manifest in (first, second)]
    names = dict.fromkeys([*flat[0], *flat[1]])
    pairs = {name: (flat[0].get(name), flat[1].get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test from the two counts of one-sided hits."""
    from scipy.stats import binomtest  # not at the top: it takes a second to import

    count = only_first + only_second
    return float(binomtest(only_first, count).pvalue) if count else 1.0


def _answers(evaluation: Evaluation) -> Answers:
    num_classes = evaluation.manifest["question"]["classes"]
    return merge_views(evaluation.scores, evaluation.clips, num_classes=num_classes)


def _in_list_order_of(first: Evaluation, second: Evaluation) -> Evaluation:
    """The second with its clips in the first's order, so that each resample takes the same."""
    clips = {clip.id: clip for clip in second.clips}
    ordered = [clips[clip.id] for clip in first.clips]
    scores = in_order(second.scores, ordered)
    return Evaluation(scores, ordered, second.unreadable, second.manifest)


def _what_differs(first: Evaluation, second: Evaluation) -> str:
    classes = [one.manifest["question"]["classes"] for one in (first, second)]
    if classes[0] != classes[1]:
        return f"{classes[0]} classes in the first, {classes[1]} in the second"
    labels = [{clip.id: clip.label for clip in one.clips} for one in (first, second)]
    both = labels[0].keys() & labels[1].keys()
    relabelled = sum(labels[0][key] != labels[1][key] for key in both)
    return (
        f"{len(labels[0]) - len(both)} clips only in the first, {len(labels[1]) - len(both)} only "
        f"in the second, and {relabelled} of the {len(both)} in both with another label"
    )


def _how_many_pixels(first: Evaluation, second: Evaluation) -> str:
    """Which share of the views differs, where both have the same ones."""
    pixels = [_pixels_of(one.scores) for one in (first, second)]
    both = pixels[0].keys() & pixels[1].keys()
    others = sum(pixels[0][key] != pixels[1][key] for key in both)
    return f": {others} of {len(both)} common views with other pixels"


def _pixels_of(scores: Scores) -> dict[tuple[int, int, int], int]:
    columns = (scores.clip_id, scores.clip_index, scores.crop_index, scores.pixels_hash)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return {(clip_id, clip, crop): pixels for clip_id, clip, crop, pixels in rows}


def _flat(section: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in section.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
