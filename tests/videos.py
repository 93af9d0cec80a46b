"""Small odd videos with the frame's number burnt in, so that a test can tell which frame it got."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 10
CELL = 16  # pixels a side; large enough to survive any encoder at the sizes used here


def burn(number: int, *, width: int = 96, height: int = 64) -> np.ndarray:
    """A grey frame uint8 [H,W,3] with `number` as black and white cells in its upper rows.

    The lower right is red and the lower left blue, so that turning and mirroring show.
    """
    frame = np.full((height, width, 3), 128, np.uint8)
    columns = width // CELL
    for bit in range(BITS):
        row, column = divmod(bit, columns)
        value = 235 if number >> bit & 1 else 16
        frame[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = value
    frame[-CELL:, -CELL:] = (200, 30, 30)
    frame[-CELL:, :CELL] = (30, 30, 200)
    return frame


def number_of(frame: np.ndarray) -> int:
    """The number that `burn` put into a decoded frame."""
    columns = frame.shape[1] // CELL
    number = 0
    for bit in range(BITS):
        row, column = divmod(bit, columns)
        cell = frame[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        number |= int(cell[4:-4, 4:-4].mean() > 128) << bit
    return number


def write(
    path: Path,
    *,
    num_frames: int,
    width: int = 96,
    height: int = 64,
    fps: int = 25,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    ticks: list[int] | None = None,
    title: str = "",
    matrix: tuple[float, float, float, float] | None = None,
) -> Path:
    """Encode frames 0..num_frames-1; `ticks` are their pts in 1/1000 s where not evenly spaced.

    `matrix` (a, b, c, d: x' = a x + c y, y' = b x + d y) only says how to show them (mp4).
    """
    with av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=fps, options=options or {})
        stream.metadata["title"] = title
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.thread_count = 1
        time_base = Fraction(1, 1000) if ticks else Fraction(1, fps)
        stream.codec_context.time_base = time_base
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(burn(number, width=width, height=height), "rgb24")
            frame.pts = ticks[number] if ticks else number
            frame.time_base = time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    if matrix:
        _set_matrix(path, matrix)
    return path


def _set_matrix(path: Path, matrix: tuple[float, float, float, float]) -> None:
    a, b, c, d = (round(value * 65536) for value in matrix)  # 16.16 fixed point
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44  # ISO 14496-12, track header box of version 0
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


OPEN_GOP = {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0:b-adapt=0"}
HEVC_OPEN_GOP = {"x265-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3:log-level=none"}
INTRA_REFRESH = {"g": "15", "x264-params": "intra-refresh=1:bframes=0"}
UNEVEN = [40 * i + 13 * (i % 3) + 500 * (i // 20) for i in range(60)]
SHIFTED = [2500 + 40 * i for i in range(60)]
