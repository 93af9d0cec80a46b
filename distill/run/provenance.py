"""What a run was made with, written into its folder once, when it starts."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from distill import recipe as schema
from distill.cache.index import found_identity
from distill.cache.store import open_folder
from distill.checkpoint import write_json
from distill.dist import joined_part
from distill.evaluation.manifest import PACKAGES, device_name, package_version

FILE = "provenance.json"
_CPU_INFO = Path("/proc/cpuinfo")


def note_provenance(recipe: schema.Recipe, folder: Path, *, device: torch.device) -> None:
    """Write what `provenance` says to the run folder, unless an earlier start has done so."""
    path = folder / FILE
    if joined_part().index == 0 and not path.exists():
        write_json(path, provenance(recipe, device=device))


def provenance(recipe: schema.Recipe, *, device: torch.device) -> dict[str, Any]:
    """Command, versions, hardware and what the cache says it is, as JSON values."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            **{name: package_version(name) for name in PACKAGES},
            "cuda": torch.version.cuda if device.type == "cuda" else None,
        },
        "hardware": {
            "device": device_name(device),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "processes": joined_part().count,
        },
        "cache": _cache(recipe),
    }


def _processor() -> str:
    """The processor's name as Linux knows it, or else its kind."""
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _cache(recipe: schema.Recipe) -> dict[str, Any] | None:
    section = recipe.objective
    if not isinstance(section, schema.Distill) or section.cache is None:
        return None
    identity = (
        None if section.targets == "live" else found_identity(open_folder(section.cache.folder))
    )
    return {"folder": section.cache.folder, "identity": identity}


def changed_settings(recipe: schema.Recipe) -> dict[str, float | str | bool]:
    """Single values of a recipe that are not the defaults, by their dotted names."""
    found: dict[str, float | str | bool] = {}

    def walk(section: Mapping[str, Any], above: str) -> None:
        for name, value in section.items():
            if isinstance(value, Mapping):
                walk(value, f"{above}{name}.")
            elif isinstance(value, float | int | str | bool):
                found[above + name] = value

    walk(recipe.model_dump(mode="json", exclude_defaults=True), "")
    return found
