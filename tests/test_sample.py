"""Which frames make a clip: the published numbers, and none outside the video."""

import numpy as np
import pytest

from distill.data import sample
from distill.data.index import Clip
from distill.errors import InputError
from distill.recipe import DenseSampling, SegmentSampling, SparseSampling

SPARSE, SEGMENT = SparseSampling(), SegmentSampling(kind="segment")
DENSE = DenseSampling(kind="dense", stride_frames=4)


def evaluate(sampling, n, k, clip=0, num_clips=1):
    return sample.eval_indices(sampling, n, k, clip=clip, num_clips=num_clips).tolist()


def draws(sampling, n, k, count=400):
    rng = np.random.default_rng(0)
    return np.stack([sample.train_indices(sampling, n, k, rng) for _ in range(count)])


def test_sparse_evaluation_gives_the_published_frames():
    assert evaluate(SPARSE, 300, 8) == [18, 55, 93, 130, 168, 205, 242, 280]
    assert [evaluate(SPARSE, 300, 8, clip, 4) for clip in range(4)] == [
        [7, 44, 82, 119, 157, 194, 231, 269],
        [14, 51, 89, 126, 164, 201, 238, 276],
        [22, 59, 97, 134, 172, 209, 246, 284],
        [29, 66, 104, 141, 179, 216, 253, 291],
    ]
    for clip in range(4):
        assert evaluate(SPARSE, 4, 8, clip, 4) == [0, 0, 1, 1, 2, 2, 2, 3]


def test_sparse_training_draws_from_segments_that_share_their_ends():
    frames = draws(SPARSE, 300, 8)
    edges = [0, 37, 75, 112, 150, 187, 224, 262, 299]  # round(299 / 8 * i), halves to even
    assert frames.min(axis=0).tolist() == edges[:-1]
    assert frames.max(axis=0).tolist() == edges[1:]


def test_segment_training_draws_from_whole_frames_without_the_one_before():
    frames = draws(SEGMENT, 35, 8)
    assert frames.min(axis=0).tolist() == [0, 4, 8, 12, 16, 20, 24, 28]
    assert frames.max(axis=0).tolist() == [3, 7, 11, 15, 19, 23, 27, 31]


def test_segment_evaluation_is_the_middle_or_shifted_ticks():
    assert evaluate(SEGMENT, 35, 8) == [2, 6, 10, 14, 18, 22, 26, 30]
    assert evaluate(SEGMENT, 35, 8, 0, 2) == [0, 4, 8, 13, 17, 21, 26, 30]
    assert evaluate(SEGMENT, 35, 8, 1, 2) == [2, 6, 10, 15, 19, 24, 28, 32]


def test_segment_clips_are_every_cth_of_the_sorted_frames():
    tick, clips, k = 50 / 8, 3, 8
    together = sorted(int(c * tick / clips + tick * i) for c in range(clips) for i in range(k))
    for clip in range(clips):
        assert evaluate(SEGMENT, 50, k, clip, clips) == together[clip::clips]


def test_short_videos_repeat_frames_in_order():
    assert draws(SEGMENT, 5, 8, count=1).tolist() == [[0, 0, 0, 0, 1, 2, 3, 4]]
    assert evaluate(SEGMENT, 5, 8) == [0, 0, 0, 0, 1, 2, 3, 4]
    assert evaluate(SEGMENT, 4, 8, 1, 2) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert draws(DENSE, 10, 4, count=1).tolist() == [[0, 4, 8, 9]]
    assert evaluate(DENSE, 10, 4) == [0, 4, 8, 9]


def test_dense_training_takes_a_window_that_lies_inside():
    frames = draws(DENSE, 40, 8)
    assert np.array_equal(np.diff(frames), np.full((400, 7), 4))
    assert (frames[:, 0].min(), frames[:, 0].max()) == (0, 7)


def test_dense_evaluation_is_the_centre_or_spread_evenly():
    assert evaluate(DENSE, 150, 16) == list(range(43, 107, 4))  # upstream starts at -21 here
    assert [evaluate(DENSE, 50, 8, clip, 4)[0] for clip in range(4)] == [0, 6, 12, 18]
    assert evaluate(DENSE, 50, 8, 3, 4)[-1] == 46


@pytest.mark.parametrize("sampling", [SPARSE, SEGMENT, DENSE], ids=lambda s: s.kind)
@pytest.mark.parametrize("k", [1, 4, 8, 16])
def test_frames_are_inside_and_in_order_for_any_length(sampling, k):
    rng = np.random.default_rng(0)
    for n in range(1, 80):
        rows = [sample.train_indices(sampling, n, k, rng) for _ in range(5)]
        for num_clips in (1, 2, 3, 5):
            for clip in range(num_clips):
                rows.append(sample.eval_indices(sampling, n, k, clip=clip, num_clips=num_clips))
        for row in rows:
            assert row.shape == (k,)
            assert row.dtype == np.int64
            assert row.min() >= 0 and row.max() < n
            assert np.all(np.diff(row) >= 0)


def clip_of(start, end, total):
    return Clip(id=0, path="", name="", start_seconds=start, end_seconds=end, total_seconds=total)


def test_trimmed_clips_use_their_part_of_the_video():
    assert sample.trim(clip_of(2.0, 4.5, 10.0), 300) == (60, 75)
    assert sample.trim(clip_of(1.99, 2.04, 10.0), 100) == (19, 1)  # int(0.5) frames are one
    assert sample.trim(clip_of(9.99, 12.0, 10.0), 50) == (49, 1)  # past the end
    assert sample.trim(clip_of(8.0, 30.0, 10.0), 100) == (80, 20)


def test_clips_without_all_three_times_are_whole():
    assert sample.trim(clip_of(None, None, None), 300) == (0, 300)
    assert sample.trim(clip_of(2.0, 4.0, None), 300) == (0, 300)


def test_nothing_can_be_drawn_from_no_frames():
    with pytest.raises(InputError, match="the video has no frames"):
        sample.train_indices(SPARSE, 0, 8, np.random.default_rng(0))
    with pytest.raises(ValueError, match="clip 4 is not one of 4"):
        sample.eval_indices(SPARSE, 10, 8, clip=4, num_clips=4)
