"""Video decoding behind one small interface: frames by their number, with their times.

The container is first read packet by packet with PyAV, without decoding: that tells how many
frames there are, when each is shown, and from where each can be decoded. decord then decodes
where it is known to return the right frames, PyAV everywhere else. Measured against burnt-in
frame numbers, decord 0.6 is wrong for open GOPs, key frames that are no clean start (periodic
intra refresh), edit lists that hide frames, mirrored display matrices, AVI and MPEG-TS. Where
both are right their pixels are equal bit for bit (tests/test_decode.py).
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Literal

import av
import numpy as np
from PIL import Image

from distill.data import packets
from distill.errors import InputError

Decoder = Literal["auto", "decord", "pyav"]

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# FFmpeg's names. Elsewhere packets and frames need not correspond, or carry no usable times, and
# frames are counted by decoding them all.
_INDEXED_FORMATS = {"mov", "mp4", "matroska", "webm", "mpegts"}
_INDEXED_CODECS = {"h264", "hevc", "vp9", "av1", "mpeg4", "mpeg2video"}
_DECORD_FORMATS = _INDEXED_FORMATS - {"mpegts"}
_DECORD_CODECS = {"h264", "vp9"}
# Tags need not be UTF-8; PyAV 19 sees to that itself.
_OPEN = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
_DECORD_TOLERANCE_SECONDS = 2e-3  # decord keeps times in float32

_Matrix = tuple[int, int, int, int]
_UPRIGHT: _Matrix = (1, 0, 0, 1)


@dataclasses.dataclass(frozen=True)
class Frames:
    """Decoded frames: RGB uint8 [T,H,W,3], upright, and the time each is shown at [T]."""

    pixels: np.ndarray
    pts_seconds: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Index:
    """What a file holds. Frames count in the order they are shown, packets as they are stored.

    `starts` is the packet at which decoding must begin for each frame, or None where frames are
    found by decoding everything; `seek_ticks` has the time of each packet.
    """

    pts_ticks: np.ndarray  # [num_frames]
    time_base: Fraction
    fps: float
    width: int
    height: int
    matrix: _Matrix
    decord_doubt: str | None
    starts: np.ndarray | None = None  # [num_frames]
    packet_of: dict[int, int] = dataclasses.field(default_factory=dict)
    seek_ticks: list[int] = dataclasses.field(default_factory=list)

    @property
    def num_frames(self) -> int:
        return len(self.pts_ticks)

    def pts_seconds(self, frames: list[int]) -> np.ndarray:
        return self.pts_ticks[frames] * float(self.time_base)


@dataclasses.dataclass
class Video:
    """An opened video. `backend` names the decoder and its version, and is settled by `read`."""

    path: str
    num_frames: int
    fps: float
    backend: str
    _read: Callable[["Video", list[int]], Frames]

    def read(self, indices: np.ndarray | list[int]) -> Frames:
        """Decode frames by number, in any order, with repetitions.

        Raises `IndexError` for a number outside [0, num_frames) and `InputError` for frames that
        cannot be decoded.
        """
        wanted = [int(index) for index in indices]
        outside = [index for index in wanted if not 0 <= index < self.num_frames]
        if outside:
            raise IndexError(f"{self.path}: frame {outside[0]} of {self.num_frames}")
        unique = sorted(set(wanted))
        frames = self._read(self, unique)
        rows = np.searchsorted(unique, wanted)
        return Frames(frames.pixels[rows], frames.pts_seconds[rows])


@contextlib.contextmanager
def open_video(path: str | Path, *, decoder: Decoder = "auto") -> Iterator[Video]:
    """Open a video file or a folder of numbered images (which has no clock: times are NaN).

    "auto" decodes with decord where it is installed, succeeds and is known to be right, and with
    PyAV elsewhere; "decord" refuses the files it is known to get wrong. Frames are turned upright
    by the container's display matrix.

    Raises `InputError` with the path for anything that cannot be decoded.
    """
    path = os.path.abspath(os.path.expanduser(path))
    if os.path.isdir(path):
        yield _open_folder(path)
        return
    _check_file(path)
    index = _scan(path)
    doubt = index.decord_doubt or (None if _decord() else "decord is not installed")
    if decoder == "decord" and doubt:
        raise InputError(f"{path}: not for decord: {doubt}; set data.views.decoder to auto or pyav")

    def read(video: Video, wanted: list[int]) -> Frames:
        if doubt is None and decoder != "pyav":
            try:
                return _read_decord(path, index, wanted)
            except _DecordError as error:
                if decoder == "decord":
                    raise InputError(f"{path}: decord cannot read it: {error}") from None
        video.backend = pyav
        return _read_pyav(path, index, wanted)

    pyav = f"pyav {av.__version__}"
    uses_decord = doubt is None and decoder != "pyav"
    backend = f"decord {_version('decord')}" if uses_decord else pyav
    yield Video(path, index.num_frames, index.fps, backend, read)


def _check_file(path: str) -> None:
    try:
        size_bytes = os.stat(path).st_size
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        raise InputError(f"{path}: no such video") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if size_bytes == 0:
        raise InputError(f"{path}: the file is empty")


def _open_folder(path: str) -> Video:
    files = sorted(
        (name for name in os.listdir(path) if name.lower().endswith(_IMAGES)), key=_image_number
    )
    if not files:
        raise InputError(f"{path}: the folder holds no images ({' '.join(_IMAGES)})")

    def read(video: Video, wanted: list[int]) -> Frames:
        frames = [_read_image(os.path.join(path, files[index])) for index in wanted]
        for index, frame in zip(wanted, frames, strict=True):
            if frame.shape != frames[0].shape:
                raise InputError(
                    f"{os.path.join(path, files[index])}: {frame.shape[1]}x{frame.shape[0]} where "
                    f"frame {wanted[0]} is {frames[0].shape[1]}x{frames[0].shape[0]}"
                )
        return Frames(np.stack(frames), np.full(len(wanted), np.nan))

    return Video(path, len(files), float("nan"), f"pillow {_version('pillow')}", read)


def _image_number(name: str) -> tuple[int, str]:
    numbers = re.findall(r"\d+", name)
    return (int(numbers[-1]) if numbers else -1), name


def _read_image(path: str) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot read the frame: {error}") from None


@contextlib.contextmanager
def _open_stream(path: str):
    """The container and its video stream. FFmpeg's errors inside become `InputError`."""
    try:
        with av.open(path, **_OPEN) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise InputError(f"{path}: there is no video in it: only sound, or it is cut off")
            if stream.codec_context is None:
                raise InputError(f"{path}: no decoder for its video codec")
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.FFmpegError as error:
        raise InputError(f"{path}: not a video, or a damaged one: {error.strerror}") from None


def _scan(path: str) -> _Index:
    with _open_stream(path) as (container, stream):
        formats = set(container.format.name.split(","))
        codec = stream.codec_context.codec.canonical_name
        extradata = stream.codec_context.extradata
        found, first = [], None
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            if packet.is_corrupt:
                raise InputError(f"{path}: damaged or cut off at packet {len(found)}")
            found.append(_describe(packet, codec, extradata))
            if first is None:
                first = next(iter(packet.decode()), None)
        if first is None:
            first = next(iter(stream.codec_context.decode(None)), None)
        if first is None:
            raise InputError(f"{path}: no frame can be decoded")
        expected = len(stream.index_entries) if formats & {"mov", "mp4", "avi"} else 0
        if len(found) < expected:
            raise InputError(f"{path}: cut off: {len(found)} of {expected} frames are there")
        matrix = _display_matrix(first, path)
        size = first.width, first.height
        width, height = size if matrix[0] else size[::-1]
        time_base, rate = stream.time_base, float(stream.average_rate or 0)
    ticks = [packet.pts for packet in found if not packet.is_hidden]
    is_indexed = (
        formats & _INDEXED_FORMATS
        and codec in _INDEXED_CODECS
        and None not in [packet.pts for packet in found]
        and len(set(ticks)) == len(ticks) > 0
    )
    if is_indexed:
        pts_ticks, starts = packets.starts(found)
        doubt = _doubt_decord(formats, codec, found, matrix)
    else:
        pts_ticks, starts = _count_frames(path, time_base, rate), None
        doubt = f"it misplaces frames in {container.format.name} with {codec}"
    span_seconds = float((pts_ticks[-1] - pts_ticks[0]) * time_base)
    return _Index(
        pts_ticks=pts_ticks,
        time_base=time_base,
        fps=(len(pts_ticks) - 1) / span_seconds if span_seconds > 0 else rate,
        width=width,
        height=height,
        matrix=matrix,
        decord_doubt=doubt,
        starts=starts,
        packet_of={packet.pts: position for position, packet in enumerate(found)},
        seek_ticks=[packet.pts if packet.dts is None else packet.dts for packet in found],
    )


def _doubt_decord(
    formats: set[str], codec: str, found: list[packets.Packet], matrix: _Matrix
) -> str | None:
    """Why decord is not trusted with a file, or None."""
    if codec not in _DECORD_CODECS or not formats & _DECORD_FORMATS:
        return f"it misplaces frames in {'/'.join(sorted(formats))} with {codec}"
    if any(packet.is_hidden for packet in found):
        return "it counts frames that the edit list hides"
    if matrix != _UPRIGHT:
        return "the video is turned by its display matrix"
    if not all(packet.is_whole for packet in found):
        return "the file is damaged, which it does not notice"
    if not packets.has_only_closed_gops(found):
        return "it misplaces frames where a GOP is open or starts without a whole picture"
    return None


def _count_frames(path: str, time_base: Fraction, rate: float) -> np.ndarray:
    """Times of all frames by decoding them, made up from the frame rate where there are none."""
    with _open_stream(path) as (container, stream):
        ticks = [frame.pts for frame in container.decode(stream)]
    if None in ticks or any(later <= earlier for earlier, later in itertools.pairwise(ticks)):
        ticks = [round(i / (rate or 1) / time_base) for i in range(len(ticks))]
    return np.array(ticks, np.int64)


def _read_pyav(path: str, index: _Index, wanted: list[int]) -> Frames:
    found: dict[int, np.ndarray] = {}
    with _open_stream(path) as (container, stream):
        if index.starts is None:
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    found[number] = _pixels(frame, index, f"{path}: frame {number}")
                if number >= wanted[-1]:
                    break
        else:
            for start, group in itertools.groupby(wanted, key=lambda i: index.starts[i]):
                _decode_from(container, stream, index, int(start), list(group), found, path)
    missing = [number for number in wanted if number not in found]
    if missing and index.starts is not None:  # a seek went too far: go through the whole file
        with _open_stream(path) as (container, stream):
            _decode_from(container, stream, index, 0, missing, found, path)
    missing = [number for number in wanted if number not in found]
    if missing:
        raise InputError(f"{path}: frame {missing[0]} of {index.num_frames} cannot be decoded")
    return Frames(np.stack([found[number] for number in wanted]), index.pts_seconds(wanted))


def _decode_from(container, stream, index: _Index, start: int, wanted, found, path: str) -> None:
    """Decode from packet `start` on until all wanted frames are found or the file ends."""
    number_of = {int(index.pts_ticks[number]): number for number in wanted}
    position = 0
    if start > 0:
        container.seek(index.seek_ticks[start], stream=stream)
        position = None
    for packet in container.demux(stream):
        if packet.size:
            if position is None:
                position = index.packet_of.get(packet.pts, len(index.seek_ticks))
                if position > start:
                    return
            position += 1
            if position <= start:
                continue
        for frame in packet.decode():
            number = number_of.pop(frame.pts, None)
            if number is not None:
                found[number] = _pixels(frame, index, f"{path}: frame {number}")
        if not number_of:
            return


def _pixels(frame: av.VideoFrame, index: _Index, where: str) -> np.ndarray:
    if frame.is_corrupt:
        raise InputError(f"{where} is damaged")
    # one thread: a pool of converters started for each frame costs more than it converts
    pixels = frame.to_ndarray(format="rgb24", threads=1)
    a, b, c, d = index.matrix
    if a == 0:
        pixels = pixels.transpose(1, 0, 2)  # x' = c y, y' = b x
    across, down = (a, d) if a else (c, b)
    pixels = pixels[::down, ::across]
    if pixels.shape != (index.height, index.width, 3):
        size = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise InputError(f"{where} is {size}, the first one {index.width}x{index.height}")
    return pixels


def _describe(packet: av.Packet, codec: str, extradata: bytes | None) -> packets.Packet:
    is_start = is_closed = packet.is_keyframe
    is_whole = True
    if codec == "h264":
        data = bytes(packet)
        is_whole = packets.h264_is_whole(data, extradata)
        entry = packets.h264_entry(data, extradata) if is_start else None
        is_start, is_closed = entry is not None, entry == "idr"
    return packets.Packet(
        pts=packet.pts,
        dts=packet.dts,
        is_key=packet.is_keyframe,
        is_start=is_start,
        is_closed=is_closed,
        is_hidden=packet.is_discard,
        is_whole=is_whole,
    )


def _display_matrix(frame: av.VideoFrame, path: str) -> _Matrix:
    """How frames are turned before they are shown: x' = a x + c y, y' = b x + d y."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return _UPRIGHT
    a, b, _, c, d = struct.unpack("=9i", bytes(data))[:5]
    matrix = tuple(round(value / 65536) for value in (a, b, c, d))  # 16.16 fixed point
    is_quarter_turn = {abs(matrix[0]), abs(matrix[1])} == {0, 1} and (
        abs(matrix[0]) == abs(matrix[3]) and abs(matrix[1]) == abs(matrix[2])
    )
    if not is_quarter_turn or any(value % 65536 for value in (a, b, c, d)):
        raise InputError(f"{path}: turned by other than quarter turns; encode it anew, upright")
    return matrix


@functools.cache
def _version(package: str) -> str:
    return metadata.version(package)


class _DecordError(Exception):
    """decord failed, or did not see what the container holds."""


def _decord():
    """The decord module, or None where it is missing or its library does not load."""
    try:
        import decord
    except (ImportError, OSError, RuntimeError):
        return None
    return decord


def _read_decord(path: str, index: _Index, wanted: list[int]) -> Frames:
    decord = _decord()
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        if len(reader) != index.num_frames:
            raise _DecordError(f"it finds {len(reader)} frames, the file has {index.num_frames}")
        times = reader.get_frame_timestamp([0, *wanted])[:, 0].astype(np.float64)
        pixels = reader.get_batch(wanted).asnumpy()
    except (decord.DECORDError, IndexError, RuntimeError) as error:
        raise _DecordError(str(error).splitlines()[0]) from error
    pts_seconds = index.pts_seconds(wanted)
    expected = pts_seconds - index.pts_seconds([0])
    if np.abs(times[1:] - times[0] - expected).max() > _DECORD_TOLERANCE_SECONDS:
        raise _DecordError("its frame times differ from the container's")
    if pixels.shape != (len(wanted), index.height, index.width, 3):
        raise _DecordError(f"its frames are {pixels.shape[2]}x{pixels.shape[1]}")
    return Frames(pixels, pts_seconds)
