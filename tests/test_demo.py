"""The demo set: real files, splits without a common source, pairs that only time separates."""

import json
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest

from distill.data import demo
from distill.data.demo import CLASSES, PHOTOGRAPHS, SPLITS, digit_range, make_demo, render_clip
from distill.data.index import read_list
from distill.errors import InputError
from distill.recipe import ClipList, Demo
from distill.recipe_file import load_recipe


def section(folder, **changes):
    settings = {"train_clips": 12, "val_clips": 3, "test_clips": 4, "seed": 5} | changes
    return Demo(kind="moving-digits", folder=str(folder), **settings)


def test_lists_name_every_video_and_its_label(tmp_path):
    make_demo(section(tmp_path))
    clips = read_list(ClipList(list=str(tmp_path / "train.csv")))
    assert [clip.label for clip in clips] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    for clip in clips:
        with av.open(clip.path) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            frames = sum(1 for _ in container.decode(stream))
        assert frames == demo.FRAMES


def test_the_quickstart_calls_the_classes_by_their_names():
    stages = load_recipe("quickstart").stages
    assert {stages[name].objective.class_names for name in ("finetuned", "scratch")} == {CLASSES}


def test_a_video_shows_what_was_rendered(tmp_path):
    frames = render_clip(4, "train", number=4, seed=0)
    demo.write_video(tmp_path / "clip.mp4", frames)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        decoded = np.stack(
            [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        )
    error = np.abs(decoded[:, None].astype(float) - frames).mean(axis=(2, 3, 4))  # [T,T]
    assert error.diagonal().max() < 12  # lossy, at a quality that keeps the digit
    np.testing.assert_array_equal(error.argmin(axis=1), np.arange(demo.FRAMES))


def test_the_same_frames_are_the_same_bytes_however_often_they_are_encoded(tmp_path):
    """With x264's assembly some of these encodings would differ, more so side by side."""
    clips = [render_clip(number % 10, "train", number=number, seed=0) for number in range(12)]

    def encode(number: int) -> bytes:
        path = tmp_path / f"{number}.mp4"
        demo.write_video(path, clips[number % 12])
        return path.read_bytes()

    with ThreadPoolExecutor(2) as pool:
        files = list(pool.map(encode, range(12 * 25)))
    assert [len(set(files[number::12])) for number in range(12)] == [1] * 12


def test_a_stopped_call_is_gone_on_with_and_a_finished_one_does_nothing(tmp_path):
    make_demo(section(tmp_path))
    stamp, video = tmp_path / "demo.json", tmp_path / "videos/val/000001.mp4"
    kept = tmp_path / "videos/val/000000.mp4"
    written = kept.stat().st_mtime_ns
    stamp.unlink()
    video.unlink()
    make_demo(section(tmp_path))
    assert video.stat().st_size > 0
    assert kept.stat().st_mtime_ns == written
    video.unlink()
    make_demo(section(tmp_path))
    assert not video.exists()


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    make_demo(section(tmp_path))
    with pytest.raises(InputError, match="holds a set made with other settings.*data.demo.folder"):
        make_demo(section(tmp_path, seed=6))
    assert json.loads((tmp_path / "demo.json").read_text())["seed"] == 5


@pytest.mark.parametrize("number", [0, 7])
def test_an_odd_class_is_the_even_one_before_it_played_backwards(number):
    for label in range(0, len(CLASSES), 2):
        forwards = render_clip(label, "test", number=number, seed=1)
        backwards = render_clip(label + 1, "test", number=number, seed=1)
        np.testing.assert_array_equal(forwards, backwards[::-1])
        assert not np.array_equal(forwards, backwards)


def test_no_photograph_and_no_digit_is_in_two_splits():
    names = [name for split in SPLITS for name in PHOTOGRAPHS[split]]
    assert len(names) == len(set(names)) == 18
    used = [set(digit_range(split)) for split in SPLITS]
    assert used[0] | used[1] | used[2] == set(range(1797))
    assert sum(len(one) for one in used) == 1797
    scenes = [demo.photograph(name) for name in names]  # all are shipped
    assert all(min(scene.shape[:2]) == 256 for scene in scenes)


def test_splits_with_the_same_numbers_show_other_clips():
    clips = [render_clip(0, split, number=0, seed=0) for split in SPLITS]
    assert not np.array_equal(clips[0], clips[1])
    assert not np.array_equal(clips[1], clips[2])


def write_often(path, frames):
    for _ in range(20):
        demo.write_video(path, frames)


def test_processes_may_make_the_set_at_once(tmp_path):
    """As torchrun's do: each writes a file of its own, and every one is whole."""
    frames = np.zeros((4, 48, 48, 3), np.uint8)
    fork = multiprocessing.get_context("fork")
    path = tmp_path / "0.mp4"
    writers = [fork.Process(target=write_often, args=(path, frames)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 4
    assert [file.name for file in tmp_path.iterdir()] == ["0.mp4"]
