"""Evaluations and comparisons of them, as tables for the console."""

import json

from rich.table import Table

from distill.evaluation.compare import Comparison, Differences
from distill.evaluation.metrics import CONFIDENCE

_CLIPS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_class_accuracy": "mean class accuracy",
    "map": "mAP",
}
_VIDEOS = {f"video_{name}": f"{text}, of videos" for name, text in _CLIPS.items()}
_INTERPOLATED = {"video_map_interpolated": "mAP of videos, interpolated as ActivityNet's"}


def result_table(result: dict, *, title: str) -> Table:
    """The metrics of `distill.evaluation.metrics.measure`, with what is known of their uncertainty.

    Metrics of videos are shown where a video has several clips. Where clips are missing, a last
    column has the numbers without them.
    """
    table = Table("", title=title, title_justify="left")
    intervals = result.get("confidence_intervals")
    table.add_column(f"% of {result['num_clips']:,} clips", justify="right")
    if intervals:
        table.add_column(f"{intervals['confidence']:.0%} interval", justify="right")
    if result["num_missing"]:
        read = result["num_clips"] - result["num_missing"]
        table.add_column(f"% of {read:,} that could be read", justify="right")
    for name, text in _shown(result["num_clips"], result["num_videos"]).items():
        row = [text, f"{result[name]:.2f}"]
        if intervals:
            low, high = intervals[name]
            row.append(f"{low:.2f} to {high:.2f}")
        if result["num_missing"]:
            row.append(f"{result[f'{name}_of_read']:.2f}")
        table.add_row(*row)
    return table


def comparison_tables(comparison: Comparison) -> list[Table]:
    """By how much the numbers differ, where that makes sense, and which fields of the manifest."""
    tables = []
    if comparison.differences is not None:
        found = comparison.differences
        table = Table("", title="metrics, %", title_justify="left")
        for heading in ("first", "second", "difference", f"{CONFIDENCE:.0%} interval of it"):
            table.add_column(heading, justify="right")
        for name, text in _shown(found.num_clips, found.num_videos).items():
            one = found.metrics[name]
            row = f"{one.first:.2f}", f"{one.second:.2f}", f"{one.second - one.first:+.2f}"
            table.add_row(text, *row, f"{one.low:+.2f} to {one.high:+.2f}")
        tables.append(table)
    if comparison.differing:
        table = Table("", "first", "second", title="what differs", title_justify="left")
        for name, values in comparison.differing.items():
            table.add_row(name, *(_text(value) for value in values))
        tables.append(table)
    return tables


def mcnemar_line(found: Differences) -> str:
    """What the videos that only one of the two got right say."""
    return (
        f"top-1: {found.only_first:,} of {found.num_videos:,} right in the first only, "
        f"{found.only_second:,} in the second only; exact McNemar test p = {found.p_value:.3g}"
    )


def _shown(num_clips: int, num_videos: int) -> dict[str, str]:
    return _CLIPS | (_VIDEOS if num_videos < num_clips else {}) | _INTERPOLATED


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
