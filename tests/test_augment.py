"""Crops and flips: the published choices, evenly drawn, and the same bits in every process."""

import functools
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from distill import draw
from distill.data import augment
from distill.data.augment import Crop
from distill.recipe import Views


def crops(views: Views, width: int, height: int, count: int = 3000) -> list[Crop]:
    rng = np.random.default_rng(0)
    return [augment.draw_crop(views, width=width, height=height, rng=rng) for _ in range(count)]


def ramp(height: int, width: int, frames: int = 2) -> np.ndarray:
    """Frames of which each pixel is told apart from its neighbours."""
    t, y, x = np.mgrid[:frames, :height, :width]
    return np.stack([x * 3 + t, y * 3 + t, x + y + t], axis=-1).astype(np.uint8)


def test_multiscale_crops_have_the_ten_sizes_and_thirteen_places():
    found = crops(Views(), 340, 256)
    sides = [256, 224, 192, 168]  # int(256 * 0.66) is 168
    sizes = {(w, h) for i, w in enumerate(sides) for j, h in enumerate(sides) if abs(i - j) <= 1}
    assert {(crop.width, crop.height) for crop in found} == sizes
    assert len(sizes) == 10
    step_x, step_y = (340 - 192) // 4, (256 - 192) // 4
    places = {(crop.x, crop.y) for crop in found if (crop.width, crop.height) == (192, 192)}
    edges = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0)]
    quarters = [(1, 1), (3, 1), (1, 3), (3, 3)]
    assert places == {(x * step_x, y * step_y) for x, y in edges + quarters}


def test_multiscale_choices_are_uniform():
    found = crops(Views(), 340, 256, count=13_000)
    sizes = [(crop.width, crop.height) for crop in found]
    counts = np.array([sizes.count(size) for size in set(sizes)])
    assert np.abs(counts - 1300).max() < 5 * np.sqrt(1300)
    places = [(crop.x, crop.y) for crop in found if (crop.width, crop.height) == (192, 192)]
    counts = np.array([places.count(place) for place in set(places)])
    assert np.abs(counts - len(places) / 13).max() < 5 * np.sqrt(len(places) / 13)


def test_sizes_near_the_wanted_one_become_it_but_never_leave_the_frame():
    sides = {crop.width for crop in crops(Views(), 400, 258)}
    assert sides == {258, 224, 193, 170}  # int(258 * 0.875) is 225
    sides = {crop.height for crop in crops(Views(), 400, 299)}
    assert sides == {299, 261, 224, 197}  # int(299 * 0.75) is 224
    for crop in crops(Views(), 223, 500, count=500):
        assert crop.x + crop.width <= 223 and crop.y + crop.height <= 500


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (5, 3), (1, 400), (31, 33)])
@pytest.mark.parametrize("kind", ["multiscale", "resized", "center"])
def test_crops_of_tiny_frames_stay_inside(kind, size):
    width, height = size
    for crop in crops(Views(crop=kind, image_size=28), width, height, count=200):
        full_width, full_height = crop.resize or size
        assert crop.width > 0 and crop.height > 0
        assert 0 <= crop.x <= full_width - crop.width
        assert 0 <= crop.y <= full_height - crop.height
    out = augment.apply(ramp(height, width), crop, flip=False)
    assert out.shape == (3, 2, 28, 28)


def test_resized_crops_keep_to_area_and_aspect():
    found = crops(Views(crop="resized", min_area=0.25), 320, 240)
    areas = np.array([crop.width * crop.height for crop in found]) / (320 * 240)
    aspects = np.array([crop.width / crop.height for crop in found])
    assert 0.24 < areas.min() < 0.27 and areas.max() > 0.9
    assert 0.74 < aspects.min() < 0.77 and 1.31 < aspects.max() < 1.35
    assert abs(np.log(aspects[areas < 0.6]).mean()) < 0.02  # log-uniform, so symmetric
    assert {0, 320} <= {crop.x for crop in found} | {crop.x + crop.width for crop in found}


def test_resized_crops_fall_back_to_the_largest_central_one():
    (crop,) = set(crops(Views(crop="resized", min_area=1.0), 400, 100, count=50))
    assert (crop.x, crop.y, crop.width, crop.height) == (133, 0, 133, 100)
    (crop,) = set(crops(Views(crop="resized", min_area=1.0), 100, 400, count=50))
    assert (crop.x, crop.y, crop.width, crop.height) == (0, 133, 100, 133)


def test_evaluation_crops_lie_along_the_longer_side():
    wide = [augment.eval_crop(340, 256, size=224, crop=i, num_crops=3) for i in range(3)]
    assert [(crop.x, crop.y, crop.resize) for crop in wide] == [
        (0, 0, (297, 224)),
        (36, 0, (297, 224)),
        (73, 0, (297, 224)),
    ]
    tall = [augment.eval_crop(100, 201, size=224, crop=i, num_crops=2) for i in range(2)]
    assert [(crop.x, crop.y, crop.resize) for crop in tall] == [
        (0, 0, (224, 450)),
        (0, 226, (224, 450)),
    ]


def test_one_evaluation_crop_is_the_centre_with_halves_to_even():
    centre = augment.eval_crop(340, 256, size=224, crop=0, num_crops=1)
    assert (centre.x, centre.y) == (36, 0)  # 73 / 2
    centre = augment.eval_crop(227, 224, size=224, crop=0, num_crops=1)
    assert (centre.x, centre.y) == (2, 0)  # 3 / 2
    with pytest.raises(ValueError, match="crop 3 is not one of 3"):
        augment.eval_crop(340, 256, size=224, crop=3, num_crops=3)


def test_cutting_without_resizing_copies_pixels():
    frames = ramp(40, 60)
    out = augment.apply(frames, Crop(x=7, y=5, width=28, height=28, size=28), flip=False)
    assert out.dtype == np.uint8 and out.flags["C_CONTIGUOUS"]
    assert np.array_equal(out, frames[:, 5:33, 7:35].transpose(3, 0, 1, 2))
    flipped = augment.apply(frames, Crop(x=7, y=5, width=28, height=28, size=28), flip=True)
    assert np.array_equal(flipped, out[..., ::-1])


def test_resizing_is_pils_and_sees_the_crop_alone():
    frames = ramp(40, 60)
    out = augment.apply(frames, Crop(x=10, y=4, width=30, height=20, size=14), flip=False)
    cut = Image.fromarray(np.ascontiguousarray(frames[1, 4:24, 10:40]))
    expected = np.asarray(cut.resize((14, 14), Image.Resampling.BILINEAR))
    assert np.array_equal(out[:, 1], expected.transpose(2, 0, 1))
    first = augment.apply(
        frames, Crop(x=3, y=0, width=20, height=20, size=20, resize=(30, 20)), flip=False
    )
    whole = np.asarray(Image.fromarray(frames[0]).resize((30, 20), Image.Resampling.BILINEAR))
    assert np.array_equal(first[:, 0], whole[:, 3:23].transpose(2, 0, 1))


@pytest.mark.parametrize(
    "crop",
    [
        Crop(x=7, y=5, width=41, height=30, size=28),
        Crop(x=0, y=0, width=20, height=17, size=42),
        *(Crop(x, 0, 28, 28, 28, resize=(42, 28)) for x in (0, 5, 14)),
        Crop(0, 90, 70, 70, 70, resize=(70, 160)),
    ],
)
def test_plain_resizes_are_torchs_without_antialias(crop):
    """The box's own pixels in training, the whole frame's in evaluation; rounded to uint8."""
    import torch  # not at the top: a process that imports this file does without it

    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    if crop.resize == (70, 160):
        frames = np.ascontiguousarray(frames.transpose(0, 2, 1, 3)[:, :, :26])
    found = augment.apply(frames, crop, flip=False, antialias=False)
    values = torch.from_numpy(frames).permute(0, 3, 1, 2).double()
    box = (slice(crop.y, crop.y + crop.height), slice(crop.x, crop.x + crop.width))
    plain = functools.partial(torch.nn.functional.interpolate, mode="bilinear")
    if crop.resize is None:
        expected = plain(values[(..., *box)], (crop.size, crop.size))
    else:
        expected = plain(values, crop.resize[::-1])[(..., *box)]
    error = found.transpose(1, 0, 2, 3) - expected.numpy()
    assert np.abs(error).max() <= 0.5 + 1e-3
    flipped = augment.apply(frames, crop, flip=True, antialias=False)
    assert np.array_equal(flipped, found[..., ::-1])
    if crop.height > crop.size:
        blurred = augment.apply(frames, crop, flip=False).transpose(1, 0, 2, 3)
        assert np.abs(blurred - expected.numpy()).max() > 5


def choices() -> list[list]:
    """What is drawn for one clip by each kind of crop, and a hash of the pixels."""
    frames, found = ramp(120, 160), []
    for kind in ("multiscale", "resized", "center"):
        rng = draw.generator("augment", 3, 12345, 1)
        views = Views(crop=kind, image_size=56)
        crop = augment.draw_crop(views, width=160, height=120, rng=rng)
        pixels = augment.apply(frames, crop, flip=bool(rng.random() < 0.5))
        box = [crop.x, crop.y, crop.width, crop.height]
        found.append([kind, *box, hashlib.sha256(pixels.tobytes()).hexdigest()[:16]])
    return found


PINNED = [
    ["multiscale", 40, 0, 79, 79, "0305fa9676d50830"],
    ["resized", 31, 0, 111, 119, "ee477574153bdbc2"],
    ["center", 9, 0, 56, 56, "861266a9cc649dd5"],
]


def test_choices_are_pinned():
    """Caches hold what these draws gave: raise the augmentation revision when they change."""
    assert choices() == PINNED


def test_other_processes_make_the_same_bits():
    code = "import json, test_augment; print(json.dumps(test_augment.choices()))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout) == choices()
