"""List files: which clips there are, where they lie and what is known of them."""

import csv
import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from distill import draw
from distill.data.folder import read_folder
from distill.errors import InputError
from distill.recipe import ClipList

# The fields of each form, told apart by their number: the six of the distillation lists, those
# of trimmed clips, of folders of frames, and of whole videos.
FORMS = {
    6: ("source", "path", "total_seconds", "start_seconds", "end_seconds", "label"),
    5: ("path", "total_seconds", "start_seconds", "end_seconds", "label"),
    3: ("path", "num_frames", "label"),
    2: ("path", "label"),
}
_BARE = ("path",)  # a path on each line, blanks and commas included: where no form fits
_SUFFIX = re.compile(r"\.\w{2,5}$")
_DELIMITERS = {"tabs": "\t", "commas": ",", "blanks": " "}
_SAMPLE_LINES = 1000  # how many lines decide what separates the fields
_PROBED_CLIPS = 8  # of a list, to tell a wrong folder from missing videos
_SHOWN_LINES = 20  # bad lines spelt out in a message; the rest are counted
_BLANKS = re.compile(r'"((?:[^"]|"")*)"(?=\s|$)|([^"\s]\S*)')


@dataclasses.dataclass(frozen=True, slots=True)  # there may be millions
class Clip:
    """One line of a list. `id` hashes `name`, start and end: it survives moving and reordering.

    `name` is the path as the list has it (relative to the prefix where it lies below), `path`
    where the file is. Unknown values (-1 in a list) are None; `num_frames` is given for folders
    of frames only; `line` counts from 1.
    """

    id: int
    path: str
    name: str
    label: int | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None
    total_seconds: float | None = None
    source: str | None = None
    num_frames: int | None = None
    line: int = 0


def clip_id(name: str, start_seconds: float | None = None, end_seconds: float | None = None) -> int:
    """A clip's signed 64-bit id."""
    return draw.key("clip", name, _text(start_seconds), _text(end_seconds))


def read_list(section: ClipList, *, seed: int = 0) -> list[Clip]:
    """Read a list file; what separates its fields and which form it has is found by looking.

    Paths are relative to `prefix` or, without one, to the list's folder; `~` is the home folder.
    A list that is a folder of class folders is its videos, or a part of them.
    `share` keeps that part of each class, chosen by `seed`.

    Raises `InputError` that names every bad line with its number.
    """
    if section.list is None:
        raise InputError("no list file is given: set data.train.list (or val, test) to one")
    path = Path(section.list).expanduser()
    if path.is_dir():
        clips = _folder_clips(path, section)
        return _keep_share(clips, section.share, seed) if section.share < 1 else clips
    if section.part is not None:
        raise InputError(f"{path}: no such folder; `part` is of a folder of class folders")
    lines = _read_lines(path)
    if not lines:
        raise InputError(f"{path}: the list is empty; expected a clip on each line")
    base = Path(section.prefix).expanduser() if section.prefix else path.parent
    split, columns = _find_form(lines, path)
    clips: list[Clip] = []
    seen: dict[int, int] = {}
    wrong: list[str] = []
    for number, line in lines:
        try:
            clip = _parse(split(line), columns, number=number, base=base)
        except (ValueError, csv.Error) as error:
            wrong.append(f"{path}:{number}: {error}")
            continue
        if clip.id in seen:
            wrong.append(f"{path}:{number}: the same clip as in line {seen[clip.id]}: {clip.name}")
        seen.setdefault(clip.id, number)
        clips.append(clip)
    if wrong:
        raise InputError(_all_wrong(wrong))
    return _keep_share(clips, section.share, seed) if section.share < 1 else clips


def list_bytes(section: ClipList) -> bytes:
    """What a list says: the file's bytes, or a line for each video of a folder."""
    path = Path(section.list).expanduser()
    if not path.is_dir():
        return path.read_bytes()
    return "".join(f"{clip.name} {clip.label}\n" for clip in _folder_clips(path, section)).encode()


def _folder_clips(folder: Path, section: ClipList) -> list[Clip]:
    return [
        Clip(id=clip_id(name), path=os.path.join(folder, name), name=name, label=label, line=number)
        for number, (name, label) in enumerate(read_folder(folder, section.part), 1)
    ]


def check_videos(clips: Sequence[Clip], section: ClipList) -> None:
    """Raise InputError if none of the first videos exists: that is a wrong folder, not bad luck."""
    if not any(os.path.exists(clip.path) for clip in clips[:_PROBED_CLIPS]):
        raise InputError(
            f"{section.list}: {clips[0].path} is not there, nor are the clips after it; "
            "set the list's `prefix` to the folder that holds them"
        )


def _read_lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such list file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file in UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the list: {error.strerror}") from None
    numbered = ((number, line.strip(" \r")) for number, line in enumerate(text.split("\n"), 1))
    return [(number, line) for number, line in numbered if line.strip()]


def _find_form(
    lines: list[tuple[int, str]], path: Path
) -> tuple[Callable[[str], list[str]], tuple[str, ...]]:
    """The separator and form under which most lines at the top make sense, or at least fit."""
    best, best_score = None, (0, 0)
    for delimiter in _DELIMITERS.values():
        split = _splitter(delimiter)
        scores = dict.fromkeys(FORMS, (0, 0))
        for number, line in lines[:_SAMPLE_LINES]:
            try:
                fields = split(line)
            except (ValueError, csv.Error):
                continue
            if len(fields) not in FORMS:
                continue
            good, fitting = scores[len(fields)]
            try:
                _parse(fields, FORMS[len(fields)], number=number, base=Path())
                good += 1
            except ValueError:
                fitting += 1
            scores[len(fields)] = good, fitting
        for count, score in scores.items():
            if score > best_score:
                best, best_score = (split, FORMS[count]), score
    if not best_score[0] and all(_SUFFIX.search(_bare(line)) for _, line in lines[:_SAMPLE_LINES]):
        return lambda line: [_bare(line)], _BARE
    if best is None:
        number, line = lines[0]
        forms = "; ".join(f"'{' '.join(fields)}'" for fields in (*FORMS.values(), _BARE))
        raise InputError(
            f"{path}:{number}: no known form, separated by {', '.join(_DELIMITERS)}: expected "
            f"{forms}; found {line[:80]!r}; quote paths that hold the separator"
        )
    return best


def _bare(line: str) -> str:
    return line.strip().strip('"')


def _splitter(delimiter: str) -> Callable[[str], list[str]]:
    if delimiter == " ":
        return _split_blanks
    return lambda line: [
        field.strip() for field in next(csv.reader([line], delimiter=delimiter, strict=True))
    ]


def _split_blanks(line: str) -> list[str]:
    fields, end = [], 0
    for match in _BLANKS.finditer(line):
        if line[end : match.start()].strip():
            break
        quoted, bare = match.groups()
        fields.append(bare if quoted is None else quoted.replace('""', '"'))
        end = match.end()
    if line[end:].strip():
        raise ValueError(f"quotes do not match at {line[end:].strip()[:40]!r}")
    return fields


def _parse(fields: list[str], columns: tuple[str, ...], *, number: int, base: Path) -> Clip:
    if len(fields) != len(columns):
        raise ValueError(
            f"expected {len(columns)} fields ({' '.join(columns)}), found {len(fields)}; "
            "quote a path that holds the separator"
        )
    row = dict(zip(columns, fields, strict=True))
    if not row["path"]:
        raise ValueError("the path is empty")
    start, end, total = (
        _seconds(row.get(name), name) for name in ("start_seconds", "end_seconds", "total_seconds")
    )
    if start is not None and end is not None and start >= end:
        raise ValueError(f"start_seconds {start:g} is not before end_seconds {end:g}")
    if start is not None and total is not None and start >= total:
        raise ValueError(f"start_seconds {start:g} is not before total_seconds {total:g}")
    num_frames = _whole(row["num_frames"], "num_frames", 1) if "num_frames" in row else None
    label = _whole(row["label"], "label", -1) if "label" in row else -1
    name, path = _place(row["path"], base)
    return Clip(
        id=clip_id(name, start, end),
        path=path,
        name=name,
        label=None if label == -1 else label,
        start_seconds=start,
        end_seconds=end,
        total_seconds=total,
        source=row.get("source"),
        num_frames=num_frames,
        line=number,
    )


def _place(field: str, base: Path) -> tuple[str, str]:
    """A clip's name and where its file is. '~' stays in the name, so that homes may differ."""
    name = os.path.normpath(field)
    path = os.path.join(base, os.path.expanduser(name))
    if os.path.isabs(name):
        below = os.path.relpath(name, os.path.abspath(base))
        if below != os.curdir and below.split(os.sep)[0] != os.pardir:
            name = below
    return name.replace(os.sep, "/"), path


def _seconds(field: str | None, column: str) -> float | None:
    if field is None:
        return None
    try:
        value = float(field)
    except ValueError:
        raise ValueError(f"{column} is {field!r}, expected seconds or -1") from None
    if value == -1:
        return None
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{column} is {field!r}, expected seconds or -1")
    return value


def _whole(field: str, column: str, least: int) -> int:
    try:
        value = int(field)
    except ValueError:
        value = least - 1
    if value < least:
        raise ValueError(f"{column} is {field!r}, expected a whole number from {least}")
    return value


def _all_wrong(wrong: list[str]) -> str:
    more = len(wrong) - _SHOWN_LINES
    shown = wrong[:_SHOWN_LINES] + ([f"and {more} more bad lines"] if more > 0 else [])
    return "\n".join(shown)


def _keep_share(clips: list[Clip], share: float, seed: int) -> list[Clip]:
    """At least one clip of each class, chosen by hash: the list's order does not matter."""
    classes: dict[int | None, list[Clip]] = {}
    for clip in clips:
        classes.setdefault(clip.label, []).append(clip)
    kept: set[int] = set()
    for members in classes.values():
        members.sort(key=lambda clip: draw.key("share", seed, clip.id))
        kept.update(clip.id for clip in members[: max(1, round(share * len(members)))])
    return [clip for clip in clips if clip.id in kept]


def _text(seconds: float | None) -> str:
    return "" if seconds is None else repr(float(seconds))
