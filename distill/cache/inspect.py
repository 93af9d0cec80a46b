"""What is in a cache, said without its recipe: identity, sizes, statistics of a sample."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, reduce
from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from distill import draw, log
from distill.cache.calibrate import read_codec
from distill.cache.codes import BITS, Codec, gaussian_levels
from distill.cache.identity import MEANS, MEANS_FILE
from distill.cache.index import found_identity, load_index
from distill.cache.quarantine import quarantined_ids
from distill.cache.read import Cache
from distill.cache.shards import shard_sizes
from distill.cache.store import Folder, open_folder
from distill.errors import StateError
from distill.mask import Redraw
from distill.recipe import MAIN, Mask, of_teacher
from distill.students.vit import PATCH

SAMPLED_RECORDS = 64
SAMPLED_ROWS = 64  # of each sampled record and layer
QUANTILES = (0.05, 0.5, 0.95)
LONGEST, BINS = 2, 80  # of a histogram of norms
BAR_WIDTH = 32
SHADES = " ░▒▓█"


@dataclass(frozen=True)
class OpenedCache:
    """A cache opened as what it says it is. `identity` is that of the recipes it belongs to."""

    cache: Cache
    identity: dict

    @property
    def mask(self) -> Mask:
        return Mask(kind=self.identity["objective.mask.kind"], ratio=self._get("mask.ratio"))

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patch tokens (t, h, w) of a view."""
        side = self.identity["data.views.image_size"] // PATCH
        return self.identity["data.views.frames"], side, side

    def _get(self, name: str):
        return self.identity[f"objective.{name}"]


@dataclass(frozen=True)
class LayerStatistics:
    """Rows of a layer in a sample of records, before they were coded.

    A row x of unit length is the layer's mean and a residual. `mean_share` is the mean's part of
    the rows' energy, `residual` the 5th, 50th and 95th percentile of the residual's norm,
    `spread` its standard deviation over its mean, `scale` the least, middle and largest scale of
    the codes, `channel` the one that holds most energy on average and `channel_share` how much.
    `residual_counts` is a histogram of the residual's norms from 0 to `LONGEST`.
    """

    mean_norm: float
    mean_share: float
    residual: tuple[float, float, float]
    spread: float
    scale: tuple[float, float, float] | None
    channel: int
    channel_share: float
    residual_counts: list[int]
    teacher: str = MAIN  # its name


@dataclass(frozen=True)
class CacheReport:
    """What `inspect_cache` finds. Statistics, tokens and decoders are of `sampled` records."""

    folder: str
    identity: dict
    num_clips: int
    num_records: int
    records_by_view: dict[int, int]
    num_shards: int
    size_bytes: int  # of the shards
    field_bytes: dict[str, int]  # of one record, with the mean of its view's JSON text
    quarantined: int
    sampled: int
    layers: list[LayerStatistics]
    visible_by_frame: list[float]  # share of a frame's patches that a student sees
    visible_by_place: list[list[float]]
    decoders: dict[str, int]

    @property
    def clip_bytes(self) -> float:
        """Of one clip in all its views."""
        return self.size_bytes / self.num_clips


def open_any(folder: str | Path | Folder) -> OpenedCache:
    """Open a cache without a recipe; raises StateError for one that is empty or damaged."""
    folder = open_folder(folder)
    written = found_identity(folder)
    if written is None:
        raise StateError(
            f"cache {folder}: no shards there; give the folder of a recipe's objective.cache.folder"
        )
    identity = {name: value for name, value in written.items() if name != MEANS}
    codec = read_codec(folder, identity)
    if codec is None:
        raise StateError(
            f"cache {folder}: {MEANS_FILE} is not there, without which its codes say nothing; put "
            "it back, or delete the folder and run 'distill cache-teacher' again"
        )
    cache = Cache(folder, load_index(folder, written), np.empty((0, 1), np.int64), codec=codec)
    return OpenedCache(cache, identity)


def inspect_cache(
    folder: str | Path | Folder, *, sampled: int = SAMPLED_RECORDS, seed: int = 0
) -> CacheReport:
    """Look into a cache; statistics come from `sampled` records drawn by `seed`.

    Raises StateError for a cache that is empty or damaged.
    """
    opened = open_any(folder)
    cache, index = opened.cache, opened.cache.index
    views, counts = np.unique(index.views, return_counts=True)
    fields = {field.name: field.size_bytes for field in index.fields}
    fields["view"] = round(float(np.mean(index.sizes)) - sum(fields.values()))
    rows = sample_rows(len(index), sampled, seed=seed)
    decoders: Counter[str] = Counter()
    codecs = {MAIN: cache.codec, **cache.codec.others}
    middle: dict[str, list] = {name: [] for name in codecs}
    scales: dict[str, list] = {name: [] for name in codecs}
    t, h, w = opened.grid
    visible = np.zeros(t * h * w)
    for row in rows:
        arrays, info = cache.read(int(row))
        decoders[info["decoder"]] += 1
        visible[visible_tokens(opened, arrays, row=int(row))] += 1
        for name, codec in codecs.items():
            middle[name].append(_some_rows(arrays, codec, name, key=(seed, int(row))))
            if of_teacher("scales", name) in arrays:
                own = torch.from_numpy(arrays[of_teacher("scales", name)])
                scales[name].append(own.float())
    share = rearrange(visible / len(rows), "(t h w) -> t h w", t=t, h=h)
    return CacheReport(
        folder=str(cache.folder),
        identity=opened.identity,
        num_clips=len(np.unique(index.clip_ids)),
        num_records=len(index),
        records_by_view=dict(zip(views.tolist(), counts.tolist(), strict=True)),
        num_shards=len(index.shards),
        size_bytes=sum(shard_sizes(cache.folder).values()),
        field_bytes=fields,
        quarantined=len(np.unique(quarantined_ids(cache.folder))),
        sampled=len(rows),
        layers=[
            replace(layer, teacher=name)
            for name, codec in codecs.items()
            for layer in layer_statistics(
                torch.cat(middle[name], dim=1), scales[name], kind=codec.kind
            )
        ],
        visible_by_frame=share.mean(axis=(1, 2)).tolist(),
        visible_by_place=share.mean(axis=0).tolist(),
        decoders=dict(sorted(decoders.items())),
    )


def sample_rows(num_records: int, count: int, *, seed: int) -> np.ndarray:
    """Places int64, ascending, of records drawn without replacement."""
    stream = draw.generator("inspect", seed)
    return np.sort(stream.choice(num_records, min(count, num_records), replace=False))


def visible_tokens(opened: OpenedCache, arrays: dict[str, np.ndarray], *, row: int) -> np.ndarray:
    """The patches of a record that a student sees, int64; of redrawn masks one of them.

    A cache that keeps more than the visible tokens gives another mask in every epoch and run:
    shown is that of the record's own view as the epoch, and of seed 0.
    """
    index = opened.cache.index
    tokens = arrays["tokens"].astype(np.int64)
    if opened.identity["objective.cache.tokens"] == "visible":
        return tokens
    redraw, attention = Redraw(opened.mask, opened.grid, 0), arrays.get("attention")
    places = redraw.places(
        clip_ids=torch.tensor([int(index.clip_ids[row])]),
        epoch=int(index.views[row]),
        tokens=torch.from_numpy(tokens)[None],
        next_arrival=torch.from_numpy(arrays["next_arrival"])[None],
        attention=attention if attention is None else torch.from_numpy(attention)[None],
    )
    return tokens[places[0].numpy()]


def coding_noise(kind: str) -> float:
    """Expected |r^ - r|^2 / |r|^2 of codes whose scale makes <r^, r> equal |r|^2.

    That is <q, q> / <q, x>^2 - 1 for the levels q of standard normal x.
    """
    if kind not in BITS:
        return 0.0
    levels = gaussian_levels(2 ** BITS[kind])
    ends = torch.tensor([torch.inf], dtype=levels.dtype)
    borders = torch.cat([-ends, (levels[1:] + levels[:-1]) / 2, ends])
    share = torch.special.ndtr(borders).diff()
    moment = -torch.exp(-borders.square() / 2).diff() / math.sqrt(2 * math.pi)  # of x in each cell
    return float((levels.square() * share).sum() / (levels * moment).sum().square() - 1)


def layer_statistics(
    middle: torch.Tensor, scales: list[torch.Tensor], *, kind: str
) -> list[LayerStatistics]:
    """Statistics of decoded rows [K,R,E] and the scales [K,M] of each record.

    What coding has added to residuals is taken off, as it is known on average.
    """
    noise = coding_noise(kind)
    statistics = []
    for layer, rows in enumerate(middle.double()):
        mean = rows.mean(dim=0)
        squared = (rows - mean).square().sum(dim=1) / (1 + noise)
        residual = squared.sqrt()
        mean_energy = float(mean.square().sum())
        energy = mean_energy + float(squared.mean())
        channels = reduce(rows.square(), "r e -> e", "mean")
        largest = int(channels.argmax())
        scale = None
        if scales:
            own = torch.cat([record[layer].flatten() for record in scales])
            scale = tuple(float(value) for value in (own.min(), own.median(), own.max()))
        points = torch.quantile(residual, torch.tensor(QUANTILES, dtype=residual.dtype))
        statistics.append(
            LayerStatistics(
                mean_norm=mean_energy**0.5,
                mean_share=mean_energy / energy,
                residual=tuple(points.tolist()),
                spread=float(residual.std(unbiased=False) / residual.mean()),
                scale=scale,
                channel=largest,
                channel_share=float(channels[largest]) / energy,
                residual_counts=torch.histc(residual, BINS, 0, LONGEST).long().tolist(),
            )
        )
    return statistics


def report_json(report: CacheReport) -> dict:
    """The report in JSON values."""
    return {**asdict(report), "clip_bytes": report.clip_bytes}


def report_lines(report: CacheReport) -> Iterator[RenderableType]:
    """The report for a console: tables and bars."""
    yield _overview(report)
    yield _table("identity", [(name, _text(value)) for name, value in report.identity.items()])
    yield _sizes(report)
    yield _layers(report)
    yield _masks(report)


def _overview(report: CacheReport) -> Table:
    views = report.records_by_view
    if len(set(views.values())) == 1:
        by_view = f"{len(views)} views, {next(iter(views.values())):,} records each"
    else:
        by_view = ", ".join(f"view {view}: {count:,}" for view, count in views.items())
    decoders = ", ".join(f"{name} {count:,}" for name, count in report.decoders.items())
    return _table(
        f"cache {report.folder}",
        [
            ("clips", f"{report.num_clips:,}"),
            ("records", f"{report.num_records:,} ({by_view})"),
            ("shards", f"{report.num_shards:,}, {log.size_text(report.size_bytes)}"),
            ("a clip", log.size_text(report.clip_bytes)),
            ("quarantined", f"{report.quarantined:,} clips that could not be decoded"),
            ("decoded by", f"{decoders} of {report.sampled:,} sampled records"),
        ],
    )


def _sizes(report: CacheReport) -> Table:
    table = Table(title="a record", title_justify="left")
    for column in ("field", "bytes", "share"):
        table.add_column(column, justify="left" if column == "field" else "right")
    whole = sum(report.field_bytes.values())
    for name, size in report.field_bytes.items():
        table.add_row(name, f"{size:,}", f"{size / whole:.1%}")
    table.add_row("all", f"{whole:,}", "", style="bold")
    return table


def _layers(report: CacheReport) -> Table:
    table = Table(
        title=f"layers, from {report.sampled:,} records; rows are of unit length",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
    )
    columns = ("\nlayer", "mean\nnorm", "\nenergy", "resid.\n5 %", "\n50 %", "\n95 %", "\nspread")
    for name in (*columns, "scale\nmin", "\n50 %", "\nmax", "largest\nchannel", "\nenergy"):
        table.add_column(name, justify="right")
    places: Counter[str] = Counter()
    for found in report.layers:
        scale = [f"{value:.3f}" for value in found.scale] if found.scale else [""] * 3
        table.add_row(
            f"{found.teacher} {places[found.teacher]}".strip(),
            f"{found.mean_norm:.3f}",
            f"{found.mean_share:.1%}",
            *(f"{value:.3f}" for value in found.residual),
            f"{found.spread:.1%}",
            *scale,
            str(found.channel),
            f"{found.channel_share:.1%}",
        )
        places[found.teacher] += 1
    return table


def _masks(report: CacheReport) -> RenderableType:
    frames = Table(show_header=False, box=None)
    largest = max(report.visible_by_frame)
    for frame, share in enumerate(report.visible_by_frame):
        bar = Bar(largest, 0, share, width=BAR_WIDTH, color="cyan")
        frames.add_row(f"frame {frame}", bar, f"{share:.1%}")
    places = np.array(report.visible_by_place)
    span = max(places.max() - places.min(), 1e-9)
    steps = np.rint((places - places.min()) / span * (len(SHADES) - 1)).astype(int)
    shades = "\n".join("".join(2 * SHADES[step] for step in row) for row in steps)
    bounds = Text(f"places, from {places.min():.1%} (blank) to {places.max():.1%} (full)")
    return Group(Text("visible patches", style="italic"), frames, bounds, Text(shades))


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(show_header=False, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _text(value) -> str:
    return "none" if value is None else str(value)


def _some_rows(
    arrays: dict[str, np.ndarray], codec: Codec, teacher: str, *, key: tuple
) -> torch.Tensor:
    """Decoded rows [K,R,E] of a teacher in a record, R of them drawn by `key`."""
    codes, scales = (arrays.get(of_teacher(field, teacher)) for field in ("codes", "scales"))
    chosen = draw.generator("inspect rows", *key).permutation(codes.shape[1])[:SAMPLED_ROWS]
    if scales is not None:
        scales = torch.from_numpy(scales[:, chosen])
    return codec.decode(torch.from_numpy(codes[:, chosen]), scales).float()
