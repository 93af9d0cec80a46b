"""Which frames make a clip: pure integer functions of the number of frames.

n frames in the video, k wanted; positions count from 0 and are always inside [0, n).
Sources: InternVideo2 single_modality `datasets/{kinetics_sparse,ssv2,kinetics,mae_multi}.py`,
without their off-by-ones.
"""

import numpy as np

from distill.data.index import Clip
from distill.errors import InputError
from distill.recipe import DenseSampling, Sampling, SegmentSampling, SparseSampling


def train_indices(
    sampling: Sampling, num_frames: int, k: int, rng: np.random.Generator
) -> np.ndarray:
    """Random frames int64 [k], in ascending order, as the training readers draw them."""
    _check(num_frames, k)
    match sampling:
        case SparseSampling():
            return sparse_train(num_frames, k, rng)
        case SegmentSampling():
            return segment_train(num_frames, k, rng)
        case DenseSampling():
            return dense_train(num_frames, k, rng, stride_frames=sampling.stride_frames)


def eval_indices(
    sampling: Sampling, num_frames: int, k: int, *, clip: int, num_clips: int
) -> np.ndarray:
    """Frames int64 [k] of evaluation clip `clip` of `num_clips`; one clip is the centre one."""
    _check(num_frames, k)
    if not 0 <= clip < num_clips:
        raise ValueError(f"clip {clip} is not one of {num_clips}")
    match sampling:
        case SparseSampling():
            return sparse_eval(num_frames, k, clip=clip, num_clips=num_clips)
        case SegmentSampling():
            return segment_eval(num_frames, k, clip=clip, num_clips=num_clips)
        case DenseSampling():
            stride = sampling.stride_frames
            return dense_eval(num_frames, k, stride_frames=stride, clip=clip, num_clips=num_clips)


def trim(clip: Clip, num_frames: int) -> tuple[int, int]:
    """First frame and number of frames of a clip in its video; all of it unless fully timed."""
    times = (clip.start_seconds, clip.end_seconds, clip.total_seconds)
    if None in times:
        return 0, num_frames
    start_seconds, end_seconds, total_seconds = times
    fps = num_frames / total_seconds
    first = min(int(fps * start_seconds), num_frames - 1)
    length = int(fps * (end_seconds - start_seconds))
    return first, min(max(length, 1), num_frames - first)


def sparse_train(n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """One frame of each of k segments that share their end points."""
    edges = _segment_edges(n, k)
    return np.minimum(rng.integers(edges[:-1], edges[1:], endpoint=True), n - 1)


def sparse_eval(n: int, k: int, *, clip: int, num_clips: int) -> np.ndarray:
    """The same place in each segment; one clip gives the middle of each."""
    segment = (n - 1) / k
    offset = int(segment / (num_clips + 1) * (clip + 1))
    return np.minimum(_segment_edges(n, k)[:-1] + offset, n - 1)


def segment_train(n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """One frame of each of k segments of n // k whole frames; short videos repeat frame 0."""
    length = n // k
    if length == 0:
        return _repeat_first(n, k)
    return np.arange(k) * length + rng.integers(0, length, size=k)


def segment_eval(n: int, k: int, *, clip: int, num_clips: int) -> np.ndarray:
    """The middle frame of each segment, or for several clips evenly shifted ticks of n / k."""
    if num_clips == 1:
        length = n // k
        return _repeat_first(n, k) if length == 0 else np.arange(k) * length + length // 2
    tick = n / k
    return (clip * tick / num_clips + tick * np.arange(k)).astype(np.int64)


def dense_train(n: int, k: int, rng: np.random.Generator, *, stride_frames: int) -> np.ndarray:
    """k frames `stride_frames` apart from a random start; short videos repeat the last frame."""
    start = rng.integers(0, max(n - k * stride_frames, 1))
    return np.minimum(start + np.arange(k) * stride_frames, n - 1)


def dense_eval(n: int, k: int, *, stride_frames: int, clip: int, num_clips: int) -> np.ndarray:
    """As `dense_train` from starts spread evenly over the video; one clip is its centre."""
    last_start = max(n - k * stride_frames, 0)
    start = last_start // 2 if num_clips == 1 else last_start * clip // (num_clips - 1)
    return np.minimum(start + np.arange(k) * stride_frames, n - 1)


def _segment_edges(n: int, k: int) -> np.ndarray:
    return np.round((n - 1) / k * np.arange(k + 1)).astype(np.int64)  # halves to even


def _repeat_first(n: int, k: int) -> np.ndarray:
    return np.concatenate([np.zeros(k - n, np.int64), np.arange(n)])


def _check(num_frames: int, k: int) -> None:
    if k < 1:
        raise ValueError(f"{k} frames wanted, expected at least one")
    if num_frames < 1:
        raise InputError("the video has no frames")
