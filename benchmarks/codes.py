"""What codes of each width lose of a row, against other ways to keep it, in one table.

    pip install faiss-cpu    # for its rows, which are left out without it
    python benchmarks/codes.py --markdown benchmarks/results/codes.md

Some minutes on one CPU core. Every code is given rows less their layer's mean, so that a large
common mean flatters none. Errors are 1 - cos over the rows, and the mean of <r^ - r, r> / |r|^2,
the bias along the row, with its spread over rows; all three are those of the layer where they are
largest. Bits are those of a value, scales included. `theory` is a rotated Lloyd-Max code of that
width. Rows are Gaussian directions, rows with a shared mean and outlier channels, and features of
the quickstart's teacher on views of its videos, at least a hundred thousand of a layer. faiss's SQ
takes its ranges from the rows that it codes; its TurboQuant is measured on two thousand rows of a
layer, and RaBitQ on two hundred.
"""

import argparse
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from rich.console import Console
from rich.table import Table
from torch import Tensor

from distill.cache.codes import BITS, Codec, row_bytes
from distill.data.demo import make_demo
from distill.data.index import Clip, read_list
from distill.data.load import load_view
from distill.models import build_teacher
from distill.recipe import Demo
from distill.recipe_file import load_recipe
from distill.targets import view_records

try:
    import faiss
except ImportError:
    faiss = None

THEORY = {"8bit": 2.1e-5, "4bit": 4.8e-3, "3bit": 1.74e-2, "2bit": 6.06e-2}
GROUP = 128
FP8_LARGEST = 448.0
CHUNK = 2_000
TURBOQUANT_ROWS = 2_000
RABITQ_ROWS = 200
VIEWS = 6
TEACHER_BATCH = 64


@dataclass(frozen=True)
class Method:
    """A way to keep rows: `code` returns what comes back of mean-removed rows [R,E]."""

    name: str
    bits: Callable[[int], float]  # per value, of a width, all included
    code: Callable[[Tensor], Tensor]
    rows: int | None = None  # as many of each layer only, where it is slow


def ours(kind: str) -> Method:
    def code(rows: Tensor) -> Tensor:
        codec = Codec(kind, means=torch.zeros(1, rows.shape[-1]))
        return codec.decode(**codec.encode(rows[None]))[0]

    return Method(kind, lambda width: (8 * row_bytes(kind, width) + 16) / width, code)


def integer(bits: int, *, group: int | None = None) -> Method:
    """Even steps up to the largest magnitude of a row, or of each group of a row's values."""
    largest = 2 ** (bits - 1) - 1

    def code(rows: Tensor) -> Tensor:
        size = group or rows.shape[-1]
        padded = F.pad(rows, (0, -rows.shape[-1] % size))
        parts = rearrange(padded, "r (g s) -> r g s", s=size)
        step = (parts.abs().amax(-1, keepdim=True) / largest).half().float()
        values = torch.where(step > 0, parts / step, 0.0).round().clamp(-largest, largest)
        return rearrange(values * step, "r g s -> r (g s)")[:, : rows.shape[-1]]

    def size(width: int) -> float:
        scales = -(-width // (group or width))
        return bits + 16 * scales / width

    return Method(f"int{bits}, {f'group of {group}' if group else 'row'} absmax", size, code)


def fp8(rows: Tensor) -> Tensor:
    step = rows.abs().amax(-1, keepdim=True) / FP8_LARGEST
    return (rows / step).to(torch.float8_e4m3fn).float() * step


def bfloat(rows: Tensor) -> Tensor:
    return rows.bfloat16().float()


def faiss_scalar(name: str, label: str, *, is_rotated: bool = False) -> Method:
    """One of faiss's scalar quantisers, trained on the rows that it codes.

    TurboQuant's is for directions, hence the length beside it, and rotated at random.
    """

    def make(width: int):
        return faiss.IndexScalarQuantizer(width, getattr(faiss.ScalarQuantizer, name))

    def code(rows: Tensor) -> Tensor:
        lengths = rows.norm(dim=-1, keepdim=True) if is_rotated else torch.ones(len(rows), 1)
        values = (rows / lengths).numpy()
        index = make(rows.shape[1])
        index = faiss.IndexPreTransform(_rotation(rows.shape[1]), index) if is_rotated else index
        index.train(values)
        return torch.from_numpy(index.sa_decode(index.sa_encode(values))) * lengths

    def size(width: int) -> float:
        return (8 * make(width).code_size + 16 * is_rotated) / width

    return Method(label, size, code, rows=TURBOQUANT_ROWS if is_rotated else None)


def faiss_rabitq(bits: int) -> Method:
    """faiss's RaBitQ, rotated at random as its authors prescribe.

    Its decoder knows the first bit only, so a row is what its inner products with the axes, as
    the code estimates them from exact queries, say that it is.
    """

    def make(width: int):
        index = faiss.IndexRaBitQ(width, faiss.METRIC_INNER_PRODUCT, bits)
        index.qb = 0
        return index

    def code(rows: Tensor) -> Tensor:
        width = rows.shape[1]
        quantiser = make(width)
        index = faiss.IndexPreTransform(_rotation(width), quantiser)
        index.train(rows.numpy())
        index.add(rows.numpy())
        products, order = (
            torch.from_numpy(x) for x in index.search(torch.eye(width).numpy(), len(rows))
        )
        return torch.empty_like(products).scatter_(1, order, products).T

    def size(width: int) -> float:
        return 8 * make(width).code_size / width

    return Method(f"faiss RaBitQ, {bits} bit", size, code, rows=RABITQ_ROWS)


def _rotation(width: int):
    rotation = faiss.RandomRotationMatrix(width, width)
    rotation.init(0)
    return rotation


def methods() -> list[Method]:
    found = [Method("fp16", lambda width: 16, lambda rows: rows.half().float())]
    found += [Method("bf16", lambda width: 16, bfloat)]
    found += [ours("8bit"), integer(8), Method("fp8 e4m3, row absmax", lambda w: 8 + 16 / w, fp8)]
    if faiss:
        found += [faiss_scalar("QT_8bit", "faiss SQ8"), faiss_rabitq(8)]
    found += [ours("4bit"), integer(4), integer(4, group=GROUP)]
    if faiss:
        turbo = faiss_scalar("QT_4bit_tqmse", "faiss TurboQuant, 4 bit", is_rotated=True)
        found += [faiss_scalar("QT_4bit", "faiss SQ4"), turbo, faiss_rabitq(4)]
    found += [ours("3bit"), integer(3, group=GROUP)]
    if faiss:
        turbo = faiss_scalar("QT_3bit_tqmse", "faiss TurboQuant, 3 bit", is_rotated=True)
        found += [turbo, faiss_rabitq(3)]
    found += [ours("2bit")]
    if faiss:
        turbo = faiss_scalar("QT_2bit_tqmse", "faiss TurboQuant, 2 bit", is_rotated=True)
        found += [turbo, faiss_rabitq(2)]
    return found


def gaussian(count: int, width: int) -> Tensor:
    stream = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(count, width, generator=stream), dim=-1)


def outliers(count: int, width: int) -> Tensor:
    """One channel at 12 times the others' deviation, four neighbours at 8, and a shared mean."""
    stream = torch.Generator().manual_seed(1)
    rows = torch.randn(count, width, generator=stream)
    rows[:, 5] *= 12
    rows[:, 40:44] *= 8
    return F.normalize(rows + torch.randn(width, generator=stream), dim=-1)


def real(clips: int, views: int, folder: Path) -> list[Tensor]:
    """The quickstart's teacher's rows of each layer [R,E], as its cache would hold them."""
    settings = {"kind": "moving-digits", "train_clips": clips, "val_clips": 1, "test_clips": 1}
    make_demo(Demo(folder=str(folder), **settings))
    recipe = load_recipe("quickstart").stages["distilled"]
    teacher = build_teacher(recipe)
    section = recipe.data.train.model_copy(update={"list": str(folder / "train.csv"), "share": 1.0})
    kept = []
    for view in range(views):
        for clips in batched(read_list(section), TEACHER_BATCH):
            looks = [load_view(clip, view, views=recipe.data.views, seed=0) for clip in clips]
            batch = {
                "clip_id": torch.tensor([clip.id for clip in clips]),
                "view": torch.full((len(clips),), view),
                "pixels": torch.from_numpy(np.stack([look.pixels for look in looks])),
            }
            records = view_records(teacher, batch, mask=recipe.objective.mask, seed=0)
            kept.append(rearrange(records["middle"], "k b m e -> k (b m) e"))
    return list(torch.cat(kept, dim=1))


def batched(clips: list[Clip], size: int) -> list[list[Clip]]:
    return [clips[start : start + size] for start in range(0, len(clips), size)]


def measure(method: Method, layers: list[Tensor]) -> dict[str, float]:
    cosine = bias = spread = 0.0
    for rows in layers:
        centred = (rows - rows.mean(0))[: method.rows]
        errors, biases = [], []
        for part in centred.split(CHUNK):
            exact, found = part.double(), method.code(part).double()
            along, squared = (found * exact).sum(-1), exact.square().sum(-1)
            errors.append(1 - along / (squared * found.square().sum(-1)).sqrt())
            biases.append(along / squared - 1)
        cosine = max(cosine, float(torch.cat(errors).mean()))
        bias = max(bias, float(torch.cat(biases).mean()), key=abs)
        spread = max(spread, float(torch.cat(biases).std()))
    return {"cosine": cosine, "bias": bias, "spread": spread}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rows", type=int, default=100_000, help="of each synthetic set")
    arguments.add_argument("--width", type=int, default=1408)
    arguments.add_argument("--clips", type=int, default=455, help="of the demo, six views each")
    arguments.add_argument("--markdown", type=Path, help="write the table here too")
    options = arguments.parse_args()
    console = Console(width=140)
    with tempfile.TemporaryDirectory() as name:
        features = real(options.clips, VIEWS, Path(name))
    sets = {
        f"Gaussian, {options.width}": [gaussian(options.rows, options.width)],
        f"outliers and mean, {options.width}": [outliers(options.rows, options.width)],
        f"quickstart's teacher, {features[0].shape[1]}": features,
    }
    lines = []
    for title, layers in sets.items():
        width, count = layers[0].shape[1], len(layers[0])
        table = Table(title=f"{title} ({len(layers)} x {count:,} rows)", title_justify="left")
        headings = ("code", "bits", "1 - cos", "of theory", "bias", "spread")
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "code" else "right")
        lines += [f"## {table.title}", "", "| " + " | ".join(headings) + " |"]
        lines += ["|---|" + "---:|" * (len(headings) - 1)]
        for method in methods():
            found = measure(method, layers)
            theory = THEORY.get(method.name)
            row = (
                method.name,
                f"{method.bits(width):.2f}",
                f"{found['cosine']:.2e}",
                f"{found['cosine'] / theory:.2f}" if theory else "",
                f"{found['bias']:+.1e}",
                f"{found['spread']:.1e}",
            )
            table.add_row(*row)
            name = f"**{row[0]}**" if method.name in BITS else row[0]
            lines.append("| " + " | ".join((name, *row[1:])) + " |")
        lines.append("")
        console.print(table)
    where = (
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"faiss {faiss.__version__ if faiss else 'not installed'}, float32 rows, on the CPU"
    )
    console.print(where)
    if options.markdown:
        command = (
            f"`python benchmarks/codes.py --rows {options.rows} --width {options.width} "
            f"--clips {options.clips}`"
        )
        text = ["# Codes", "", __doc__.split("\n\n")[2].strip(), "", f"{command}: {where}.", ""]
        options.markdown.write_text("\n".join([*text, *lines]).rstrip() + "\n")


if __name__ == "__main__":
    main()
