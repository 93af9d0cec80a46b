"""Small data and starting weights for toys of the shipped recipes, and a loader without processes.

Starting weights are random, in the layouts that released ones have.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from videos import burn, write

from distill.data.decode import Frames, Video, open_video
from distill.data.load import Quarantine, Task, View
from distill.errors import InputError
from distill.recipe import Recipe, vit_size
from distill.students import create_classifier, create_student
from distill.toy import SIZES

CLIPS, FRAMES, SECONDS = 8, 20, 0.8
MODULES = ("data.load", "evaluation.evaluate", "cache.live", "features")  # that load clips


class HereLoader:
    """What `ClipLoader` does, in this process: starting workers takes longer than a toy's run."""

    def __init__(
        self, load: Callable[[Task], View], *, quarantine: Quarantine, **_: object
    ) -> None:
        self._load, self._quarantine, self.wait_seconds = load, quarantine, 0.0

    def run(self, batches: Iterable[Sequence[Task]]) -> Iterator[list[tuple[Task, View]]]:
        for tasks in batches:
            yield list(self._loaded(tasks))

    def keeping_workers(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _loaded(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, View]]:
        for task in tasks:
            if task.clip in self._quarantine:
                continue
            try:
                yield task, self._load(task)
            except InputError as error:
                self._quarantine.add(task.clip, str(error))


@functools.cache
def decoded(path: str, decoder: str) -> Video:
    """The video with all of its frames read: a toy looks at each of its few dozens of times."""
    with open_video(path, decoder=decoder) as video:
        whole = video.read(range(video.num_frames))

    def read(_: Video, wanted: list[int]) -> Frames:
        return Frames(whole.pixels[wanted], whole.pts_seconds[wanted])

    return Video(video.path, video.num_frames, video.fps, video.backend, read)


@contextlib.contextmanager
def open_decoded(path: str, *, decoder: str = "auto") -> Iterator[Video]:
    yield decoded(path, decoder)


def load_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.data.load.open_video", open_decoded)
    for module in MODULES:
        monkeypatch.setattr(f"distill.{module}.ClipLoader", HereLoader)


def make_data(folder: Path) -> None:
    """Videos and folders of frames, and lists of the first of them: videos2.csv, folders8.csv.

    In intervals2.csv and so on two lines each are of one video, and overlap.
    """
    for number in range(CLIPS):
        write(folder / f"{number}.mp4", num_frames=FRAMES, width=64, height=48)
        frames = folder / f"{number}"
        frames.mkdir()
        for frame in range(FRAMES):
            image = Image.fromarray(burn(frame, width=64, height=48))
            image.save(frames / f"{frame + 1:05}.jpg")
    intervals = [
        f"{number // 2}.mp4,{SECONDS},{number % 2 * 0.2},{0.6},{number}\n"
        for number in range(CLIPS)
    ]
    for kind, lines in (
        ("videos", [f"{number}.mp4,{number}\n" for number in range(CLIPS)]),
        ("folders", [f"{number} {FRAMES} {number}\n" for number in range(CLIPS)]),
        ("intervals", intervals),
    ):
        for count in (2, 4, 8):
            (folder / f"{kind}{count}.csv").write_text("".join(lines[:count]))


def start_weights(recipe: Recipe, folder: Path) -> Path | None:
    """A file of weights in the place of those that a toy recipe starts from; None for none."""
    weights = recipe.model.weights
    if weights is None:
        return None
    before = Path(weights.checkpoint).parent.as_posix().removesuffix("-toy")
    path = folder / f"{before.replace('/', '_')}.pth"
    if path.exists():
        return path
    parts = before.split("/")  # runs/L14, runs/k710/L14, runs/pretrain/6B or weights/...
    size = next(name for name in SIZES if vit_size(SIZES[name]) == vit_size(recipe.model.size))
    of = vit_size(SIZES[size])
    if parts[0] == "runs" and len(parts) == 3 and parts[1] != "pretrain":
        classes = {"k710": 710, "k400": 400, "mit": 339}[parts[1]]
        frames = 16 if parts[2].endswith("attentive") else 8
        model = create_classifier(of, num_classes=classes, frames=frames, image_size=28)
        content = {"model": model.state_dict(), "epoch": 4}
    else:
        layout = "distilled" if len(parts) == 2 and parts[0] == "runs" else "module"
        model = create_student(
            of,
            image_size=28,
            num_layers=2,
            decoder="mlp" if layout == "distilled" else "linear",
        )
        state = model.state_dict()
        half = {name: value.to(torch.bfloat16) for name, value in state.items()}
        content = half if layout == "distilled" else {"module": state}
    torch.save(content, path)
    return path
