"""A folder of class folders in place of lists: VIDEOS/CLASS/NAME.mp4.

Its videos are divided by the hashes of their names into train, val and test, unless the folder is
so divided already: VIDEOS/train/CLASS/NAME.mp4 and VIDEOS/test/CLASS/NAME.mp4.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from distill import draw
from distill.errors import InputError

Part = Literal["train", "val", "test"]

PARTS = get_args(Part)
SHARES = {"val": 0.1, "test": 0.2}  # of each class, and at least one video; the rest is train's
SUFFIXES = (
    ".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts",
    ".webm", ".wmv",
)  # fmt: skip


def class_names(folder: Path) -> tuple[str, ...]:
    """The class folders' names in order; a class's label is its place. InputError for none."""
    top = folder / "train" if _is_divided(folder) else folder
    stray = next((entry.name for entry in _entries(top) if _is_video(entry.name)), None)
    names = tuple(entry.name for entry in _entries(top) if entry.is_dir())
    if stray or not names:
        found = f"{stray} is in no class folder" if stray else "has no folders"
        raise InputError(f"{top}: {found}; sort the videos into a folder for each class")
    return names


def read_folder(folder: Path, part: Part | None = None) -> list[tuple[str, int]]:
    """Every video of a part, or of all of them, with its class's number.

    Paths are relative to the folder and sorted. A part depends on the names alone: a video that is
    added moves at most a few others of its class. Raises InputError for a class with fewer videos
    than parts, where a part is asked for.
    """
    names = class_names(folder)
    divided = {one: one for one in PARTS if (folder / one).is_dir()} if _is_divided(folder) else {}
    if divided and part in ("test", None):
        _check_names(folder / "test", names)
    sources = {one: divided.get(one, "train" if divided else "") for one in PARTS}
    wanted = PARTS if part is None else (part,)
    found: list[tuple[str, int]] = []
    for label, name in enumerate(names):
        for source in dict.fromkeys(sources[one] for one in wanted):
            place = os.path.join(source, name)
            videos = _videos(folder, place)
            if part is not None:
                shared = [one for one in PARTS if sources[one] == source]
                videos = _divide(videos, shared, place=folder / place)[part]
            found += [(video, label) for video in videos]
    return sorted(found, key=lambda item: (item[1], item[0]))


def fill_from_folder(tree: dict[str, Any]) -> None:
    """Turn `data.folder` of a recipe's tree into its lists, number of classes and their names.

    Lists that are files stay. Classes stay as they are where the folder is not there.
    """
    data, objective = tree.get("data"), tree.get("objective")
    if not isinstance(data, dict) or not isinstance(data.get("folder"), str):
        return
    folder = data["folder"]
    tree["data"] = data = dict(data)
    for part in PARTS:
        clips = data.get(part) or {}
        if isinstance(clips, dict) and (clips.get("part") or clips.get("list") is None):
            data[part] = {**clips, "list": folder, "prefix": None, "part": part}
    path = Path(folder).expanduser()
    if isinstance(objective, dict) and objective.get("kind") == "classify" and path.is_dir():
        names = class_names(path)
        tree["objective"] = {**objective, "num_classes": len(names), "class_names": list(names)}


def _is_divided(folder: Path) -> bool:
    names = {entry.name for entry in _entries(folder) if entry.is_dir()}
    return {"train", "test"} <= names <= set(PARTS)


def _check_names(folder: Path, names: Sequence[str]) -> None:
    unknown = [
        entry.name for entry in _entries(folder) if entry.is_dir() and entry.name not in names
    ]
    if unknown:
        raise InputError(
            f"{folder / unknown[0]}: a class that train has no folder of; add or move it"
        )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            seen = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder}: cannot read the folder: {error.strerror}") from None
    return sorted(seen, key=lambda entry: entry.name)


def _is_video(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


def _videos(folder: Path, below: str) -> list[str]:
    return [
        os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/")
        for place, _, names in os.walk(folder / below, followlinks=True)
        for name in names
        if _is_video(name)
    ]


def _divide(videos: list[str], parts: Sequence[Part], *, place: Path) -> dict[Part, list[str]]:
    """The videos of a class by part, in an order that their names' hashes make."""
    if len(videos) < len(parts):
        raise InputError(
            f"{place}: {len(videos)} videos, expected at least {len(parts)}: "
            f"one each for {', '.join(parts)}"
        )
    left = sorted(videos, key=lambda name: draw.key("part", name))
    divided: dict[Part, list[str]] = {}
    for part in [one for one in parts if one != "train"] if len(parts) > 1 else []:
        count = max(1, round(SHARES[part] * len(videos)))
        divided[part], left = left[:count], left[count:]
    divided[parts[0]] = divided.get(parts[0], []) + left
    return divided
