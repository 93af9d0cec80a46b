"""Finetuning's views: repeats of frames decoded once, and what is drawn after crop and flip."""

import numpy as np
import pytest
import torch
import videos

import distill.data.load
from distill.data import augment
from distill.data.decode import open_video
from distill.data.index import Clip, read_list
from distill.data.load import ClipBatches, Quarantine, load_eval_view, load_view, load_views
from distill.recipe import Augment, ClipList, Data, Mixing, Views

SMALL = Views(frames=4, image_size=28, crop="resized")
EVERYTHING = Augment.model_validate(
    {"rand_augment": {"num_ops": 6}, "erase": {"probability": 0.5}, "repeats": 2}
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Clip]:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(5):
        videos.write(folder / f"{number}.mp4", num_frames=40 + number)
    (folder / "list.csv").write_text("".join(f"{number}.mp4,{number}\n" for number in range(5)))
    return read_list(ClipList(list=str(folder / "list.csv")))


def batches(clips, augmented, *, batch_size=4, mixing=None, workers=1) -> ClipBatches:
    return ClipBatches(
        clips,
        Data(train=ClipList(list=None), views=SMALL, augment=augmented, workers=workers),
        batch_size=batch_size,
        seed=5,
        views_per_clip=None,
        quarantine=Quarantine(None, total=len(clips), max_share=0.0),
        mixing=mixing,
    )


def test_what_is_drawn_later_leaves_crop_flip_and_frames_as_they_are(clips):
    for number in range(6):
        plain = load_view(clips[0], number, views=SMALL, seed=1)
        (augmented,) = load_views(
            *(clips[0], number),
            views=SMALL,
            seed=1,
            augmented=EVERYTHING.model_copy(update={"repeats": 1}),
        )
        for name in ("crop", "flip", "number", "seed"):
            assert getattr(augmented, name) == getattr(plain, name)
        assert np.array_equal(augmented.frames, plain.frames)
        assert (plain.operations, plain.erased) == ((), None)
        is_changed = bool(augmented.operations or augmented.erased)
        assert np.array_equal(augmented.pixels, plain.pixels) is not is_changed


def test_repeats_show_the_frames_of_the_first_decoded_once(clips, monkeypatch):
    opened = []
    real = distill.data.load.open_video
    monkeypatch.setattr(
        distill.data.load,
        "open_video",
        lambda path, **settings: opened.append(path) or real(path, **settings),
    )
    one, two = load_views(clips[0], 6, views=SMALL, seed=1, augmented=Augment(repeats=2))
    assert len(opened) == 1
    assert (one.number, two.number) == (6, 7)
    assert np.array_equal(one.frames, two.frames)
    alone = load_view(clips[0], 6, views=SMALL, seed=1)
    assert np.array_equal(one.pixels, alone.pixels)
    later = load_view(clips[0], 7, views=SMALL, seed=1)
    assert not np.array_equal(later.frames, two.frames)  # on its own it would show others
    assert (later.crop, later.flip) == (two.crop, two.flip)
    assert two.crop != one.crop


def test_repeats_lie_side_by_side_and_batch_size_counts_them(clips):
    source = batches(clips, Augment(repeats=2))
    assert source.steps_per_epoch == 3  # ten views, four at a time
    found = list(source.epoch(3))
    assert [len(batch["clip_id"]) for batch in found] == [4, 4, 2]
    for batch in found:
        assert batch["repeat"].tolist() == [0, 1] * (len(batch["repeat"]) // 2)
        assert batch["view"].tolist() == [6, 7] * (len(batch["view"]) // 2)
        assert torch.equal(batch["clip_id"][::2], batch["clip_id"][1::2])
        assert not torch.equal(batch["pixels"][::2], batch["pixels"][1::2])
    labels = torch.cat([batch["label"] for batch in found])
    assert sorted(labels.tolist()) == sorted([*range(5), *range(5)])
    assert torch.equal(next(source.epoch(3, first_step=1))["pixels"], found[1]["pixels"])


def test_batches_say_what_is_erased_and_how_to_mix(clips):
    source = batches(clips, EVERYTHING, mixing=Mixing())
    first = list(source.epoch(1))
    again = list(batches(clips, EVERYTHING, mixing=Mixing(), workers=2).epoch(1))
    for one, other in zip(first, again, strict=True):
        for name in ("pixels", "erased", "mix"):
            assert torch.equal(one[name], other[name])
    erased = torch.cat([batch["erased"] for batch in first])
    assert erased.shape == (10, 4) and 0 < int((erased[:, 2] > 0).sum()) < 10
    mixes = torch.cat([batch["mix"] for batch in first])
    assert mixes.shape == (10, 5) and len(set(mixes[:, 0].tolist())) == 10
    for batch in first:
        for row in range(len(batch["label"])):
            clip = clips[int(batch["label"][row])]
            made = load_views(clip, 2, views=SMALL, seed=5, augmented=EVERYTHING)
            view = made[int(batch["repeat"][row])]
            assert np.array_equal(view.pixels, batch["pixels"][row].numpy())
            assert batch["erased"][row].tolist() == list(view.erased or (0, 0, 0, 0))


def test_views_are_resized_as_the_recipe_says(clips):
    plainly = SMALL.model_copy(update={"antialias": False})
    place = {"clip_index": 0, "num_clips": 1, "crop_index": 1, "num_crops": 3}
    pairs = [
        [load_view(clips[0], 4, views=views, seed=1) for views in (SMALL, plainly)],
        [load_eval_view(clips[0], **place, views=views) for views in (SMALL, plainly)],
    ]
    for blurred, plain in pairs:
        assert blurred.crop == plain.crop
        assert not np.array_equal(blurred.pixels, plain.pixels)
        with open_video(clips[0].path) as video:
            frames = video.read(plain.frames)
        crop = augment.Crop(*plain.crop, size=28, resize=plain.resize)
        again = augment.apply(frames.pixels, crop, flip=plain.flip, antialias=False)
        assert np.array_equal(again, plain.pixels)


def test_plain_batches_have_neither(clips):
    batch = next(batches(clips, Augment()).epoch(0))
    assert "erased" not in batch and "mix" not in batch
    assert batch["repeat"].tolist() == [0] * 4
