"""Arrays that can be looked at: frames with their mask, maps of tokens, colours of features."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from einops import rearrange, repeat
from PIL import Image

from distill.students.vit import PATCH

PAPER = (250, 250, 248)
MISSING = (214, 214, 210)  # of which there are no pixels
MISSING_DOT = (190, 190, 186)
DIMMED = 0.3  # of the colour that a masked patch keeps
FRAME_PIXELS = 84  # a frame's side in a strip: small ones are enlarged by whole factors
GAP = 3
JPEG_QUALITY = 82
# Dark blue over purple and orange to yellow: "plasma" of S. van der Walt and N. Smith (CC0),
# read off at equal distances.
HEAT = np.array(
    [(13, 8, 135), (84, 2, 163), (139, 10, 165), (185, 50, 137), (219, 92, 104)]
    + [(244, 136, 73), (254, 188, 43), (240, 249, 33)],
    np.float32,
)


def draw_patches(
    grid: tuple[int, int, int], *, kept: np.ndarray, patches: np.ndarray, seen: np.ndarray
) -> np.ndarray:
    """Frames uint8 [T,S,S,3] from the `kept` patches [n,PATCH,PATCH,3] of a token grid.

    Those that are not among the `seen` ones are pale, and grey those that there are none of.
    """
    t, h, w = grid
    drawn = np.empty((t * h * w, PATCH, PATCH, 3), np.uint8)
    drawn[:] = _blank_patch()
    drawn[kept] = patches
    is_pale = np.setdiff1d(kept, seen, assume_unique=True)
    drawn[is_pale] = _dim(drawn[is_pale])
    return rearrange(drawn, "(t h w) p q c -> t (h p) (w q) c", t=t, h=h, w=w)


def _blank_patch() -> np.ndarray:
    """A grey tile with a dot, so that masked patches can be counted."""
    patch = np.empty((PATCH, PATCH, 3), np.uint8)
    patch[:] = MISSING
    middle = PATCH // 2
    patch[middle - 1 : middle + 1, middle - 1 : middle + 1] = MISSING_DOT
    return patch


def _dim(patches: np.ndarray) -> np.ndarray:
    """Towards the paper and half way to grey."""
    colour = patches.astype(np.float32)
    colour = (colour + colour.mean(axis=-1, keepdims=True)) / 2
    return np.rint(DIMMED * colour + (1 - DIMMED) * np.array(PAPER, np.float32)).astype(np.uint8)


def heat(values: np.ndarray, *, low: float, high: float) -> np.ndarray:
    """Colours uint8 [...,3] of values [...], dark at `low` and bright at `high`."""
    place = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * (len(HEAT) - 1)
    below = np.minimum(place.astype(int), len(HEAT) - 2)
    share = (place - below)[..., None]
    return np.rint((1 - share) * HEAT[below] + share * HEAT[below + 1]).astype(np.uint8)


@dataclass(frozen=True)
class Palette:
    """Colours of feature vectors: their first three principal components as red, green, blue."""

    mean: np.ndarray  # [E]
    axes: np.ndarray  # [E,3]
    low: np.ndarray  # [3]
    high: np.ndarray  # [3]

    @classmethod
    def of(cls, rows: np.ndarray) -> "Palette":
        """That in which rows [n,E] spread most; its ends are their 2nd and 98th percentiles."""
        rows = rows.astype(np.float64)
        mean = rows.mean(axis=0)
        _, vectors = np.linalg.eigh((rows - mean).T @ (rows - mean))
        axes = vectors[:, :-4:-1]
        axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
        low, high = np.percentile((rows - mean) @ axes, [2, 98], axis=0)
        return cls(mean, axes, low, high)

    def colours(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [...,3] of rows [...,E]."""
        place = ((rows - self.mean) @ self.axes - self.low) / np.maximum(self.high - self.low, 1e-9)
        return np.rint(255 * np.clip(place, 0, 1)).astype(np.uint8)


def token_map(grid: tuple[int, int, int], *, tokens: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Frames uint8 [T,h,w,3] with the colours [n,3] of tokens [n] in their places."""
    cells = np.empty((int(np.prod(grid)), 3), np.uint8)
    cells[:] = MISSING
    cells[tokens] = colours
    return cells.reshape(*grid, 3)


def strip(frames: np.ndarray, *, side: int | None = None) -> np.ndarray:
    """Frames [T,H,W,3] side by side: uint8 [S,...,3], by default of about `FRAME_PIXELS`.

    Small ones are enlarged by a whole factor, so that what is square stays so.
    """
    height, width = frames.shape[1:3]
    side = side or max(FRAME_PIXELS // height, 1) * height
    across = round(width * side / height)
    if side % height == 0 and across % width == 0:
        shown = repeat(frames, "t h w c -> t (h a) (w b) c", a=side // height, b=across // width)
    else:
        images = (Image.fromarray(frame) for frame in frames)
        shown = np.stack(
            [np.asarray(one.resize((across, side), Image.Resampling.BOX)) for one in images]
        )
    row = np.empty((side, len(frames) * (across + GAP) - GAP, 3), np.uint8)
    row[:] = PAPER
    for number, frame in enumerate(shown):
        row[:, number * (across + GAP) : number * (across + GAP) + across] = frame
    return row


def stack(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Strips of one width below each other."""
    gap = np.empty((GAP, rows[0].shape[1], 3), np.uint8)
    gap[:] = PAPER
    parts = [part for row in rows for part in (row, gap)]
    return np.concatenate(parts[:-1])


def png(pixels: np.ndarray) -> bytes:
    """A picture uint8 [H,W,3] as the bytes of a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    return file.getvalue()


def data_uri(pixels: np.ndarray | bytes) -> str:
    """A picture within a page: the bytes of a PNG as they are, pixels as a JPEG."""
    if isinstance(pixels, bytes):
        return f"data:image/png;base64,{base64.b64encode(pixels).decode()}"
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=JPEG_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
