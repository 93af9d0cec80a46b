"""A page about a view cache: what it is, sizes, its layers' statistics, and some of its views."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill import log
from distill.cache.inspect import (
    BINS,
    LONGEST,
    CacheReport,
    OpenedCache,
    open_any,
    sample_rows,
    visible_tokens,
)
from distill.cache.sheet import draw_frames
from distill.report.figures import Figure, figure, shades
from distill.report.page import render, write_page
from distill.run import pictures

SHOWN_VIEWS = 6
SHARD_BINS = 40


@dataclass(frozen=True)
class ShownView:
    """A record of the cache: strips as data URIs, by what they show."""

    name: str
    about: str
    strips: dict[str, str]


def write_cache_page(report: CacheReport, path: Path) -> None:
    """Write a page about an inspected cache; raises InputError where that cannot be."""
    opened = open_any(report.folder)
    page = render(
        "cache.html",
        title=report.folder.rstrip("/").rsplit("/", 1)[-1],
        folder=report.folder,
        tiles=_tiles(report),
        layers=layer_figures(report),
        sampled=report.sampled,
        sizes=size_figures(report, opened),
        masks=mask_figures(report),
        views=shown_views(opened),
        facts=[("Identity", [(name, str(value)) for name, value in report.identity.items()])],
        decoders=report.decoders,
        quarantined=report.quarantined,
    )
    write_page(path, page)


def _tiles(report: CacheReport) -> list[tuple[str, str, str]]:
    views = report.records_by_view
    each = sorted(set(views.values()))
    more = f"{each[0]:,} in each view" if len(each) == 1 else f"{each[0]:,} to {each[-1]:,} a view"
    record_bytes = sum(report.field_bytes.values())
    return [
        (f"{report.num_clips:,}", "clips", f"{report.quarantined:,} could not be decoded"),
        (f"{report.num_records:,}", f"records in {len(views)} views", more),
        (log.size_text(report.size_bytes), "in all", f"{report.num_shards:,} shards"),
        (log.size_text(record_bytes), "a record", f"{log.size_text(report.clip_bytes)} a clip"),
    ]


def size_figures(report: CacheReport, opened: OpenedCache) -> list[Figure]:
    """What takes the room: fields of a record, records of a view, bytes of records and shards."""
    fields = sorted(report.field_bytes.items(), key=lambda item: item[1])
    whole = sum(report.field_bytes.values())
    found = [
        figure(
            "A record's fields",
            [
                {
                    "type": "bar",
                    "orientation": "h",
                    "x": [size for _, size in fields],
                    "y": [name for name, _ in fields],
                    "customdata": [size / whole for _, size in fields],
                    "hovertemplate": "%{y}: %{x:,} bytes, %{customdata:.1%}<extra></extra>",
                    "meta": {"slot": 0},
                }
            ],
            x="bytes",
        ),
        figure(
            "Records of each view",
            [_bars(list(report.records_by_view), list(report.records_by_view.values()))],
            x="view",
            y="records",
            xaxis={"type": "category"},
        ),
    ]
    index = opened.cache.index
    shard_bytes = np.bincount(index.shard, weights=index.sizes, minlength=len(index.shards)) / 2**20
    found.append(
        figure("Sizes of shards", [_histogram(shard_bytes)], x="MiB of records", y="shards")
    )
    return found


def _bars(x: Sequence, y: Sequence) -> dict:
    return {"type": "bar", "x": x, "y": y, "meta": {"slot": 0}}


def _histogram(values: np.ndarray) -> dict:
    counts, edges = np.histogram(values, SHARD_BINS)
    middles = (edges[1:] + edges[:-1]) / 2
    return _bars(middles.round(6).tolist(), counts.tolist())


def layer_figures(report: CacheReport) -> list[Figure]:
    """How each layer's rows lie: their mean, what is left of them, and the largest channel."""
    layers, places = report.layers, {}
    text = []
    for layer in layers:
        place = places.setdefault(layer.teacher, 0)
        places[layer.teacher] += 1
        text.append(f"{layer.teacher or 'layer'} {place}")
    low, middle, high = zip(*(layer.residual for layer in layers), strict=True)
    shares = {
        "the layer's mean": [layer.mean_share for layer in layers],
        "the largest channel": [layer.channel_share for layer in layers],
    }
    found = [
        figure(
            "Norm of what the mean leaves",
            [
                {
                    **_bars(text, [top - end for end, top in zip(low, high, strict=True)]),
                    "base": list(low),
                    "name": "5th to 95th percentile",
                    "meta": {"slot": 0, "soft": True},
                    "width": 0.5,
                },
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": "median",
                    "x": text,
                    "y": list(middle),
                    "marker": {"size": 8},
                    "meta": {"slot": 0},
                },
            ],
            x="",
            y="of rows of length 1",
        ),
        figure(
            "Share of the energy",
            [
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": name,
                    "x": text,
                    "y": values,
                    "customdata": [layer.channel for layer in layers],
                    "hovertemplate": "%{y:.1%}"
                    + (", channel %{customdata}" if "channel" in name else ""),
                    "meta": {"slot": slot},
                }
                for slot, (name, values) in enumerate(shares.items())
            ],
            x="",
            yaxis={"tickformat": ".0%", "rangemode": "tozero"},
        ),
    ]
    own = [(name, layer.residual_counts) for name, layer in zip(text, layers, strict=True)]
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "line": {"shape": "hvh"},
            "name": name,
            "x": [LONGEST * (at + 0.5) / BINS for at in range(BINS)],
            "y": [count / max(sum(counts), 1) for count in counts],
            "meta": {"shade": shade},
        }
        for (name, counts), shade in zip(own, shades(len(own)), strict=True)
    ]
    about = "Lengths of rows after the layer's mean is taken off."
    found.append(
        figure(
            "Histogram of these norms",
            traces,
            x="norm",
            y="share",
            about=about,
            xaxis={"range": [0, 0.05 + max(high)]},
            yaxis={"tickformat": ".0%"},
        )
    )
    scales = [layer.scale for layer in layers]
    if all(scales):
        traces = [
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "x": text,
                "y": [scale[at] for scale in scales],
                "meta": {"slot": at},
            }
            for at, name in enumerate(("least", "median", "largest"))
        ]
        found.append(figure("Scales of the codes", traces, x="", yaxis={"rangemode": "tozero"}))
    return found


def mask_figures(report: CacheReport) -> list[Figure]:
    """Where the patches lie that a student sees."""
    places = np.array(report.visible_by_place)
    trace = {
        "type": "heatmap",
        "z": places.tolist(),
        "hovertemplate": "row %{y}, column %{x}: %{z:.1%}<extra></extra>",
        "colorbar": {"tickformat": ".0%", "thickness": 10, "outlinewidth": 0},
        "meta": {"heat": True},
    }
    axes = {
        "xaxis": {"constrain": "domain", "dtick": max(1, len(places) // 8)},
        "yaxis": {"autorange": "reversed", "scaleanchor": "x", "dtick": max(1, len(places) // 8)},
    }
    frames = _bars(list(range(len(report.visible_by_frame))), report.visible_by_frame)
    return [
        figure(
            "Visible patches of each frame",
            [frames],
            x="frame",
            y="share",
            xaxis={"type": "category"},
            yaxis={"tickformat": ".0%"},
        ),
        figure("Visible patches by place", [trace], x="column", y="row", tall=True, **axes),
    ]


def shown_views(opened: OpenedCache, *, count: int = SHOWN_VIEWS, seed: int = 0) -> list[ShownView]:
    """Some records, drawn by `seed`: their frames under the mask and the teacher's attention."""
    found = []
    for row in sample_rows(len(opened.cache.index), count, seed=seed):
        arrays, info = opened.cache.read(int(row))
        seen = visible_tokens(opened, arrays, row=int(row))
        frames = pictures.strip(draw_frames(opened, arrays, seen))
        strips = {"what a student sees": pictures.data_uri(pictures.png(frames))}
        if "attention" in arrays:
            weights = arrays["attention"].reshape(opened.grid)
            drawn = pictures.heat(weights, low=0.0, high=float(np.percentile(weights, 99)))
            own = pictures.strip(drawn, side=frames.shape[0])
            strips["the teacher's attention"] = pictures.data_uri(pictures.png(own))
        numbers = " ".join(str(frame) for frame in info["frames"])
        about = f"view {info['view']}, frames {numbers}, {len(seen)} patches seen"
        found.append(ShownView(info["name"], about + (", flipped" if info["flip"] else ""), strips))
    return found
