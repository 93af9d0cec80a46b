"""A run's folder: held by one process at a time, and by the recipe that it was started with."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.checkpoint import latest_checkpoint, naming_full_disk, write_text
from distill.dist import joined_part, wait_for_all
from distill.errors import StateError
from distill.recipe import Recipe
from distill.recipe_file import differences, dump_recipe, load_recipe

SUMMARY = "summary.json"
RECIPE = "recipe.yaml"


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keep other jobs from training in the folder; StateError when one does already.

    The first of the processes that have joined holds it for all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if joined_part().index:
        yield
        return
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(
                f"{folder}: another process is training there; wait for it or set run.folder"
            ) from None
        yield


@contextmanager
def claim_folder(folder: Path, recipe: Recipe) -> Iterator[None]:
    """Hold the run folder for this process and this recipe, written to its recipe.yaml.

    Raises StateError when another process trains there, or when what lies there came from other
    settings that have a say in the result, or when the disk is full.
    """
    with hold_folder(folder), naming_full_disk(folder):
        path = folder / RECIPE
        has_begun = (folder / SUMMARY).exists() or latest_checkpoint(folder / "checkpoints")
        if has_begun and path.exists():
            changed = differences(load_recipe(path), recipe)
            if changed:
                raise StateError(
                    f"{folder}: was started with other settings ({'; '.join(changed)}); put them "
                    "back, or set run.folder to start another run"
                )
        if joined_part().index == 0:
            write_text(path, dump_recipe(recipe))
        wait_for_all()  # nobody looks for checkpoints in a folder that is refused
        yield
