"""RandAugment: timm's pixels, upstream's probabilities, and one draw for all frames of a view."""

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment

from distill import draw
from distill.data import augment
from distill.data.rand_augment import OPERATIONS, draw_operations
from distill.recipe import RandAugment

# timm's names, in the order in which it draws them.
INCREASING = auto_augment.rand_augment_choices("", increasing=True)
REFERENCES = dict(zip(OPERATIONS, INCREASING, strict=True))
MAGNITUDES = (0, 0.3, 2.5, 5, 6.99, 7, 9.3, 10)


def picture(seed: int = 0) -> Image.Image:
    """Smooth, of less than the full range, so that no operation is without effect."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(noise).resize((61, 43), Image.Resampling.BICUBIC)).copy()
    return Image.fromarray((20 + pixels * 0.85).astype(np.uint8))


def test_the_fifteen_operations_are_timms_increasing_ones():
    names = [name.removesuffix("Increasing").removesuffix("Rel") for name in REFERENCES.values()]
    assert names == list(OPERATIONS)
    assert len(OPERATIONS) == 15


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_pixels_are_timms(monkeypatch, name, sign):
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: sign * value)
    image = picture()
    for magnitude in MAGNITUDES:
        if (name, magnitude) == ("Posterize", 10):
            continue  # no bits are left, which Pillow now refuses; see below
        reference = auto_augment.AugmentOp(
            REFERENCES[name],
            prob=1.0,
            magnitude=magnitude,
            hparams={"interpolation": Image.Resampling.BICUBIC},
        )
        found = np.asarray(OPERATIONS[name](image, sign * magnitude / 10))
        np.testing.assert_array_equal(found, np.asarray(reference(image)), err_msg=str(magnitude))
    assert not np.array_equal(np.asarray(OPERATIONS[name](image, sign * 0.7)), np.asarray(image))


def test_posterizing_to_no_bits_is_black():
    assert np.asarray(OPERATIONS["Posterize"](picture(), 1.0)).max() == 0


def test_corners_that_come_from_outside_are_grey():
    moved = np.asarray(OPERATIONS["TranslateX"](picture(), 1.0))
    assert (moved[:, -20:] == 128).all()  # 0.45 of 61 pixels come from beyond the edge


def test_each_operation_comes_as_often_and_takes_place_every_other_time():
    section = RandAugment(magnitude=7, num_ops=4, magnitude_std=0.5)
    drawn = [draw_operations(section, draw.generator("test", i)) for i in range(6000)]
    counts = np.bincount([len(operations) for operations in drawn], minlength=5)
    expected = 6000 * np.array([1, 4, 6, 4, 1]) / 16
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected.max())
    names = [name for operations in drawn for name, _ in operations]
    each = np.array([names.count(name) for name in OPERATIONS])
    assert np.abs(each - len(names) / 15).max() < 5 * np.sqrt(len(names) / 15)
    assert any(len(dict(operations)) < len(operations) for operations in drawn)  # replaced
    levels = np.array([level for operations in drawn for _, level in operations])
    assert abs((levels > 0).mean() - 0.5) < 0.02
    assert abs(np.abs(levels).mean() - 0.7) < 0.002
    assert abs(np.abs(levels).std() - 0.05) < 0.002


def test_magnitudes_are_cut_off_at_both_ends():
    for magnitude, noise in ((10, 3.0), (0, 3.0)):
        section = RandAugment(magnitude=magnitude, num_ops=50, magnitude_std=noise)
        levels = np.abs([level for _, level in draw_operations(section, np.random.default_rng(0))])
        assert levels.max() <= 1
        assert (levels == magnitude / 10).mean() > 0.3
    steady = RandAugment(magnitude=5, num_ops=50, magnitude_std=0)
    assert {abs(level) for _, level in draw_operations(steady, np.random.default_rng(0))} == {0.5}


def test_all_frames_get_the_same_operations_before_the_crop():
    frames = np.stack([np.asarray(picture(seed)) for seed in range(3)])
    operations = [("Rotate", 0.8), ("Color", -0.5), ("Equalize", 1.0)]
    crop = augment.Crop(5, 3, 40, 30, size=28)
    found = augment.apply(frames, crop, flip=True, operations=operations)
    for index, frame in enumerate(frames):
        alone = Image.fromarray(frame)
        for name, level in operations:
            alone = OPERATIONS[name](alone, level)
        cut = alone.crop((5, 3, 45, 33)).resize((28, 28), Image.Resampling.BILINEAR)
        expected = np.asarray(cut)[:, ::-1].transpose(2, 0, 1)
        assert np.array_equal(found[:, index], expected)


def test_draws_are_pinned():
    """A run that goes on with another version of this code must not change its views."""
    rngs = [draw.generator("augment", 3, clip, 1) for clip in range(3)]
    drawn = [draw_operations(RandAugment(), rng) for rng in rngs]
    assert [[(name, round(level, 6)) for name, level in one] for one in drawn] == [
        [],
        [("Color", 0.672427), ("Color", -0.703327), ("Contrast", 0.65476)],
        [("AutoContrast", -0.716939), ("TranslateX", -0.66582)],
    ]
