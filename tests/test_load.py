"""Views of clips, and a loader that hung and crashed workers cannot stop."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import faults
import numpy as np
import pytest
import torch
import videos
from faults import task
from PIL import Image

from distill import draw
from distill.cache.record import view_info
from distill.data import augment
from distill.data.decode import open_video
from distill.data.index import Clip, clip_id, read_list
from distill.data.load import (
    ClipBatches,
    ClipLoader,
    Quarantine,
    collate,
    load_eval_view,
    load_view,
    replay_view,
)
from distill.errors import InputError, StateError
from distill.recipe import ClipList, Data, SegmentSampling, Views

SMALL = Views(frames=4, image_size=28)


def loader(*, workers=2, timeout_seconds=60.0, quarantine=None, load=faults.load) -> ClipLoader:
    quarantine = quarantine or Quarantine(None, total=1, max_share=100.0)
    return ClipLoader(load, workers=workers, timeout_seconds=timeout_seconds, quarantine=quarantine)


def numbers(items) -> list[int]:
    """Which tasks came back, checked against what their pixels say."""
    assert all(view.pixels[0, 0, 0, 0] == task.clip.id for task, view in items)
    return [task.clip.id for task, _ in items]


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while is_alive(pid):
        assert time.monotonic() < end, f"process {pid} is still there"
        time.sleep(0.05)


def test_views_come_in_the_order_of_the_tasks():
    waits = ["sleep 0.4", "ok", "sleep 0.1", "ok", "sleep 0.3", "ok", "ok"]
    tasks = [task(name, number) for number, name in enumerate(waits)]
    batches = list(loader(workers=3).run([tasks[:3], tasks[3:4], tasks[4:], []]))
    assert [numbers(items) for items in batches] == [[0, 1, 2], [3], [4, 5, 6], []]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("damaged", "/videos/damaged: the file is empty"),
        ("memory", "/videos/memory: not enough memory to decode it"),
        ("segfault", "/videos/segfault: its worker was ended by SIGSEGV"),
        ("exit 3", "/videos/exit 3: its worker was ended with exit code 3"),
        ("bug", "/videos/bug: its worker was ended with exit code 1"),
        ("hang", "/videos/hang: its worker was ended after 1.5 s without an answer"),
    ],
)
def test_a_fault_costs_its_clip_alone(fault, reason):
    quarantine = Quarantine(None, total=6, max_share=0.5)
    names = ["ok", fault, "ok", "ok", "ok", "ok"]
    tasks = [task(name, number) for number, name in enumerate(names)]
    faulty = loader(timeout_seconds=1.5, quarantine=quarantine)
    batches = list(faulty.run([tasks[:2], tasks[2:4], tasks[4:]]))
    assert [numbers(items) for items in batches] == [[0], [2, 3], [4, 5]]
    assert [entry["reason"] for entry in quarantine.entries] == [reason]


def test_the_clock_runs_for_the_clip_and_not_for_the_queue():
    tasks = [task("sleep 0.4", number) for number in range(6)]
    quarantine = Quarantine(None, total=6, max_share=0.0)
    (items,) = loader(workers=1, timeout_seconds=1.5, quarantine=quarantine).run([tasks])
    assert numbers(items) == list(range(6))


def test_a_slow_consumer_is_not_a_slow_clip():
    quarantine = Quarantine(None, total=6, max_share=0.0)
    run = loader(timeout_seconds=1.0, quarantine=quarantine).run(
        [[task("ok", number)] for number in range(6)]
    )
    for number, items in enumerate(run):
        assert numbers(items) == [number]
        if number == 1:
            time.sleep(2.0)


def test_too_many_faults_stop_the_run_and_its_workers():
    quarantine = Quarantine(None, total=10, max_share=0.1)
    names = ["ok", "damaged", "segfault", *["ok"] * 7]
    run = loader(quarantine=quarantine).run([[task(n, i)] for i, n in enumerate(names)])
    (pair,) = next(run)
    with pytest.raises(StateError) as raised:
        list(run)
    assert str(raised.value) == (
        "2 of 10 clips cannot be decoded, more than data.max_quarantined=0.1 allows; the last: "
        "/videos/segfault: its worker was ended by SIGSEGV; mend them, or raise the share"
    )
    wait_until_gone(int(pair[1].decoder))


def test_quarantined_clips_are_not_tried_again(tmp_path):
    log, path = tmp_path / "log", tmp_path / "quarantine.jsonl"
    tasks = [task(f"note {log}", 5), task("ok", 1)]
    for _ in range(2):
        quarantine = Quarantine(path, total=4, max_share=0.5)
        for _ in range(2):
            (items,) = loader(quarantine=quarantine).run([tasks])
            assert numbers(items) == [1]
    assert log.read_text() == "tried\n"
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {
            "id": 5,
            "name": f"note {log}",
            "path": f"/videos/note {log}",
            "line": 6,
            "reason": f"/videos/note {log}: noted",
        }
    ]


def test_a_quarantine_survives_a_line_cut_short(tmp_path):
    path = tmp_path / "run" / "quarantine.jsonl"
    Quarantine(path, total=9, max_share=0.5).add(task("a", 1).clip, "bad é")
    path.write_bytes(path.read_bytes() + b'{"id": 2, "na')
    written = path.read_bytes()
    quarantine = Quarantine(path, total=9, max_share=0.5)
    assert path.read_bytes() == written, "another process may be about to write the rest"
    quarantine.add(task("c", 3).clip, "worse")
    entries = Quarantine(path, total=9, max_share=0.5).entries
    assert [(entry["id"], entry["reason"]) for entry in entries] == [(1, "bad é"), (3, "worse")]
    assert task("c", 3).clip in quarantine and task("b", 2).clip not in quarantine
    path.write_text("a note\n")
    with pytest.raises(InputError, match="quarantine.jsonl: not a quarantine list; remove it"):
        Quarantine(path, total=9, max_share=0.5)


def test_little_is_made_ahead():
    taken = itertools.count()
    source = ([task("ok", next(taken))] for _ in itertools.count())
    run = loader().run(source)
    for number in range(4):
        assert numbers(next(run)) == [number]
    run.close()
    assert next(taken) == 6  # four used, two more batches ahead


def test_workers_end_with_the_run():
    run = loader().run([task("ok", number)] for number in itertools.count())
    pids = {int(view.decoder) for _ in range(10) for _, view in next(run)}
    assert os.getpid() not in pids and 1 <= len(pids) <= 2
    run.close()
    for pid in pids:
        wait_until_gone(pid)


def test_a_fault_of_the_source_reaches_the_consumer():
    def source():
        yield [task("ok", 0)]
        raise ZeroDivisionError("no more tasks")

    with pytest.raises(ZeroDivisionError, match="no more tasks"):
        list(loader().run(source()))


def test_workers_ignore_what_is_meant_for_the_trainer():
    quarantine = Quarantine(None, total=1, max_share=0.0)
    (items,) = loader(quarantine=quarantine).run([[task("interrupt", 7)]])
    assert numbers(items) == [7]


def test_workers_are_kept_for_the_next_run_where_asked_to():
    kept = loader(workers=1)

    def pid(text: str = "ok") -> int:
        (items,) = kept.run([[task(text)]])
        return int(items[0][1].decoder)

    with kept.keeping_workers():
        first = pid()
        assert pid() == first
        run = kept.run([[task("ok")]] * 9)
        assert int(next(run)[0][1].decoder) == first
        inner = pid()  # a run inside another has workers of its own
        assert inner != first
        run.close()  # and what was not run to its end is not gone on with
        wait_until_gone(first)
        assert pid() == inner
        os.kill(inner, signal.SIGKILL)
        while kept._kept._workers:  # one that dies with a task costs a clip
            time.sleep(0.05)
        last = pid()
        assert last not in (first, inner) and is_alive(last)
    wait_until_gone(last)
    other = pid()
    wait_until_gone(other)


def test_waiting_is_counted():
    slow = loader()
    list(slow.run([[task("sleep 0.5", 0)]]))
    assert 0.4 < slow.wait_seconds < 30


def test_workers_that_cannot_start_are_an_error_of_state():
    with pytest.raises(StateError) as raised:
        list(loader(load=faults.Unloadable()).run([[task("ok", 0)]]))
    assert str(raised.value) == (
        "loader workers do not start (ended with exit code 1); see the traceback above; a script "
        "that loads clips has to keep its own work under `if __name__ == '__main__':`"
    )


@contextlib.contextmanager
def run_script(text: str, folder):
    script = folder / "trainer.py"
    script.write_text(text)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


TRAINER = """
import faults
from distill.data.workers import ClipLoader, Quarantine

if __name__ == "__main__":
    quarantine = Quarantine(None, total=1, max_share=0.0)
    loader = ClipLoader(faults.load, workers=1, timeout_seconds=TIMEOUT, quarantine=quarantine)
    for items in loader.run([[faults.task("ok")], [faults.task("THEN")]]):
        print(*[view.decoder for _, view in items], flush=True)
    print("done", flush=True)
"""


def test_workers_do_not_outlive_a_trainer_that_was_killed(tmp_path):
    text = TRAINER.replace("TIMEOUT", "1000").replace("THEN", "hang")
    with run_script(text, tmp_path) as trainer:
        worker = int(trainer.stdout.readline())
        time.sleep(1.0)  # by now it hangs
        trainer.kill()
        wait_until_gone(worker)


def test_python_ends_while_a_run_is_left_open(tmp_path):
    text = TRAINER.replace("TIMEOUT", "1000").replace("THEN", "hang")
    text += "    run = loader.run([[faults.task('ok')]] * 9)\n    next(run)\n"
    with run_script(text.replace(', [faults.task("hang")]', ""), tmp_path) as trainer:
        assert trainer.wait(timeout=60) == 0
        assert "Exception ignored" not in trainer.stdout.read()


def test_a_suspended_run_does_not_blame_its_clips(tmp_path):
    text = TRAINER.replace("TIMEOUT", "6").replace("THEN", "sleep 2")
    with run_script(text, tmp_path) as trainer:
        trainer.stdout.readline()
        os.killpg(trainer.pid, signal.SIGSTOP)
        time.sleep(7)
        os.killpg(trainer.pid, signal.SIGCONT)
        assert trainer.stdout.read().endswith("done\n")
        assert trainer.wait() == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for number in range(7):
        videos.write(folder / f"{number}.mp4", num_frames=30 + number)
    lines = [f"{'ssv2' if n == 6 else 'k400'} {n}.mp4 -1 -1 -1 {n}\n" for n in range(7)]
    (folder / "good.txt").write_text("".join(lines))
    (folder / "text.mp4").write_text("no video")
    (folder / "bad.txt").write_text("k400 text.mp4 -1 -1 -1 8\n" + "".join(lines))
    return folder


def clips_of(folder, name="good.txt") -> list[Clip]:
    return read_list(ClipList(list=str(folder / name)))


def batches(clips, *, workers=2, batch_size=3, views_per_clip=None, quarantine=None, views=SMALL):
    return ClipBatches(
        clips,
        Data(train=ClipList(list=None), views=views, workers=workers),
        batch_size=batch_size,
        seed=5,
        views_per_clip=views_per_clip,
        quarantine=quarantine or Quarantine(None, total=len(clips), max_share=0.0),
    )


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, two in zip(ours, theirs, strict=True):
        assert one["epoch"] == two["epoch"]
        for name in ("clip_id", "view", "label", "pixels"):
            assert torch.equal(one[name], two[name])


def test_an_epoch_has_each_clip_once_in_an_order_of_its_own(folder):
    source = batches(clips_of(folder))
    assert source.steps_per_epoch == 3
    orders = []
    for epoch in (0, 1):
        found = list(source.epoch(epoch))
        assert [batch["epoch"] for batch in found] == [epoch] * 3
        assert [len(batch["label"]) for batch in found] == [3, 3, 1]
        assert {int(view) for batch in found for view in batch["view"]} == {epoch}
        orders.append(torch.cat([batch["label"] for batch in found]).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(7))
    assert orders[0] != orders[1]
    assert source.wait_seconds > 0


def test_batches_have_the_stated_types(folder):
    batch = next(batches(clips_of(folder)).epoch(0))
    assert (batch["pixels"].dtype, batch["pixels"].shape) == (torch.uint8, (3, 3, 4, 28, 28))
    assert [batch[name].dtype for name in ("clip_id", "view", "label")] == [torch.int64] * 3
    ids = {clip.label: clip.id for clip in clips_of(folder)}
    assert batch["clip_id"].tolist() == [ids[label] for label in batch["label"].tolist()]


def test_an_epoch_goes_on_in_its_middle(folder):
    whole = list(batches(clips_of(folder)).epoch(2))
    assert_same(list(batches(clips_of(folder)).epoch(2, first_step=1)), whole[1:])
    assert list(batches(clips_of(folder)).epoch(2, first_step=3)) == []


def test_neither_workers_nor_processes_change_a_bit(folder):
    clips = clips_of(folder)
    one = list(batches(clips, workers=1).epoch(1))
    assert_same(one, list(batches(clips, workers=3).epoch(1)))
    by_label = {clip.label: clip for clip in clips}
    for batch in one:
        for label, pixels in zip(batch["label"].tolist(), batch["pixels"], strict=True):
            here = load_view(by_label[label], 1, views=SMALL, seed=5)
            assert np.array_equal(here.pixels, pixels.numpy())


def test_views_come_round(folder):
    source = batches(clips_of(folder), views_per_clip=2)
    first = {int(b["view"][0]): b for epoch in (0, 1) for b in source.epoch(epoch)}
    assert set(first) == {0, 1}
    again = {
        label: pixels
        for batch in source.epoch(2)
        for label, pixels in zip(batch["label"].tolist(), batch["pixels"], strict=True)
    }
    for batch in source.epoch(0):
        for label, pixels in zip(batch["label"].tolist(), batch["pixels"], strict=True):
            assert torch.equal(pixels, again[label])


def test_bad_clips_leave_the_other_batches_as_they_are(folder):
    clips = clips_of(folder, "bad.txt")
    quarantine = Quarantine(None, total=len(clips), max_share=0.2)
    found = list(batches(clips, quarantine=quarantine).epoch(0))
    assert sorted(len(batch["label"]) for batch in found) == [2, 2, 3]
    assert sorted(torch.cat([batch["label"] for batch in found]).tolist()) == list(range(7))
    assert [entry["name"] for entry in quarantine.entries] == ["text.mp4"]
    again = list(batches(clips, quarantine=quarantine).epoch(0))  # now without trying it
    assert_same(found, again)


def test_a_batch_that_lost_all_its_clips_takes_the_next_one(folder):
    clips = clips_of(folder, "bad.txt")
    for epoch in range(3):
        quarantine = Quarantine(None, total=len(clips), max_share=0.2)
        source = batches(clips, batch_size=1, quarantine=quarantine)
        order = [clips[i].label for i in draw.generator("shuffle", 5, epoch).permutation(8)]
        place = order.index(8)
        expected = [*order[:place], order[(place + 1) % 8], *order[place + 1 :]]
        assert [int(batch["label"]) for batch in source.epoch(epoch)] == expected


def test_nothing_left_is_an_error(folder):
    (bad,) = (clip for clip in clips_of(folder, "bad.txt") if clip.label == 8)
    quarantine = Quarantine(None, total=1, max_share=1.0)
    with pytest.raises(StateError, match="none of the clips can be decoded"):
        list(batches([bad], quarantine=quarantine).epoch(0))
    with pytest.raises(InputError, match="there are no clips to train with"):
        batches([])


def test_a_view_holds_what_rebuilds_it(folder):
    clip = clips_of(folder)[3]
    view = load_view(clip, 9, views=SMALL, seed=1)
    assert view.frames.dtype == np.int64 and view.pts_seconds.dtype == np.float64
    np.testing.assert_allclose(view.pts_seconds, view.frames / 25, atol=1e-6)
    with open_video(clip.path) as video:
        frames = video.read(view.frames)
    assert [videos.number_of(frame) for frame in frames.pixels] == view.frames.tolist()
    rebuilt = augment.apply(frames.pixels, augment.Crop(*view.crop, size=28), flip=view.flip)
    assert np.array_equal(rebuilt, view.pixels)
    assert view.decoder.startswith("decord ")


def test_a_view_is_replayed_from_what_its_record_says(folder):
    clip = clips_of(folder)[3]
    for crop in ("multiscale", "resized", "center"):
        views = SMALL.model_copy(update={"crop": crop})
        view = load_view(clip, 2, views=views, seed=1)
        again = replay_view(clip, view_info(clip, view), image_size=28)
        assert np.array_equal(again.pixels, view.pixels)
        assert (view.resize is None) == (crop != "center")
        fields = ("crop", "resize", "flip", "decoder", "number", "seed")
        assert [getattr(again, name) for name in fields] == [getattr(view, name) for name in fields]
        assert np.array_equal(again.pts_seconds, view.pts_seconds)


def test_a_view_of_another_video_is_not_replayed(folder, tmp_path):
    clip = clips_of(folder)[3]
    info = view_info(clip, load_view(clip, 2, views=SMALL, seed=1))
    with pytest.raises(InputError) as raised:
        replay_view(clip, {**info, "frames": [0, 1, 2, 33]}, image_size=28)
    assert str(raised.value) == (
        f"{folder}/3.mp4: 33 frames, but its record has frame 33; it is not the video that was "
        "cached"
    )
    slower = dataclasses.replace(
        clip, path=str(videos.write(tmp_path / "3.mp4", num_frames=33, fps=24))
    )
    for kept in (info, {**info, "pts_seconds": None}):
        with pytest.raises(InputError, match=f"{slower.path}: its frames are shown at other times"):
            replay_view(slower, kept, image_size=28)


def test_views_depend_on_clip_view_and_seed_and_on_nothing_else(folder):
    clip, other = clips_of(folder)[:2]
    view = load_view(clip, 0, views=SMALL, seed=1)
    assert np.array_equal(view.pixels, load_view(clip, 0, views=SMALL, seed=1).pixels)
    moved = Clip(id=clip.id, path=clip.path, name="elsewhere", label=99, line=7)
    assert np.array_equal(view.pixels, load_view(moved, 0, views=SMALL, seed=1).pixels)
    for changed in (
        load_view(clip, 1, views=SMALL, seed=1),
        load_view(clip, 0, views=SMALL, seed=2),
        load_view(other, 0, views=SMALL, seed=1),
    ):
        assert not np.array_equal(view.pixels, changed.pixels)


def test_something_something_is_never_flipped(folder):
    plain, something = clips_of(folder)[5:]
    always = SMALL.model_copy(update={"flip": 1.0})
    assert load_view(plain, 0, views=always, seed=0).flip is True
    assert load_view(something, 0, views=always, seed=0).flip is False
    half = [load_view(plain, view, views=SMALL, seed=0).flip for view in range(40)]
    assert 10 < sum(half) < 30


def test_trimmed_clips_show_their_part_alone(folder):
    clip = Clip(
        id=1,
        path=str(folder / "0.mp4"),
        name="0.mp4",
        total_seconds=1.2,
        start_seconds=0.4,
        end_seconds=0.8,
    )
    for view in range(10):
        frames = load_view(clip, view, views=SMALL, seed=0).frames
        assert frames.min() >= 10 and frames.max() < 20
    middle = load_eval_view(clip, clip_index=0, num_clips=1, crop_index=0, num_crops=1, views=SMALL)
    assert middle.frames.tolist() == [11, 13, 15, 18]


def test_evaluation_views(folder):
    clip = clips_of(folder)[0]
    seen = [
        load_eval_view(clip, clip_index=c, num_clips=2, crop_index=j, num_crops=3, views=SMALL)
        for c in range(2)
        for j in range(3)
    ]
    assert [view.frames.tolist() for view in seen[::3]] == [[2, 9, 16, 24], [4, 11, 18, 26]]
    assert [view.crop for view in seen[:3]] == [(x, 0, 28, 28) for x in (0, 7, 14)]
    assert {view.pixels.shape for view in seen} == {(3, 4, 28, 28)}
    assert not any(view.flip for view in seen)


def test_folders_of_frames_use_the_number_in_the_list(tmp_path):
    for number in range(20):
        Image.fromarray(videos.burn(number)).save(tmp_path / f"{number:05}.png")
    views = SMALL.model_copy(update={"sampling": SegmentSampling(kind="segment")})
    clip = Clip(id=clip_id("x"), path=str(tmp_path), name="x", num_frames=12)
    for view in range(8):
        made = load_view(clip, view, views=views, seed=0)
        assert made.frames.max() < 12 and np.isnan(made.pts_seconds).all()
    short = Clip(id=1, path=str(tmp_path), name="x", num_frames=21)
    with pytest.raises(InputError, match=f"{tmp_path}: 20 frames where the list states 21"):
        load_view(short, 0, views=views, seed=0)


@pytest.mark.parametrize("template", ["img_{:05}.jpg", "{:05}.jpg"])
def test_folders_as_the_data_sets_name_their_frames(tmp_path, template):
    """Something-Something's and HMDB51's frames count from 1, the frames of a view from 0."""
    (tmp_path / "17").mkdir()
    for number in range(35):
        image = Image.fromarray(videos.burn(number, width=224, height=224))
        image.save(tmp_path / "17" / template.format(number + 1), quality=95)
    (tmp_path / "train.csv").write_text("17 35 4\n")
    (clip,) = read_list(ClipList(list=str(tmp_path / "train.csv")))
    views = Views(image_size=224, sampling=SegmentSampling(kind="segment"), antialias=False)
    place = {"num_clips": 2, "crop_index": 0, "num_crops": 1, "views": views}
    for index, expected in enumerate(
        ([0, 4, 8, 13, 17, 21, 26, 30], [2, 6, 10, 15, 19, 24, 28, 32])
    ):
        view = load_eval_view(clip, clip_index=index, **place)
        assert view.frames.tolist() == expected
        shown = [videos.number_of(frame) for frame in view.pixels.transpose(1, 2, 3, 0)]
        assert shown == expected


def test_collate_marks_clips_without_a_label():
    items = [(task("ok", 3), faults.view(3))]
    unlabelled = functools.partial(Clip, path="", name="")
    items.append((type(items[0][0])(unlabelled(id=-(2**63)), view=4), faults.view(1)))
    batch = collate(items)
    assert batch["label"].tolist() == [3, -1]
    assert batch["clip_id"].tolist() == [3, -(2**63)]
    assert batch["view"].tolist() == [0, 4]
    assert batch["pixels"][:, 0, 0, 0, 0].tolist() == [3, 1]
