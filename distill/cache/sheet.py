"""A contact sheet of a cache: some of its clips as the student gets to see them."""

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from distill.cache.inspect import OpenedCache, open_any, sample_rows, visible_tokens
from distill.errors import InputError
from distill.run.pictures import PAPER, draw_patches
from distill.students.vit import PATCH

SHEET_RECORDS = 6
FRAME_PIXELS = 168  # at least, on the sheet; small frames are enlarged by whole factors
MARGIN, GAP, TITLE = 16, 4, 26
INK, FAINT = (35, 35, 38), (120, 120, 126)
LEGEND = "colour: seen;  pale: kept, but not seen;  grey: not kept"


def contact_sheet(opened: OpenedCache, *, count: int = SHEET_RECORDS, seed: int = 0) -> Image.Image:
    """A row of frames for each of `count` records, drawn by `seed`, with their masks.

    What the student sees is in full colour. Patches that are kept and masked (of a superset, of
    all tokens, of full frames) are pale; those of which the record has no pixels are grey.
    """
    cache = opened.cache
    frames, height, _ = opened.grid  # views are square
    side = height * PATCH
    zoom = max(1, -(-FRAME_PIXELS // side))
    rows = sample_rows(len(cache.index), count, seed=seed)
    width = 2 * MARGIN + frames * (side * zoom + GAP) - GAP
    row_height = TITLE + side * zoom + MARGIN
    sheet = Image.new("RGB", (width, MARGIN + TITLE + len(rows) * row_height), PAPER)
    pen = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    _write_line(pen, MARGIN - 4, _heading(opened), LEGEND, fonts=(font, small), width=width)
    for number, row in enumerate(rows):
        arrays, info = cache.read(int(row))
        seen = visible_tokens(opened, arrays, row=int(row))
        top = MARGIN + TITLE + number * row_height
        name = f"{info['name']}  view {info['view']}"
        text = _describe(info, seen)
        _write_line(pen, top + 6, name, text, fonts=(small, small), width=width)
        for frame, pixels in enumerate(draw_frames(opened, arrays, seen)):
            image = Image.fromarray(pixels).resize((side * zoom,) * 2, Image.Resampling.NEAREST)
            sheet.paste(image, (MARGIN + frame * (side * zoom + GAP), top + TITLE))
    return sheet


def write_sheet(folder: str, path: str) -> None:
    """Write the contact sheet of a cache as a PNG; raises InputError where that cannot be."""
    if not path.lower().endswith(".png"):
        raise InputError(f"{path}: a contact sheet is a PNG; give it a name that ends in .png")
    image = contact_sheet(open_any(folder))
    try:
        image.save(path, format="PNG")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def draw_frames(opened: OpenedCache, arrays: dict[str, np.ndarray], seen: np.ndarray) -> np.ndarray:
    """Frames uint8 [T,S,S,3] of a record with its mask, `seen` being the visible patches."""
    grid = opened.grid
    if "pixels" in arrays:
        kept = np.arange(np.prod(grid))
        patches = rearrange(arrays["pixels"], "c t (h p) (w q) -> (t h w) p q c", p=PATCH, q=PATCH)
    else:
        kept = arrays["tokens"].astype(np.int64)
        patches = rearrange(arrays["patches"], "n (c p q) -> n p q c", p=PATCH, q=PATCH)
    return draw_patches(grid, kept=kept, patches=patches, seen=seen)


def _heading(opened: OpenedCache) -> str:
    identity, mask = opened.identity, opened.mask
    kept, pixels = (identity[f"objective.cache.{name}"] for name in ("tokens", "pixels"))
    parts = [f"{mask.kind} mask, ratio {mask.ratio:g}", f"tokens {kept}", f"pixels {pixels}"]
    return f"{opened.cache.folder}:  {',  '.join(parts)}"


def _describe(info: dict, seen: np.ndarray) -> str:
    frames = " ".join(str(frame) for frame in info["frames"])
    return f"frames {frames}{', flipped' if info['flip'] else ''}, {len(seen)} patches seen"


def _write_line(
    pen: ImageDraw.ImageDraw, top: int, left: str, right: str, *, fonts: tuple, width: int
) -> None:
    """Text on the left and, where there is room for it, more on the right."""
    pen.text((MARGIN, top), left, fill=INK, font=fonts[0])
    start = width - MARGIN - pen.textlength(right, font=fonts[1])
    if start > 2 * MARGIN + pen.textlength(left, font=fonts[0]):
        pen.text((start, top), right, fill=FAINT, font=fonts[1])
