"""A labelled set of real videos, made here: handwritten digits moving over photographs.

Classes come in pairs of which one is the other played backwards, so that no single frame, and no
set of frames without their order, tells the two apart. Digits (scikit-learn's 1,797) and
photographs (scikit-image's and scikit-learn's) are divided between the splits, so that no source
image is seen in two of them.
"""

import csv
import math
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from PIL import Image

from distill import draw
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
SIZE = 64  # pixels on a side
FRAMES = 16
FPS = 16


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
    side = np.full(FRAMES, rng.uniform(20, 28))
    opacity = np.ones(FRAMES)
    x, y = (np.full(FRAMES, rng.uniform(18, SIZE - 18)) for _ in range(2))
    drift = rng.uniform(-5, 5, size=2)
    if motion in ("right", "down"):
        length = rng.uniform(14, 30)
        start = rng.uniform(10, SIZE - 10 - length)
        along = start + length * time
        across = rng.uniform(12, SIZE - 12) + drift[0] * time
        x, y = (along, across) if motion == "right" else (across, along)
    elif motion == "clockwise":
        radius, phase, sweep = rng.uniform(9, 16), rng.uniform(0, 2 * np.pi), rng.uniform(3, 6)
        x, y = (rng.uniform(radius + 10, SIZE - radius - 10) for _ in range(2))
        angle = phase + sweep * time
        x, y = x + radius * np.cos(angle), y + radius * np.sin(angle)  # y points down
    elif motion == "grows":
        side = side * np.linspace(rng.uniform(0.6, 0.8), rng.uniform(1.1, 1.4), FRAMES)
        x, y = x + drift[0] * time, y + drift[1] * time
    elif motion == "appears":
        opacity = np.clip((time - rng.uniform(0.2, 0.7)) / 0.15, 0, 1)
        x, y = x + drift[0] * time, y + drift[1] * time
    return Digit(x, y, side, opacity)


MOTIONS = ("right", "down", "clockwise", "grows", "appears")


def render_clip(label: int, split: str, *, number: int, seed: int) -> np.ndarray:
    """Frames uint8 [T,H,W,3] of clip `number` of a split: a function of its arguments."""
    rng = draw.generator("moving-digits", seed, split, number)
    background = _background(split, rng)
    frames = np.repeat(background[None], FRAMES, axis=0)
    for motion in (MOTIONS[label // 2],):
        image = _digit(split, rng)
        path = _still(rng) if motion is None else _trajectory(motion, rng)
        color = rng.uniform(170, 255, size=3)
        strength = rng.uniform(0.85, 1.0)
        for time in range(FRAMES):
            _paste(frames[time], image, color, path, time, strength)
    if label % 2:
        frames = frames[::-1]
    noise = rng.normal(0, 4, size=frames.shape)
    return np.clip(np.rint(frames + noise), 0, 255).astype(np.uint8)


def _still(rng: np.random.Generator) -> Digit:
    x, y, side = rng.uniform(12, SIZE - 12), rng.uniform(12, SIZE - 12), rng.uniform(14, 24)
    return Digit(*(np.full(FRAMES, value) for value in (x, y, side, 1.0)))


def _paste(frame, image: Image.Image, color, path: Digit, time: int, strength: float) -> None:
    side = max(4, round(path.side[time]))
    alpha = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
    alpha = alpha[..., None] * strength * path.opacity[time]
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
    return np.asarray(resized, np.float32) * 0.45
