"""The published model zoo, row by row: numbers, weights that can be had, and our recipe of each.

Numbers and files are those of OpenGVLab/InternVideo's InternVideo2/single_modality/MODEL_ZOO.md,
with its wrong links put right where the right file is known; a row's note says so. Probes that
upstream has scripts for and no numbers are rows too.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any

import rich
from rich import box
from rich.table import Table
from rich.text import Text

from distill.checks.recipe import nearest
from distill.errors import InputError

ABSENT = "not published"
HUB = "https://huggingface.co"
WIDEST = 100  # columns of a terminal that the tables take; narrower ones fold two of theirs


@dataclass(frozen=True)
class Row:
    """A row; its name is that of our recipe. Accuracies are in percent, None where unpublished.

    `file` lies in `repository` on the Hugging Face hub.
    """

    recipe: str
    section: str
    model: str
    setting: str
    frames: int
    crops: int | None
    clips: int | None
    top1: float | None
    map: float | None
    repository: str | None
    file: str | None
    note: str | None

    @property
    def views(self) -> str:
        """Frames x crops x clips, as published tables write it."""
        return f"{self.frames}x{self.crops}x{self.clips}" if self.crops else str(self.frames)

    @property
    def link(self) -> str | None:
        """Where the weights are to be had: the file, or the repository where that is all."""
        if self.repository is None:
            return None
        file = f"/resolve/main/{self.file}" if self.file else ""
        return f"{HUB}/{self.repository}{file}"

    def report(self) -> dict[str, Any]:
        """The row as JSON values."""
        return {**asdict(self), "link": self.link}


@cache
def zoo_rows() -> tuple[Row, ...]:
    """All rows in the order of the published tables."""
    text = resources.files("distill").joinpath("zoo.tsv").read_text(encoding="utf-8")
    return tuple(_row(fields) for fields in csv.DictReader(text.splitlines(), delimiter="\t"))


def _row(fields: dict[str, str]) -> Row:
    number = {"frames": int, "crops": int, "clips": int, "top1": float, "map": float}
    return Row(
        **{key: None if text == "-" else number.get(key, str)(text) for key, text in fields.items()}
    )


def find_row(name: str) -> Row:
    """The row of a recipe's name or path; raises InputError with the nearest one."""
    bare = name.removeprefix("recipes/").removesuffix(".yaml")
    by_name = {row.recipe: row for row in zoo_rows()}
    if bare not in by_name:
        hint = nearest(bare, by_name) or "; `distill zoo` lists them"
        raise InputError(f"--row {name}: no such row{hint}")
    return by_name[bare]


def select_rows(*, data: str | None = None, model: str | None = None) -> list[Row]:
    """Rows of a data set (`k400`, `Kinetics-400`) or section, of a model; all without either."""
    rows = [
        row
        for row in zoo_rows()
        if (data is None or data.lower() in (row.section.lower(), _data_set(row)))
        and (model is None or model.lower() == row.model.lower())
    ]
    if not rows:
        sets = dict.fromkeys(filter(None, (_data_set(row) for row in zoo_rows())))
        models = dict.fromkeys(row.model for row in zoo_rows())
        raise InputError(
            f"no row of {' and '.join(filter(None, (data, model)))}; --data is one of "
            f"{', '.join(sets)} or a section's name, --model one of {', '.join(models)}"
        )
    return rows


def _data_set(row: Row) -> str:
    folder, slash, _ = row.recipe.partition("/")
    return folder if slash else ""


def zoo_tables(rows: Sequence[Row]) -> Iterator[Table | str]:
    """A table of each section for the terminal, and where the rest is to be seen."""
    for section in dict.fromkeys(row.section for row in rows):
        table = Table(
            title=section,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            width=min(rich.get_console().width, WIDEST),
        )
        table.add_column("recipe", width=23)
        table.add_column("setting", ratio=1)
        table.add_column("views", width=6)
        table.add_column("published", justify="right", width=13)
        table.add_column("weights", ratio=1, overflow="fold")
        for row in rows:
            if row.section == section:
                numbers = "\n".join(_numbers(row))
                table.add_row(row.recipe, row.setting, row.views, numbers, _weights(row))
        yield table
    yield "Views are frames x crops x clips. Repository, file and remarks of a row: zoo --row ROW"


def zoo_markdown(rows: Sequence[Row]) -> str:
    """The rows as Markdown, a table of each section, with links to files and notes."""
    parts = []
    for section in dict.fromkeys(row.section for row in rows):
        lines = [
            f"## {section}",
            "",
            "| recipe | model | setting | frames x crops x clips | top-1 | mAP | weights | note |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            if row.section != section:
                continue
            weights = ABSENT
            if row.link:
                weights = f"[{row.file or row.repository}]({row.link})"
            cells = (
                f"[{row.recipe}](recipes/{row.recipe}.yaml)",
                row.model,
                row.setting,
                row.views,
                ABSENT if row.top1 is None else f"{row.top1:.1f}",
                "" if row.map is None else f"{row.map:.1f}",
                weights,
                row.note or "",
            )
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def row_lines(row: Row) -> list[str]:
    """All that is known of a row."""
    views = f"{row.views}: frames x crops x clips" if row.crops else f"{row.frames} frames"
    lines = [
        f"{row.recipe}: {row.model}, {row.section}: {row.setting}",
        f"numbers: {' and '.join(_numbers(row))} ({views})",
        f"weights: {row.link or ABSENT}",
    ]
    if row.file:
        lines.append(f"to get them: hf download {row.repository} {row.file} --local-dir weights")
    if row.note:
        lines.append(f"note: {row.note}")
    return [*lines, f"to make them: distill train recipes/{row.recipe}.yaml"]


def _numbers(row: Row) -> list[str]:
    """The published numbers, named."""
    named = ((row.top1, "top-1"), (row.map, "mAP"))
    return [f"{value:.1f} % {name}" for value, name in named if value is not None] or [ABSENT]


def _weights(row: Row) -> Text:
    """A short name of the published file, with its link; terminals that can follow it will."""
    if row.link is None:
        return Text(ABSENT)
    *_, folder, name = f"{row.repository}/{row.file}".split("/")
    name = folder if name in ("pytorch_model.bin", "None") else name
    return Text(name.removesuffix(".pth"), style=f"link {row.link}")
