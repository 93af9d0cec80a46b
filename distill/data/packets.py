"""What a container's packets tell before anything is decoded: where decoding can begin.

Containers mark as key frames also pictures that are no clean start: after them a decoder needs
several frames until the picture is whole (periodic intra refresh). For H.264 the NAL units say
which they are (ITU-T H.264, 7.3 and D.1).
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Literal

import numpy as np

_SLICE_IDR, _SEI, _RECOVERY_POINT = 5, 6, 6
_LAST_TYPE = 23  # of a unit in a file; above are those of network packets
_ZEROS = b"\0\0\0"
_START_CODE = re.compile(rb"\x00\x00\x01")


@dataclasses.dataclass(frozen=True)
class Packet:
    """One packet of a video stream, its times in ticks of the stream's time base.

    `is_start`: decoding may begin here. `is_closed`: and nothing later needs what came before.
    `is_hidden`: an edit list keeps its frame from being shown. `is_whole`: no damage shows.
    """

    pts: int | None
    dts: int | None
    is_key: bool
    is_start: bool
    is_closed: bool
    is_hidden: bool
    is_whole: bool


def starts(packets: list[Packet]) -> tuple[np.ndarray, np.ndarray]:
    """Times of the shown frames in order, and for each the packet at which to begin decoding.

    That is the last clean start that is stored before it and shown no later than it: behind the
    start of an open GOP lie frames that are shown before it and need the GOP before.
    """
    keys: list[int] = []
    frames = []
    for position, packet in enumerate(packets):
        if packet.is_start:
            keys.append(position)
        if not packet.is_hidden:
            key = next((key for key in reversed(keys) if packets[key].pts <= packet.pts), 0)
            frames.append((packet.pts, key))
    frames.sort()
    pts_ticks, first = np.array(frames, np.int64).T
    return pts_ticks, first


def has_only_closed_gops(packets: list[Packet]) -> bool:
    """Whether each key frame is a clean start and nothing behind it is shown before it."""
    key_pts = None
    for packet in packets:
        if packet.is_key:
            if not packet.is_closed:
                return False
            key_pts = packet.pts
        elif key_pts is None or packet.pts < key_pts:
            return False
    return True


def h264_is_whole(packet: bytes, extradata: bytes | None) -> bool:
    """Whether a packet can be what an encoder wrote, as far as that shows without decoding.

    Its units fill it, have a known type, and hold no three zeros in a row, which H.264 forbids:
    that is what a hole in a file is made of.
    """
    units = list(_units(packet, extradata))
    if _prefix_bytes(extradata) is not None:
        size_bytes = sum(len(unit) + _prefix_bytes(extradata) for unit in units)
        if size_bytes != len(packet):
            return False
    return bool(units) and all(
        0 < unit[0] & 31 <= _LAST_TYPE and unit[0] < 128 and _ZEROS not in unit for unit in units
    )


def h264_entry(packet: bytes, extradata: bytes | None) -> Literal["idr", "recovery"] | None:
    """How decoding may begin at this packet.

    "idr": nothing before it is referred to. "recovery": it is whole itself, but frames that are
    shown before it may need what came earlier (open GOP). None: no clean start. `extradata` is
    the codec's, and says whether units are preceded by their length or by start codes.
    """
    found = None
    for unit in _units(packet, extradata):
        kind = unit[0] & 31
        if kind == _SLICE_IDR:
            return "idr"
        if kind == _SEI and _recovers_at_once(unit[1:]):
            found = "recovery"
    return found


def _units(packet: bytes, extradata: bytes | None) -> Iterator[bytes]:
    prefix_bytes = _prefix_bytes(extradata)
    if prefix_bytes is None:
        starts = [match.end() for match in _START_CODE.finditer(packet)]
        for start, end in zip(starts, [*starts[1:], len(packet) + 3], strict=True):
            if start < end - 3:
                yield packet[start : end - 3]
        return
    start = 0
    while start + prefix_bytes < len(packet):
        size_bytes = int.from_bytes(packet[start : start + prefix_bytes], "big")
        start += prefix_bytes
        if 0 < size_bytes <= len(packet) - start:
            yield packet[start : start + size_bytes]
        start += size_bytes


def _prefix_bytes(extradata: bytes | None) -> int | None:
    """Bytes of the length before each unit, or None where start codes separate them."""
    is_record = extradata and len(extradata) > 4 and extradata[0] == 1
    return (extradata[4] & 3) + 1 if is_record else None  # AVCDecoderConfigurationRecord


def _recovers_at_once(payloads: bytes) -> bool:
    """Whether SEI messages hold a recovery point with recovery_frame_cnt 0."""
    start = 0
    while start + 2 < len(payloads):
        kind, start = _sum_bytes(payloads, start)
        size_bytes, start = _sum_bytes(payloads, start)
        if kind == _RECOVERY_POINT:  # recovery_frame_cnt is Exp-Golomb: a leading 1 is zero
            return start < len(payloads) and bool(payloads[start] & 0x80)
        start += size_bytes
    return False


def _sum_bytes(payloads: bytes, start: int) -> tuple[int, int]:
    total = 0
    while start < len(payloads):
        total += payloads[start]
        start += 1
        if payloads[start - 1] != 255:
            break
    return total, start
