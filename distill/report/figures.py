"""Plots as what Plotly takes: traces and axes in JSON values. Colours are the page's.

A trace's `meta` says which: `slot` is a place in the palette of things that differ in kind, and
`shade`, 0 to 1, one on the scale of layers, from the first to the last.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

MOST_POINTS = 1500  # of a curve
MOST_CLASSES = 60  # with a bar each
MOST_CONFUSED = 200  # classes of a map that can still be read
# Checks between epochs: title and unit of a figure, and what its curves are called.
GROUPS = {
    "val, %": ("Accuracy on val", "%"),
    "monitor, %": ("The student's features on val", "top-1, %"),
    "monitor, exact_loss": ("Loss against the teacher itself", "loss on val"),
}
LABELS = {
    "val/top1": "top-1",
    "val/top5": "top-5",
    "val/ema_top1": "top-1, averaged weights",
    "val/ema_top5": "top-5, averaged weights",
    "monitor/knn_top1": "nearest neighbours",
    "monitor/linear_top1": "linear probe",
}

Figure = dict[str, Any]
Lines = Sequence[dict[str, float]]


def figure(
    title: str, traces: list[dict], *, x: str = "step", y: str = "", about: str = "", **layout: Any
) -> Figure:
    """A figure for the page; `about` is a line below its title."""
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    for name, more in layout.items():
        axes[name] = {**axes.get(name, {}), **more} if isinstance(more, dict) else more
    return {"title": title, "about": about, "data": traces, "layout": axes}


def curve(
    lines: Lines,
    name: str,
    *,
    label: str | None = None,
    slot: int | None = None,
    shade: float | None = None,
    **more: Any,
) -> dict:
    """A value of the metrics over steps, thinned where there are more points than are seen."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    every = -(-len(points) // MOST_POINTS) or 1
    kept = points[::every]
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    meta = {"slot": slot or 0} if shade is None else {"shade": shade}
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(kept) < 40 else "lines",
        "name": label or name,
        "x": [step for step, _ in kept],
        "y": [_rounded(value) for _, value in kept],
        "meta": meta,
        **more,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def has(lines: Lines, name: str) -> bool:
    """Whether any line has a value of this name."""
    return any(line.get(name) is not None for line in lines)


def layer_names(lines: Lines, prefix: str = "", suffix: str = "") -> list[str]:
    """Layers of all teachers that have such values: `layer_00`, `mae_layer_00`."""
    names = {name for line in lines for name in line}
    own = [
        name.removeprefix(prefix).removesuffix(suffix)
        for name in names
        if name.startswith(prefix) and name.endswith(suffix)
    ]
    return sorted(
        name
        for name in own
        if "layer_" in name and "/" not in name and name.rsplit("_", 1)[-1].isdigit()
    )


def layer_text(name: str) -> str:
    """`layer_03` as `layer 3`, `mae_layer_00` as `mae 0`."""
    teacher, _, number = name.rpartition("layer_")
    return f"{teacher.rstrip('_') or 'layer'} {int(number)}"


def shades(count: int) -> list[float]:
    """Places of so many layers on the scale."""
    return [number / max(count - 1, 1) for number in range(count)]


def training_figures(lines: Lines) -> list[Figure]:
    """Losses, rates and checks on `val` of a run's metrics."""
    steps = [line for line in lines if "loss" in line]
    found = []
    if steps:
        parts = [name for name in ("loss", "middle", "pooled") if has(steps, name)]
        text = {"middle": "middle layers", "pooled": "pooled vector"}
        traces = [
            curve(steps, name, label=text.get(name), slot=slot) for slot, name in enumerate(parts)
        ]
        found.append(figure("Loss", traces, y="loss"))
    layers = layer_names(steps)
    if layers:
        traces = [
            curve(steps, name, label=layer_text(name), shade=shade)
            for name, shade in zip(layers, shades(len(layers)), strict=True)
        ]
        found.append(figure("Loss of each layer", traces, y="2 - 2 cos"))
    settings = sorted({name for line in steps for name in line if re.fullmatch(r"loss_\d+", name)})
    if settings:
        traces = [
            curve(steps, name, label=f"setting {int(name[5:])}", shade=shade)
            for name, shade in zip(settings, shades(len(settings)), strict=True)
        ]
        found.append(figure("Loss of each setting", traces, y="loss"))
    checks = [line for line in lines if "loss" not in line]
    names = sorted(
        {
            name
            for line in checks
            for name in line
            if "/" in name and not name.startswith(("watched/", "cosine/"))
        }
    )
    for group in dict.fromkeys(_group(name) for name in names):
        own = [name for name in names if _group(name) == group]
        traces = [
            curve(checks, name, label=LABELS.get(name, name.partition("/")[2]), slot=slot)
            for slot, name in enumerate(own)
        ]
        title, unit = GROUPS.get(group, (f"After epochs: {group}", ""))
        found.append(figure(title, traces, y=unit))
    if has(steps, "top1"):
        found.append(figure("Top-1 on the training batches", [curve(steps, "top1")], y="%"))
    for name, title, unit in (
        ("lr", "Learning rate", "lr"),
        ("grad_norm", "Gradient norm", "before clipping"),
        ("clips_per_second", "Throughput", "clips / s"),
        ("mfu", "Model FLOPs utilisation", "share of the peak"),
        ("gpu_peak_gb", "GPU memory at most", "GB"),
        ("hit_rate", "Read from the cache", "share of the clips"),
    ):
        if has(steps, name):
            found.append(figure(title, [curve(steps, name)], y=unit, showlegend=False))
    if has(steps, "data_wait"):
        trace = curve(steps, "data_wait")
        layout = {"yaxis": {"tickformat": ".0%", "rangemode": "tozero"}, "showlegend": False}
        found.append(figure("Time spent waiting for data", [trace], y="share", **layout))
    return found


def _group(name: str) -> str:
    """Values of a check that share a unit share a figure."""
    before, _, last = name.partition("/")
    return f"{before}, %" if "top" in last else f"{before}, {last}"


def cosine_figures(lines: Lines, watched: dict[str, Any]) -> list[Figure]:
    """How far a student's layers point with the teacher's: over steps, and over tokens."""
    found = []
    steps = [line for line in lines if "loss" in line]
    layers = layer_names(steps, "cosine/")
    if layers:
        traces = [
            curve(steps, f"cosine/{name}", label=layer_text(name), shade=shade)
            for name, shade in zip(layers, shades(len(layers)), strict=True)
        ]
        found.append(
            figure(
                "Cosine of each layer",
                traces,
                y="mean cosine",
                about="Mean over the tokens of a training step.",
            )
        )
    looks = [line for line in lines if any(name.startswith("watched/") for name in line)]
    layers = layer_names(looks, "watched/", "_mean")
    if layers:
        last = looks[-1]
        text = [layer_text(name) for name in layers]
        spread = {
            key: [last[f"watched/{name}_{key}"] for name in layers]
            for key in ("mean", "p05", "p50", "p95")
        }
        traces = [
            {
                "type": "bar",
                "name": "5th to 95th percentile",
                "x": text,
                "base": spread["p05"],
                "y": [high - low for low, high in zip(spread["p05"], spread["p95"], strict=True)],
                "customdata": list(zip(spread["p05"], spread["p95"], strict=True)),
                "hovertemplate": "%{customdata[0]:.3f} to %{customdata[1]:.3f}",
                "meta": {"slot": 0, "soft": True},
                "width": 0.5,
            },
            {
                "type": "scatter",
                "mode": "markers",
                "name": "median",
                "x": text,
                "y": spread["p50"],
                "marker": {"size": 11, "symbol": "line-ew-open", "line": {"width": 3}},
                "meta": {"slot": 0},
            },
            {
                "type": "scatter",
                "mode": "markers",
                "name": "mean",
                "x": text,
                "y": spread["mean"],
                "marker": {"size": 8},
                "meta": {"slot": 1},
            },
        ]
        found.append(
            figure(
                "Spread over tokens",
                traces,
                x="",
                y="cosine",
                about=f"Of the watched clips, after step {last['step']:,}.",
            )
        )
        traces = [
            curve(looks, f"watched/{name}_p05", label=layer_text(name), shade=shade)
            for name, shade in zip(layers, shades(len(layers)), strict=True)
        ]
        found.append(
            figure(
                "The worst twentieth of the tokens",
                traces,
                y="5th percentile",
                about="Of the watched clips, after every epoch.",
            )
        )
    counts, edges = watched.get("counts"), watched.get("edges")
    if counts and edges:
        middles = [(low + high) / 2 for low, high in zip(edges[:-1], edges[1:], strict=True)]
        traces = []
        for (name, own), shade in zip(counts.items(), shades(len(counts)), strict=True):
            whole = max(sum(own), 1)
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "line": {"shape": "hvh"},
                    "name": layer_text(name),
                    "x": middles,
                    "y": [_rounded(count / whole) for count in own],
                    "meta": {"shade": shade},
                }
            )
        low = min(
            (edges[own.index(next(c for c in own if c))] for own in counts.values() if any(own)),
            default=-1,
        )
        found.append(
            figure(
                "Histogram over tokens",
                traces,
                x="cosine",
                y="share",
                about="Of the watched clips, at the latest look.",
                xaxis={"range": [low, 1]},
                yaxis={"tickformat": ".0%"},
            )
        )
    return found


def class_figure(rows: Sequence[dict], names: Sequence[str]) -> Figure:
    """Top-1 of the classes that have clips, the worst first."""
    own = sorted((row for row in rows if row["clips"]), key=lambda row: row["top1"])
    about = ""
    if len(own) > MOST_CLASSES:
        about = f"The {MOST_CLASSES} worst of {len(own)} classes."
        own = own[:MOST_CLASSES]
    trace = {
        "type": "bar",
        "x": [names[row["class"]] for row in own],
        "y": [_rounded(row["top1"]) for row in own],
        "customdata": [row["clips"] for row in own],
        "hovertemplate": "%{x}: %{y:.1f} % of %{customdata} clips<extra></extra>",
        "meta": {"slot": 0},
    }
    layout = {"xaxis": {"type": "category"}, "yaxis": {"range": [0, 100]}, "showlegend": False}
    return figure("Top-1 of each class", [trace], x="", y="%", about=about, **layout)


def confusion_figure(counts: np.ndarray, names: Sequence[str]) -> Figure | None:
    """Which class is taken for which, in shares of the true one; None for too many classes."""
    if len(counts) > MOST_CONFUSED:
        return None
    columns = list(names) + (["not read"] if counts[:, -1].any() else [])
    counts = counts[:, : len(columns)]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    trace = {
        "type": "heatmap",
        "x": columns,
        "y": list(names),
        "z": [[_rounded(value) for value in row] for row in shares],
        "customdata": counts.tolist(),
        "hovertemplate": "%{y} taken for %{x}: %{z:.1%}, %{customdata} clips<extra></extra>",
        "zmin": 0,
        "zmax": 1,
        "colorbar": {"tickformat": ".0%", "thickness": 10, "outlinewidth": 0},
        "meta": {"heat": True},
    }
    axes = {
        "xaxis": {"type": "category", "constrain": "domain"},
        "yaxis": {"type": "category", "autorange": "reversed"},
        "tall": True,
    }
    return figure(
        "Confusion matrix",
        [trace],
        x="answer",
        y="label",
        about="Each row is a true class.",
        **axes,
    )


def comparison_figures(runs: Sequence[tuple[str, Lines]]) -> list[Figure]:
    """Curves of several runs over each other, where more than one has them."""
    found = []
    for name, title, unit in (
        ("loss", "Loss", "loss"),
        ("val/top1", "Top-1 on val", "%"),
        ("monitor/knn_top1", "Nearest neighbours on val", "top-1, %"),
        ("lr", "Learning rate", "lr"),
        ("grad_norm", "Gradient norm", "before clipping"),
        ("clips_per_second", "Throughput", "clips / s"),
        ("data_wait", "Time spent waiting for data", "share"),
    ):
        traces = [
            curve(lines, name, label=label, slot=slot)
            for slot, (label, lines) in enumerate(runs)
            if has(lines, name)
        ]
        if len(traces) > 1:
            found.append(figure(title, traces, y=unit))
    traces = []
    for slot, (label, lines) in enumerate(runs):
        steps = [line for line in lines if "loss" in line]
        layers = layer_names(steps, "cosine/")
        if layers:
            means = [
                {
                    "step": line["step"],
                    "cosine": float(np.mean([line[f"cosine/{name}"] for name in layers])),
                }
                for line in steps
                if f"cosine/{layers[0]}" in line
            ]
            traces.append(curve(means, "cosine", label=label, slot=slot))
    if len(traces) > 1:
        found.append(figure("Cosine with the teacher", traces, y="mean over layers"))
    return found
