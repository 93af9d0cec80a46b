"""Clips that a cache's builds could not decode: a list of its own for each writer, read as one."""

from collections.abc import Sequence

import numpy as np

from distill.cache.store import Folder, unique_name
from distill.data.index import Clip
from distill.data.workers import Quarantine, parse_entries

PREFIX, SUFFIX = "quarantine", ".jsonl"


def quarantine_files(folder: Folder) -> str:
    """What the lists of a cache are called, for messages."""
    return f"{folder}/{PREFIX}*{SUFFIX}"


def quarantine_entries(folder: Folder) -> list[dict[str, int | str]]:
    """What all lists of a cache say, as `Quarantine.entries`, each clip once."""
    found = {}
    for name in folder.sizes(PREFIX):
        if name.endswith(SUFFIX):
            for entry in parse_entries(folder.read(name), where=folder.at(name)):
                found.setdefault(entry["id"], entry)
    return list(found.values())


def quarantined_ids(folder: Folder) -> np.ndarray:
    """Ids int64 of the clips that the builds of a cache could not decode."""
    return np.array([entry["id"] for entry in quarantine_entries(folder)], np.int64)


def open_quarantine(folder: Folder, *, clips: Sequence[Clip], max_share: float) -> Quarantine:
    """A list of this process's own, which begins with what the others say."""
    path = folder.scratch() / f"{PREFIX}-{unique_name()}{SUFFIX}"

    def publish() -> None:
        folder.write(path.name, path.read_bytes())  # whole: an object cannot be appended to

    return Quarantine(
        path,
        total=len(clips),
        max_share=max_share,
        clips=clips,
        earlier=quarantine_entries(folder),
        where=quarantine_files(folder),
        publish=None if folder.is_local else publish,
    )
