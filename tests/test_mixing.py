"""Erased boxes, mixup and CutMix: timm's on images, one box for all frames, and the formulas."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch
from timm.data import mixup as timm_mixup
from torch.testing import assert_close

from distill import draw
from distill.data import augment
from distill.mixing import augmented_inputs, in_boxes, mix, normalise
from distill.recipe import Mixing

SIZE = 28
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def clips(count: int, frames: int = 2) -> torch.Tensor:
    stream = torch.Generator().manual_seed(count)
    shape = (count, 3, frames, SIZE, SIZE)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=stream)


def draws(section: Mixing, count: int = 4000, size: int = SIZE) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([augment.draw_mixing(section, size, rng=rng) for _ in range(count)])


@pytest.mark.parametrize("count", [4, 6])
@pytest.mark.parametrize("draw_", [(0.3, 0, 0, 0, 0), (1 - 60 / 784, 3, 5, 6, 10)])
def test_mixing_is_timms_on_images(monkeypatch, count, draw_):
    """With label smoothing, which we leave to the loss, so that it comes before the mixing."""
    share, x, y, width, height = draw_
    theirs = timm_mixup.Mixup(label_smoothing=0.1, num_classes=7)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (share, width > 0))
    box = (y, y + height, x, x + width)
    monkeypatch.setattr(timm_mixup, "rand_bbox", lambda *_, **__: box)
    pixels, label = normalise(clips(count, frames=1)), torch.arange(count) % 3
    expected, target = theirs(pixels[:, :, 0].clone(), label)

    one_hot = torch.nn.functional.one_hot(label, 7).float()
    found, aims = mix(pixels, one_hot, draws=torch.tensor(draw_))
    assert_close(found[:, :, 0], expected)
    assert_close(0.9 * aims + 0.1 / 7, target)


def test_cutmix_boxes_are_timms(monkeypatch):
    for lam, x, y in [(0.31, 0, 27), (0.5, 13, 2), (0.02, 9, 20), (0.9999, 5, 5), (0.0, 14, 14)]:
        scripted = Mock()
        scripted.random.return_value, scripted.beta.return_value = 0.2, lam
        scripted.integers.return_value = np.array([x, y])
        monkeypatch.setattr(np.random, "randint", Mock(side_effect=[y, x]))  # the row first
        expected, share = timm_mixup.cutmix_bbox_and_lam((4, 3, SIZE, SIZE), lam)
        found = augment.draw_mixing(Mixing(), SIZE, rng=scripted)
        top, bottom, left, right = (int(value) for value in expected)
        assert found[1:] == (left, top, right - left, bottom - top)
        assert found[0] == pytest.approx(float(share))


def test_shares_follow_their_beta_distributions():
    both = draws(Mixing(mixup_alpha=0.8, cutmix_alpha=1.0, cutmix_share=0.5))
    is_cutmix = both[:, 3] > 0
    assert abs(is_cutmix.mean() - 0.5) < 0.03
    mixup = both[~is_cutmix, 0]
    assert abs(mixup.mean() - 0.5) < 0.03
    assert abs(mixup.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.01  # of Beta(a, a)
    full = draws(Mixing(cutmix_alpha=1.0, cutmix_share=1.0), size=224)
    sides = full[:, 3] * full[:, 4] / 224**2
    assert_close(full[:, 0], 1 - sides)  # corrected for what the edges cut off
    whole = (full[:, 1] > 0) & (full[:, 2] > 0) & (full[:, 1:3] + full[:, 3:] < 224).all(axis=1)
    assert whole.any() and not whole.all()
    assert np.abs(full[whole, 3] - full[whole, 4]).max() == 0  # squares but for the edges


def test_either_kind_alone():
    assert not draws(Mixing(cutmix_share=0), 200)[:, 1:].any()
    assert (draws(Mixing(cutmix_share=1), 200)[:, 3] > 0).mean() > 0.95


def test_one_box_for_all_frames_and_the_middle_of_an_odd_batch_stays():
    pixels, target = clips(3).float(), torch.eye(3)
    found, aims = mix(pixels, target, draws=torch.tensor([0.9, 4, 6, 8, 5]))
    box = (slice(None), slice(None), slice(6, 11), slice(4, 12))
    assert torch.equal(found[0][box], pixels[2][box])
    outside = in_boxes(torch.tensor([[4, 6, 8, 5]]), size=SIZE)[0].logical_not()
    assert torch.equal(found[0][..., outside], pixels[0][..., outside])
    assert torch.equal(found[1], pixels[1])
    assert_close(aims, torch.tensor([[0.9, 0, 0.1], [0, 1.0, 0], [0.1, 0, 0.9]]))


def test_erased_boxes_hold_noise_of_unit_variance_and_the_rest_is_normalised():
    pixels = clips(2, frames=8)
    before = pixels.clone()
    box = (3, 7, 20, 18)
    augment.erase(pixels[1].numpy(), box, rng=np.random.default_rng(0))
    found = normalise(pixels, erased=torch.tensor([(0, 0, 0, 0), box])).numpy()
    expected = (before.numpy() / 255 - MEAN[:, None, None, None]) / STD[:, None, None, None]
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    noise = found[1][:, :, 7:25, 3:23]
    inside = np.zeros((SIZE, SIZE), bool)
    inside[7:25, 3:23] = True
    np.testing.assert_allclose(found[1][..., ~inside], expected[1][..., ~inside], atol=1e-5)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.02
    assert np.abs(np.corrcoef(noise.reshape(24, -1)) - np.eye(24)).max() < 0.25  # each frame's own
    assert np.abs(noise).max() > 3


def test_a_uint8_batch_without_either_stays_for_the_model_to_normalise():
    batch = {"pixels": clips(2), "label": torch.tensor([0, 1])}
    assert augmented_inputs(batch, num_classes=3) is batch
    normal = augmented_inputs({**batch, "erased": torch.zeros(2, 4)}, num_classes=3)
    assert normal["pixels"].dtype == torch.float32 and "target" not in normal


def test_a_micro_batch_is_mixed_as_its_first_view_says():
    batch = {
        "pixels": clips(4),
        "label": torch.tensor([0, 1, 2, 0]),
        "mix": torch.tensor([[0.25, 0, 0, 0, 0], *[[0.75, 0, 0, 0, 0]] * 3]),
    }
    found = augmented_inputs(batch, num_classes=3)
    normal = normalise(batch["pixels"])
    assert_close(found["pixels"][1], 0.25 * normal[1] + 0.75 * normal[2])
    expected = [[1, 0, 0], [0, 0.25, 0.75], [0, 0.75, 0.25], [1, 0, 0]]
    assert_close(found["target"], torch.tensor(expected))


def test_draws_are_pinned():
    rngs = [draw.generator("mix", 3, clip, 1) for clip in range(4)]
    found = [augment.draw_mixing(Mixing(), 224, rng=rng) for rng in rngs]
    assert [(round(share, 6), *box) for share, *box in found] == [
        (0.614623, 0, 0, 0, 0),
        (0.587054, 0, 0, 140, 148),
        (0.834961, 68, 22, 91, 91),
        (0.537229, 95, 0, 129, 180),
    ]
    rngs = [draw.generator("erase", 3, clip, 1) for clip in range(4)]
    assert [augment.draw_erased(224, probability=0.5, rng=rng) for rng in rngs] == [
        (17, 95, 82, 93),
        None,
        None,
        None,
    ]


def test_erased_boxes_have_upstreams_areas_and_aspects():
    rng = np.random.default_rng(0)
    boxes = [augment.draw_erased(224, probability=0.25, rng=rng) for _ in range(8000)]
    drawn = np.array([box for box in boxes if box])
    assert abs(len(drawn) / 8000 - 0.25) < 0.02
    areas, aspects = drawn[:, 2] * drawn[:, 3] / 224**2, drawn[:, 3] / drawn[:, 2]
    assert 0.019 < areas.min() < 0.03 and 0.31 < areas.max() < 0.336
    assert 0.29 < aspects.min() < 0.35 and 2.9 < aspects.max() < 3.45
    assert abs(np.log(aspects).mean()) < 0.05
    assert (drawn[:, :2] >= 0).all() and (drawn[:, :2] + drawn[:, 2:] <= 224).all()
    assert drawn[:, 0].min() == 0 and (drawn[:, 0] + drawn[:, 2]).max() == 224
