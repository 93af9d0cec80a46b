"""From decoded frames to the square uint8 clip that a model sees.

Every frame of a clip gets the same operations, crop, flip and erased box. Random choices are
drawn in a fixed order from the generator that is handed in, so that a view is the same bit for
bit wherever it is made.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from distill.data.rand_augment import apply_operations
from distill.recipe import Mixing, Views

# Wang et al., Temporal Segment Networks: candidate sizes as shares of the short side.
_SCALES = (1.0, 0.875, 0.75, 0.66)
_SNAP = 2  # a candidate this close to the image size becomes it, which spares the resize
_ASPECT = (3 / 4, 4 / 3)  # Inception's crop
_TRIES = 10
# The thirteen places of a multi-scale crop, in quarters of the slack: corners, centre, the
# middles of the edges, and the quarter points.
_PLACES = (
    *((0, 0), (4, 0), (0, 4), (4, 4), (2, 2)),
    *((0, 2), (4, 2), (2, 4), (2, 0)),
    *((1, 1), (3, 1), (1, 3), (3, 3)),
)
# Zhong et al., Random Erasing: bounds of the box's share of the frame and of its aspect.
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_ASPECT = (0.3, 1 / 0.3)
_ERASED_TRIES = 100
# Noise is kept in a view's uint8 pixels, as so many steps to a standard deviation.
NOISE_STEPS = 32
NOISE_ZERO = 128


@dataclasses.dataclass(frozen=True)
class Crop:
    """A box of pixels, cut before frames are resized to `size` pixels a side.

    Where `resize` (width, height) is given, frames are first resized to that and the box is one
    of its pixels.
    """

    x: int
    y: int
    width: int
    height: int
    size: int
    resize: tuple[int, int] | None = None


def draw_crop(views: Views, *, width: int, height: int, rng: np.random.Generator) -> Crop:
    """The training crop of a recipe for frames of width x height."""
    match views.crop:
        case "multiscale":
            return multiscale_crop(width, height, size=views.image_size, rng=rng)
        case "resized":
            size, area = views.image_size, views.min_area
            return resized_crop(width, height, size=size, min_area=area, rng=rng)
        case "center":
            return eval_crop(width, height, size=views.image_size, crop=0, num_crops=1)


def multiscale_crop(width: int, height: int, *, size: int, rng: np.random.Generator) -> Crop:
    """One of ten sizes at one of thirteen places (spec: distillation's multi-scale crop)."""
    short = min(width, height)
    sizes = [max(int(short * scale), 1) for scale in _SCALES]
    sizes = [size if abs(side - size) <= _SNAP and size <= short else side for side in sizes]
    pairs = [(w, h) for i, h in enumerate(sizes) for j, w in enumerate(sizes) if abs(i - j) <= 1]
    crop_width, crop_height = pairs[rng.integers(len(pairs))]
    across, down = _PLACES[rng.integers(len(_PLACES))]
    x = across * ((width - crop_width) // 4)
    y = down * ((height - crop_height) // 4)
    return Crop(x, y, crop_width, crop_height, size)


def resized_crop(
    width: int, height: int, *, size: int, min_area: float, rng: np.random.Generator
) -> Crop:
    """A box of random area and log-uniform aspect, or the largest central one after ten tries."""
    low, high = (math.log(aspect) for aspect in _ASPECT)
    for _ in range(_TRIES):
        area = width * height * rng.uniform(min_area, 1.0)
        aspect = math.exp(rng.uniform(low, high))
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            x = int(rng.integers(width - crop_width, endpoint=True))
            y = int(rng.integers(height - crop_height, endpoint=True))
            return Crop(x, y, crop_width, crop_height, size)
    crop_width = min(width, max(round(height * _ASPECT[1]), 1))
    crop_height = min(height, max(round(width / _ASPECT[0]), 1))
    x, y = (width - crop_width) // 2, (height - crop_height) // 2
    return Crop(x, y, crop_width, crop_height, size)


def eval_crop(width: int, height: int, *, size: int, crop: int, num_crops: int) -> Crop:
    """Crop `crop` of `num_crops` along the longer side, after the shorter is resized to `size`.

    One crop is the centre one, with half the slack rounded half to even.
    """
    if not 0 <= crop < num_crops:
        raise ValueError(f"crop {crop} is not one of {num_crops}")
    short = min(width, height)
    resize = (size * width // short, size * height // short)
    slack = max(resize) - size
    start = round(slack / 2) if num_crops == 1 else int(crop * (slack / (num_crops - 1)))
    x, y = (start, 0) if width >= height else (0, start)
    return Crop(x, y, size, size, size, resize)


def draw_erased(
    size: int, *, probability: float, rng: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """The box (x, y, width, height) of a view of `size` pixels to fill with noise, if any."""
    if rng.random() >= probability:
        return None
    low, high = (math.log(aspect) for aspect in _ERASED_ASPECT)
    for _ in range(_ERASED_TRIES):
        area = size * size * rng.uniform(*_ERASED_AREA)
        aspect = math.exp(rng.uniform(low, high))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width < size and 0 < height < size:
            y = int(rng.integers(size - height, endpoint=True))
            x = int(rng.integers(size - width, endpoint=True))
            return x, y, width, height
    return None


def erase(pixels: np.ndarray, box: tuple[int, int, int, int], *, rng: np.random.Generator) -> None:
    """Fill a box of every frame of pixels uint8 [3,T,S,S] with standard normal noise, coded.

    It stands for values after normalisation: `(code - NOISE_ZERO) / NOISE_STEPS`, cut off at
    about four standard deviations.
    """
    x, y, width, height = box
    hole = pixels[:, :, y : y + height, x : x + width]
    noise = rng.standard_normal(hole.shape, dtype=np.float32)
    hole[:] = np.rint(noise * NOISE_STEPS + NOISE_ZERO).clip(0, 255).astype(np.uint8)


def draw_mixing(
    section: Mixing, size: int, *, rng: np.random.Generator
) -> tuple[float, int, int, int, int]:
    """How a batch is mixed with itself in reverse: the share of its own labels, and a box.

    CutMix takes the box (x, y, width, height) from the partner, the same in all frames, and the
    share is what it leaves after it was cut off at the edges. Mixup has an empty box, and takes
    the share for pixels too.
    """
    if rng.random() >= section.cutmix_share:
        return float(rng.beta(section.mixup_alpha, section.mixup_alpha)), 0, 0, 0, 0
    side = int(size * math.sqrt(1 - rng.beta(section.cutmix_alpha, section.cutmix_alpha)))
    x, y = (int(centre) for centre in rng.integers(size, size=2))
    (left, right), (top, bottom) = (
        (max(centre - side // 2, 0), min(centre + (side + 1) // 2, size)) for centre in (x, y)
    )
    width, height = right - left, bottom - top
    return 1 - width * height / size**2, left, top, width, height


def apply(
    pixels: np.ndarray,
    crop: Crop,
    *,
    flip: bool,
    operations: Sequence[tuple[str, float]] = (),
    antialias: bool = True,
) -> np.ndarray:
    """Augment, crop, resize (bilinear, rounded to uint8) and flip: [T,H,W,3] to [3,T,S,S].

    `operations` are those of `rand_augment.draw_operations`. Everything is uint8. With
    `antialias` the resize is PIL's, without it `bilinear`.
    """
    box = (crop.x, crop.y, crop.x + crop.width, crop.y + crop.height)
    target = (crop.size, crop.size)
    out = np.empty((3, len(pixels), crop.size, crop.size), np.uint8)
    for i, frame in enumerate(pixels):
        image = apply_operations(Image.fromarray(frame), operations)
        if not antialias:
            square = bilinear(np.asarray(image), crop)
            out[:, i] = (square[:, ::-1] if flip else square).transpose(2, 0, 1)
            continue
        if crop.resize is not None and image.size != crop.resize:
            image = image.resize(crop.resize, Image.Resampling.BILINEAR)
        image = image.crop(box)
        if image.size != target:
            image = image.resize(target, Image.Resampling.BILINEAR)
        square = np.asarray(image)
        out[:, i] = (square[:, ::-1] if flip else square).transpose(2, 0, 1)
    return out


def bilinear(frame: np.ndarray, crop: Crop) -> np.ndarray:
    """Cut and resize a frame uint8 [H,W,3] to [S,S,3] from the four nearest pixels of each.

    Those of OpenCV's and torch's bilinear resize, which do not blur what they shrink: the frame's
    where it is resized before the cut, and the box's own otherwise.
    """
    if crop.resize is None:
        across = _neighbours(crop.width, crop.size, first=0, start=crop.x, count=crop.size)
        down = _neighbours(crop.height, crop.size, first=0, start=crop.y, count=crop.size)
    else:
        height, width = frame.shape[:2]
        across = _neighbours(width, crop.resize[0], first=crop.x, start=0, count=crop.size)
        down = _neighbours(height, crop.resize[1], first=crop.y, start=0, count=crop.size)
    rows = _blend(frame, *down, axis=0)  # [S,W,3]
    return np.rint(_blend(rows, *across, axis=1)).astype(np.uint8)


def _neighbours(
    length: int, resized: int, *, first: int, start: int, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the pixels from `first` on of an axis resized from `length`: sources, weight of second.

    The axis begins at pixel `start` of the frame's. Centres of pixels lie at halves.
    """
    place = (np.arange(first, first + count) + 0.5) * (length / resized) - 0.5
    place = place.clip(0, length - 1)
    low = place.astype(np.int64)
    high = np.minimum(low + 1, length - 1)
    return start + low, start + high, (place - low).astype(np.float32)


def _blend(
    values: np.ndarray, low: np.ndarray, high: np.ndarray, weight: np.ndarray, *, axis: int
) -> np.ndarray:
    lower = values.take(low, axis=axis).astype(np.float32)
    mixed = values.take(high, axis=axis) - lower
    mixed *= weight[:, None, None] if axis == 0 else weight[:, None]
    mixed += lower
    return mixed
