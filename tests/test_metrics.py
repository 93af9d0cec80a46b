"""Numbers from views' scores: against scikit-learn, and against their formulas written out."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from distill.data.index import Clip
from distill.evaluation.metrics import (
    Answers,
    all_metrics,
    average_precisions,
    class_rows,
    confidence_intervals,
    confusion_matrix,
    measure,
    merge_views,
    resampled_weights,
)
from distill.evaluation.scores import Evaluation, Scores, in_order


def clip(number: int, label: int, name: str | None = None, **times: float) -> Clip:
    name = name or f"{number}.mp4"
    return Clip(id=number, path=f"/v/{name}", name=name, label=label, line=number, **times)


def scores(*views: tuple[int, int, list[float]]) -> Scores:
    """Views as (clip id, clip index, logits)."""
    return Scores(
        clip_id=torch.tensor([view[0] for view in views]),
        clip_index=torch.tensor([view[1] for view in views]),
        crop_index=torch.zeros(len(views), dtype=torch.long),
        pixels_hash=torch.arange(len(views)),
        logits=torch.tensor([view[2] for view in views]),
    )


def measured(views: Scores, clips: list[Clip], *, num_views: int = 1, resamples: int = 0) -> dict:
    manifest = {
        "question": {"classes": views.logits.shape[1]},
        "views": {"clips": num_views, "crops": 1},
        "run": {"split": "test"},
    }
    seen = set(views.clip_id.tolist())
    why = {one.id: "no such file" for one in clips if one.id not in seen}
    return measure(Evaluation(views, clips, why, manifest), resamples=resamples)


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


def one_view_each(clips: list[Clip], logits: torch.Tensor) -> Scores:
    return scores(*((one.id, 0, row) for one, row in zip(clips, logits.tolist(), strict=True)))


@pytest.fixture
def drawn() -> tuple[list[Clip], torch.Tensor]:
    """60 clips of six classes, the last of which has none, and scores worth something."""
    rng = torch.Generator().manual_seed(0)
    clips = [clip(number, number % 5) for number in range(60)]
    logits = torch.randn(60, 6, generator=rng)
    logits[torch.arange(60), torch.arange(60) % 5] += 1.0
    return clips, logits


def test_softmaxes_are_averaged_and_not_logits():
    views = scores((1, 0, logs(0.999, 0.001)), (1, 1, logs(0.4, 0.6)), (1, 2, logs(0.05, 0.95)))
    assert views.logits.softmax(1).mean(0).argmax() == 1
    assert views.logits.mean(0).argmax() == 0
    assert measured(views, [clip(1, 1)], num_views=3)["top1"] == 100.0
    assert measured(views, [clip(1, 0)], num_views=3)["top1"] == 0.0


def test_top1_and_top5_are_percent_over_clips():
    falling = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    clips = [clip(1, 0), clip(2, 1), clip(3, 4), clip(4, 5)]
    found = measured(scores(*((c.id, 0, falling) for c in clips)), clips)
    assert (found["top1"], found["top5"]) == (25.0, 75.0)
    assert (found["top1_of_read"], found["top5_of_read"]) == (25.0, 75.0)


def test_missing_clips_are_named_counted_as_wrong_and_reported_both_ways():
    clips = [clip(1, 0), clip(2, 0, "a/b.mp4"), clip(3, 1), clip(4, 0)]
    views = scores((1, 0, [2.0, 1.0]), (3, 0, [2.0, 1.0]), (4, 0, [2.0, 1.0]))
    found = measured(views, clips)
    assert (found["num_clips"], found["num_missing"], found["missing"]) == (4, 1, ["a/b.mp4"])
    assert found["unreadable"] == {"a/b.mp4": "no such file"}
    assert found["top1"] == 50.0
    assert found["top1_of_read"] == pytest.approx(100 * 2 / 3)
    assert (found["top5"], found["top5_of_read"]) == (75.0, 100.0)
    # Class 0 has three clips, two of them right and one missing; class 1 one clip, wrong.
    assert found["mean_class_accuracy"] == pytest.approx(100 * (2 / 3 + 0) / 2)
    assert found["mean_class_accuracy_of_read"] == pytest.approx(100 * (1 + 0) / 2)
    # All scores are equal, so there is one threshold; the missing clip is beyond it.
    assert found["map"] == pytest.approx(100 * (2 / 3 * 2 / 3 + 1 / 3) / 2)
    assert found["map_of_read"] == pytest.approx(100 * (2 / 3 + 1 / 3) / 2)


def test_a_clip_with_some_views_is_scored_by_them_and_named():
    clips = [clip(1, 0), clip(2, 1)]
    views = scores((1, 0, [2.0, 1.0]), (1, 1, [2.0, 1.0]), (2, 1, [1.0, 2.0]))
    found = measured(views, clips, num_views=2)
    assert (found["top1"], found["num_missing"]) == (100.0, 0)
    assert (found["num_incomplete"], found["incomplete"]) == (1, ["2.mp4"])


def test_equal_file_names_in_two_folders_stay_two_clips():
    clips = [clip(1, 0, "a/x.mp4"), clip(2, 1, "b/x.mp4")]
    found = measured(scores((1, 0, [9.0, 0.0]), (2, 0, [0.0, 1.0])), clips)
    assert (found["top1"], found["num_videos"]) == (100.0, 2)


def test_average_precision_by_hand():
    """Right at ranks 1, 3 and 4 of five: the mean of the precisions 1, 2/3 and 3/4 there."""
    likely = [0.9, 0.8, 0.7, 0.6, 0.1]
    clips = [clip(i, label) for i, label in enumerate([1, 0, 1, 1, 0])]
    found = measured(scores(*((i, 0, logs(1 - p, p)) for i, p in enumerate(likely))), clips)
    of_one = (1 + 2 / 3 + 3 / 4) / 3
    of_zero = (1 + 2 / 4) / 2  # from the other end: ranks 1 and 4
    assert found["map"] == pytest.approx(100 * (of_one + of_zero) / 2)
    # The precision of 2/3 is followed by the higher 3/4, which takes its place.
    interpolated = (1 + 3 / 4 + 3 / 4) / 3
    assert found["video_map_interpolated"] == pytest.approx(100 * (interpolated + of_zero) / 2)


def test_metrics_are_those_of_scikit_learn(drawn):
    clips, logits = drawn
    found = measured(one_view_each(clips, logits), clips)
    labels = np.array([one.label for one in clips])
    probabilities = logits.double().softmax(dim=1).numpy()
    ones = [
        sklearn_metrics.average_precision_score(labels == number, probabilities[:, number])
        for number in range(5)
    ]
    top5 = sklearn_metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=range(6))
    best = probabilities.argmax(axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that were predicted and have no clips
        balanced = sklearn_metrics.balanced_accuracy_score(labels, best)
    assert found["top1"] == pytest.approx(100 * (best == labels).mean())
    assert found["top5"] == pytest.approx(100 * top5)
    assert found["mean_class_accuracy"] == pytest.approx(100 * balanced)
    assert found["map"] == pytest.approx(100 * np.mean(ones))
    assert 20 < found["top1"] < 90 and 20 < found["map"] < 90
    answers = merge_views(one_view_each(clips, logits), clips, num_classes=6)
    confusion = confusion_matrix(answers)
    expected = sklearn_metrics.confusion_matrix(labels, best, labels=range(6))
    assert confusion[:, :6].tolist() == expected.tolist()
    assert confusion[:, 6].tolist() == [0] * 6
    rows = class_rows(answers)
    assert [row["ap"] for row in rows[:5]] == pytest.approx([100 * one for one in ones])
    assert [row["top1"] for row in rows[:5]] == pytest.approx(
        [100 * (best[labels == number] == number).mean() for number in range(5)]
    )
    assert rows[5] == {"class": 5, "clips": 0, "read": 0, "top1": None, "ap": None}


def test_weighted_average_precision_with_equal_scores_is_that_of_scikit_learn():
    """Scores of few values, so that most clips share a threshold; weights as of resamples."""
    rng = np.random.default_rng(0)
    likely = rng.integers(0, 5, (40, 3)) / 4
    is_right = np.eye(3, dtype=bool)[rng.integers(0, 3, 40)]
    answers = Answers(likely, is_right, np.ones(40, bool), np.arange(40))
    weights = rng.integers(0, 3, (7, 40)).astype(np.float32)
    found, _ = average_precisions(answers, weights)
    for row, values in zip(weights, found, strict=True):
        assert values.tolist() == pytest.approx(
            [
                sklearn_metrics.average_precision_score(
                    is_right[:, number], likely[:, number], sample_weight=row
                )
                for number in range(3)
            ]
        )


def activitynet_precision(likely: np.ndarray, is_right: np.ndarray) -> float:
    """As its definition reads: all-points interpolation of precision over recall."""
    order = np.argsort(-likely)
    hits = is_right[order].cumsum()
    precision = hits / np.arange(1, len(order) + 1)
    recall = hits / is_right.sum()
    area, before = 0.0, 0.0
    for level in sorted(set(recall) - {0.0}):
        area += (level - before) * precision[recall >= level].max()
        before = level
    return area


def test_intervals_are_merged_into_videos_with_all_their_labels():
    """Three videos: intervals of one class, of two classes, and a single one."""
    rng = torch.Generator().manual_seed(1)
    places = [("a", 0), ("a", 0), ("b", 0), ("b", 2), ("b", 2), ("c", 1)]
    clips = [
        clip(i, label, name, start_seconds=float(i), end_seconds=i + 0.5, total_seconds=9.0)
        for i, (name, label) in enumerate(places)
    ]
    logits = torch.randn(6, 3, generator=rng)
    found = measured(one_view_each(clips, logits), clips)
    soft = logits.double().softmax(dim=1).numpy()
    means = np.stack([soft[:2].mean(0), soft[2:5].mean(0), soft[5]])
    is_right = np.array([[1, 0, 0], [1, 0, 1], [0, 1, 0]], bool)
    assert (found["num_clips"], found["num_videos"]) == (6, 3)
    assert found["video_top1"] == pytest.approx(100 * is_right[range(3), means.argmax(1)].mean())
    plain = [sklearn_metrics.average_precision_score(is_right[:, c], means[:, c]) for c in range(3)]
    interpolated = [activitynet_precision(means[:, c], is_right[:, c]) for c in range(3)]
    assert found["video_map"] == pytest.approx(100 * np.mean(plain))
    assert found["video_map_interpolated"] == pytest.approx(100 * np.mean(interpolated))
    labels = np.array([one.label for one in clips])
    per_interval = [
        sklearn_metrics.average_precision_score(labels == c, soft[:, c]) for c in range(3)
    ]
    assert found["map"] == pytest.approx(100 * np.mean(per_interval))
    assert found["map"] != pytest.approx(found["video_map"])


def test_a_video_goes_by_the_intervals_that_could_be_read():
    clips = [
        clip(0, 0, "a", start_seconds=0.0, end_seconds=1.0),
        clip(1, 0, "a", start_seconds=1.0, end_seconds=2.5),
        clip(2, 1, "b"),
    ]
    found = measured(scores((0, 0, logs(0.7, 0.3))), clips)
    assert found["missing"] == ["a (1 to 2.5 s)", "b"]
    assert (found["top1"], found["top1_of_read"]) == (pytest.approx(100 / 3), 100.0)
    assert (found["video_top1"], found["video_top1_of_read"]) == (50.0, 100.0)
    assert (found["video_map"], found["video_map_of_read"]) == (50.0, 100.0)


def test_interpolated_precision_is_that_of_activitynet(drawn):
    clips, logits = drawn
    found = measured(one_view_each(clips, logits), clips)
    soft, labels = logits.double().softmax(dim=1).numpy(), np.arange(60) % 5
    expected = [activitynet_precision(soft[:, c], labels == c) for c in range(5)]
    assert found["video_map_interpolated"] == pytest.approx(100 * np.mean(expected))
    assert found["video_map_interpolated"] > found["map"] + 1


def test_metrics_of_a_resample_are_those_of_its_clips_counted_repeatedly(drawn):
    """A resample as weights gives what the list with its lines repeated gives."""
    clips, logits = drawn
    answers = merge_views(one_view_each(clips, logits), clips, num_classes=6)
    (weights,) = resampled_weights(answers, resamples=3)
    assert weights.sum(axis=1).tolist() == [60.0, 60.0, 60.0]
    found = all_metrics(answers, weights)
    for row in range(3):
        taken = np.repeat(np.arange(60), weights[row].astype(int))
        repeated = [clip(i, clips[place].label) for i, place in enumerate(taken)]
        expected = measured(one_view_each(repeated, logits[taken]), repeated)
        for name, values in found.items():
            assert values[row] == pytest.approx(expected[name]), name


def test_confidence_intervals_are_percentiles_of_a_seeded_bootstrap(drawn):
    clips, logits = drawn
    found = measured(one_view_each(clips, logits), clips, resamples=2000)
    intervals = found["confidence_intervals"]
    assert (intervals["confidence"], intervals["resamples"]) == (0.95, 2000)
    for name in ("top1", "top5", "mean_class_accuracy", "map", "video_map_interpolated"):
        low, high = intervals[name]
        assert low < found[name] < high
    # Of a share p of n clips, close to p +- 1.96 sqrt(p (1 - p) / n).
    share = found["top1"] / 100
    half = 100 * 1.96 * math.sqrt(share * (1 - share) / 60)
    assert intervals["top1"] == pytest.approx([found["top1"] - half, found["top1"] + half], abs=1.7)
    answers = merge_views(one_view_each(clips, logits), clips, num_classes=6)
    assert confidence_intervals(answers, resamples=2000) == intervals
    assert confidence_intervals(answers, resamples=2000, seed=1) != intervals
    assert "confidence_intervals" not in measured(one_view_each(clips, logits), clips)


def test_intervals_of_a_video_are_resampled_together(drawn):
    clips, logits = drawn
    named = [clip(one.id, one.label, f"{one.id // 6}.mp4") for one in clips]
    answers = merge_views(one_view_each(named, logits), named, num_classes=6)
    (weights,) = resampled_weights(answers, resamples=50)
    by_video = weights.reshape(50, 10, 6)
    assert (by_video == by_video[:, :, :1]).all()
    assert (weights.sum(axis=1) == 60).all()
    assert len(np.unique(weights)) > 2


def test_the_order_in_which_views_come_does_not_matter():
    rng = torch.Generator().manual_seed(0)
    clips = [clip(number, number % 3) for number in range(20)]
    rows = [(c.id, v, torch.randn(3, generator=rng).tolist()) for c in clips for v in range(4)]
    shuffled = [rows[i] for i in torch.randperm(len(rows), generator=rng)]
    first = measured(scores(*rows), clips, num_views=4)
    assert 0 < first["top1"] < 100
    ordered = in_order(scores(*shuffled), clips)
    assert ordered.logits.tolist() == [row[2] for row in rows]
    assert measured(ordered, clips, num_views=4) == first


def test_a_view_that_comes_twice_is_an_error():
    views = scores((1, 0, [1.0, 0.0]), (2, 0, [1.0, 0.0]), (1, 0, [1.0, 0.0]))
    with pytest.raises(RuntimeError, match="a view was scored twice"):
        in_order(views, [clip(1, 0), clip(2, 0)])
