"""A labelled set of real videos, made here: handwritten digits moving over photographs.

Classes come in pairs of which one is the other played backwards, so that no single frame, and no
set of frames without their order, tells the two apart. Digits (scikit-learn's 1,797) and
photographs (scikit-image's and scikit-learn's) are divided between the splits, so that no source
image is seen in two of them.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from PIL import Image

from distill import draw
from distill.errors import InputError
from distill.log import progress
from distill.recipe import Demo

CLASSES = (
    "moves right",
    "moves left",
    "moves down",
    "moves up",
    "circles clockwise",
    "circles anticlockwise",
    "grows",
    "shrinks",
    "appears",
    "disappears",
)
SPLITS = ("train", "val", "test")
PHOTOGRAPHS = {  # no two splits share a photograph; the two motorcycle views are one scene
    "train": (
        "astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png",
        "coins.png", "grass.png", "hubble_deep_field.jpg", "motorcycle_left.png",
        "retina.jpg", "flower.jpg",
    ),
    "val": ("gravel.png", "rocket.jpg", "moon.png"),
    "test": ("coffee.png", "china.jpg", "ihc.png", "page.png"),
}  # fmt: skip
SIZE = 48  # pixels on a side
FRAMES = 16
FPS = 16
# Without assembly: x264's macroblock tree in it gives a few percent of small videos other bytes
# from one encoding of the same frames to the next.
X264 = {"crf": "20", "threads": "1", "preset": "veryfast", "x264-params": "asm=0"}
BACKGROUND_BRIGHTNESS = 0.5  # a bright photograph hides the digit from a small model
REVISION = 2  # raise when the same settings give other videos


@dataclass(frozen=True)
class Digit:
    """One digit on its way: where, how large and how visible it is in each frame."""

    x: np.ndarray  # [T] centre, pixels
    y: np.ndarray
    side: np.ndarray  # [T] pixels
    opacity: np.ndarray  # [T] in 0..1


def _trajectory(motion: str, rng: np.random.Generator) -> Digit:
    """The forward half of a pair of classes; the other half is this reversed."""
    time = np.linspace(0, 1, FRAMES)
    side = np.full(FRAMES, rng.uniform(15, 21))
    opacity = np.ones(FRAMES)
    x, y = (rng.uniform(14, SIZE - 14) + rng.uniform(-4, 4) * time for _ in range(2))
    if motion in ("right", "down"):
        length = rng.uniform(10, 24)
        along = rng.uniform(8, SIZE - 8 - length) + length * time
        across = rng.uniform(9, SIZE - 9) + rng.uniform(-4, 4) * time
        x, y = (along, across) if motion == "right" else (across, along)
    elif motion == "clockwise":
        radius, phase, sweep = rng.uniform(7, 12), rng.uniform(0, 2 * np.pi), rng.uniform(3, 6)
        center_x, center_y = (rng.uniform(radius + 8, SIZE - radius - 8) for _ in range(2))
        angle = phase + sweep * time
        x, y = center_x + radius * np.cos(angle), center_y + radius * np.sin(angle)  # y is down
    elif motion == "grows":
        side = side * np.linspace(rng.uniform(0.6, 0.8), rng.uniform(1.1, 1.4), FRAMES)
    elif motion == "appears":
        opacity = np.clip((time - rng.uniform(0.2, 0.7)) / 0.15, 0, 1)
    return Digit(x, y, side, opacity)


MOTIONS = ("right", "down", "clockwise", "grows", "appears")


def render_clip(label: int, split: str, *, number: int, seed: int) -> np.ndarray:
    """Frames uint8 [T,H,W,3] of clip `number` of a split: a function of its arguments."""
    rng = draw.generator("moving-digits", seed, split, number)
    background = _background(split, rng)
    frames = np.repeat(background[None], FRAMES, axis=0)
    image, path = _digit(split, rng), _trajectory(MOTIONS[label // 2], rng)
    color = rng.uniform(150, 255, size=3)
    for time in range(FRAMES):
        _paste(frames[time], image, color, path, time)
    if label % 2:
        frames = frames[::-1]
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def _paste(
    frame: np.ndarray, image: Image.Image, color: np.ndarray, path: Digit, time: int
) -> None:
    side = max(4, round(path.side[time]))
    alpha = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
    alpha = alpha[..., None] * path.opacity[time]
    left, top = round(path.x[time] - side / 2), round(path.y[time] - side / 2)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, SIZE), min(top + side, SIZE)
    if x0 >= x1 or y0 >= y1:
        return
    alpha = alpha[y0 - top : y1 - top, x0 - left : x1 - left]
    frame[y0:y1, x0:x1] = frame[y0:y1, x0:x1] * (1 - alpha) + color * alpha


@lru_cache(maxsize=1)
def _digits() -> np.ndarray:
    from sklearn.datasets import load_digits

    return load_digits().images  # [1797,8,8], 0..16


def digit_range(split: str) -> range:
    """Which of scikit-learn's digits a split may use: 60, 20 and 20 percent."""
    total = len(_digits())
    cuts = {"train": (0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}[split]
    return range(int(total * cuts[0]), int(total * cuts[1]))


def _digit(split: str, rng: np.random.Generator) -> Image.Image:
    allowed = digit_range(split)
    pixels = _digits()[rng.integers(allowed.start, allowed.stop)]
    return Image.fromarray((pixels * (255 / 16)).astype(np.uint8))


@lru_cache(maxsize=32)
def photograph(name: str) -> np.ndarray:
    """A shipped photograph, RGB float32 [H,W,3], short side 256 pixels."""
    import skimage.data
    import sklearn.datasets

    folders = (
        Path(skimage.data.__file__).parent,
        Path(sklearn.datasets.__file__).parent / "images",
    )
    path = next(folder / name for folder in folders if (folder / name).exists())
    image = Image.open(path).convert("RGB")
    scale = 256 / min(image.size)
    size = tuple(round(side * scale) for side in image.size)
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32)


def _background(split: str, rng: np.random.Generator) -> np.ndarray:
    names = PHOTOGRAPHS[split]
    image = photograph(names[rng.integers(len(names))])
    side = int(rng.integers(SIZE, 200))
    top = int(rng.integers(0, image.shape[0] - side + 1))
    left = int(rng.integers(0, image.shape[1] - side + 1))
    crop = image[top : top + side, left : left + side]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    resized = Image.fromarray(crop.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float32) * BACKGROUND_BRIGHTNESS


def make_demo(demo: Demo) -> None:
    """Write the set's mp4 files and its train.csv, val.csv and test.csv (path,label).

    Goes on where an earlier call was stopped and does nothing where the set is complete; raises
    InputError if the folder holds a set made with other settings.
    """
    folder = Path(demo.folder)
    settings = demo.model_dump(exclude={"folder"}) | {"revision": REVISION}
    stamp = folder / "demo.json"
    if stamp.exists():
        if json.loads(stamp.read_text()) != settings:
            raise InputError(
                f"{folder}: holds a set made with other settings ({stamp.read_text().strip()}); "
                "delete it, or set data.demo.folder to another place"
            )
        return
    clips = [
        (split, number)
        for split in SPLITS
        for number in range(getattr(demo, f"{split}_clips"))
        if not _video_path(folder, split, number).exists()
    ]
    for split in SPLITS:
        (folder / "videos" / split).mkdir(parents=True, exist_ok=True)
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,  # the encoder works outside Python's lock
        progress("make videos", total=len(clips), unit="clips") as bar,
    ):
        for _ in pool.map(lambda clip: _make_clip(folder, *clip, seed=demo.seed), clips):
            bar.advance()
    for split in SPLITS:
        lines = (
            f"{_video_path(Path(), split, number).as_posix()},{number % len(CLASSES)}\n"
            for number in range(getattr(demo, f"{split}_clips"))
        )
        _write_text(folder / f"{split}.csv", "".join(lines))
    _write_text(stamp, json.dumps(settings))


def _video_path(folder: Path, split: str, number: int) -> Path:
    return folder / "videos" / split / f"{number:06d}.mp4"


def _make_clip(folder: Path, split: str, number: int, *, seed: int) -> None:
    frames = render_clip(number % len(CLASSES), split, number=number, seed=seed)
    write_video(_video_path(folder, split, number), frames)


def write_video(path: Path, frames: np.ndarray) -> None:
    """Encode uint8 frames [T,H,W,3] as H.264 in mp4: the same bytes for the same frames.

    The file is complete or not there at all.
    """
    unfinished = _unfinished(path)
    with av.open(str(unfinished), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options=X264)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            # One thread: a pool of converters started for each frame costs more than it converts.
            container.mux(stream.encode(frame.reformat(format="yuv420p", threads=1)))
        container.mux(stream.encode())
    os.replace(unfinished, path)


def _unfinished(path: Path) -> Path:
    """A name of this process's own: torchrun's all make the set at once."""
    return path.with_suffix(f".{os.getpid()}.unfinished")


def _write_text(path: Path, text: str) -> None:
    unfinished = _unfinished(path)
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
