"""Several processes build one cache: who does what, and who measures the means."""

import logging
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import yaml
from test_cache_build import (
    CLIPS,
    assert_same_records,
    cache_folder,
    make_recipe,
    no_progress,
    num_committed,
    records,
    write_videos,
)
from tiny_runs import torchrun

from distill import log
from distill.cache import build as cache_build
from distill.cache import live
from distill.cache.build import build_cache
from distill.cache.store import open_folder
from distill.data.index import read_list
from distill.data.workers import Quarantine
from distill.dist import Part
from distill.errors import StateError


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def whole(videos, tmp_path_factory):
    """Every record of a cache of 4-bit codes that one process has built."""
    recipe = four_bits(videos, tmp_path_factory.mktemp("whole") / "cache")
    build_cache(recipe, progress=no_progress)
    return records(recipe)


def four_bits(videos, folder, **changes):
    return make_recipe(videos, folder, cache={"codes": "4bit"}, **changes)


def clips_of(part, *, batch_size=2):
    """Places in the list that a part looks at."""
    return {place for place in range(CLIPS) if place // batch_size % part.count == part.index}


@pytest.mark.parametrize("count", [2, 3, 9])
def test_parts_make_the_same_records_as_one_process(videos, whole, tmp_path, count):
    """Nine are more than there are batches: the last ones have nothing to do."""
    recipe = four_bits(videos, tmp_path / "cache")
    parts = [Part(index, count) for index in range(count)]
    reports = [build_cache(recipe, part=part, progress=no_progress) for part in parts]
    assert [report.written for report in reports] == [2 * len(clips_of(part)) for part in parts]
    assert [report.total for report in reports] == [2 * len(clips_of(part)) for part in parts]
    assert num_committed(cache_folder(recipe)) == 2 * CLIPS
    assert_same_records(records(recipe), whole)


def test_a_part_reports_its_own_share_and_the_whole(videos, tmp_path):
    recipe = four_bits(videos, tmp_path / "cache")
    report = build_cache(recipe, part=Part(0, 2), progress=no_progress)
    folder = cache_folder(recipe)
    assert re.match(
        rf"cache {folder}: 8 of 14 records \(7 clips, 2 views\): 8 new in \d+ s "
        r"\(\d+\.\d\d views/s\), \d+\.\d\d kB$",
        report.lines()[0],
    )
    assert report.lines()[1] == f"cache {folder}: part 1 of 2 has 8 of its 8 records"
    again = build_cache(recipe, part=Part(0, 2), progress=None)
    assert again.lines()[0].startswith(f"cache {folder}: 8 of 14 records (7 clips, 2 views): 0 new")
    assert (again.present, again.written, again.total) == (8, 0, 8)


def test_progress_tells_what_is_written_and_what_videos_cost(videos, tmp_path):
    notes = []

    @contextmanager
    def noted(title, *, total, unit, done=0):
        with no_progress(title, total=total, unit=unit) as bar:
            bar.note = notes.append
            yield bar

    recipe = four_bits(videos, tmp_path / "cache")
    report = build_cache(recipe, progress=noted)
    text = log.size_text(report.size_bytes)
    assert len(notes) == 9, "one for each batch, and one when the last shard is closed"
    assert re.fullmatch(rf"{text}, \d+% of the time waiting for videos", notes[-1])


def test_a_part_goes_on_with_what_another_division_has_left(videos, whole, tmp_path):
    """The fourth and last batch belongs to both."""
    recipe = four_bits(videos, tmp_path / "cache")
    assert build_cache(recipe, part=Part(0, 3), progress=no_progress).written == 6
    report = build_cache(recipe, part=Part(1, 2), progress=no_progress)
    assert (report.present, report.written, report.total) == (2, 4, 6)
    assert build_cache(recipe, progress=no_progress).written == 4
    assert num_committed(cache_folder(recipe)) == 2 * CLIPS
    assert_same_records(records(recipe), whole)


def test_torchrun_builds_one_cache_with_two_processes(videos, whole, tmp_path):
    """Real processes at once: one measures the means, the other waits for them."""
    recipe = four_bits(videos, tmp_path / "cache")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    done = subprocess.run(
        [sys.executable, *torchrun(2), "-m", "distill", "cache-teacher", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert f"cache {cache_folder(recipe)}: part 1 of 2 has 8 of its 8 records" in told
    assert f"cache {cache_folder(recipe)}: part 2 of 2 has 6 of its 6 records" in told
    assert told.count("calibrate ") == 1
    assert num_committed(cache_folder(recipe)) == 2 * CLIPS
    assert_same_records(records(recipe), whole)


def test_means_that_do_not_come_are_measured_here(videos, whole, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache_build, "MEANS_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(cache_build, "MEANS_POLL_SECONDS", 0.01)
    recipe = four_bits(videos, tmp_path / "cache")
    with caplog.at_level(logging.INFO, "distill.cache.build"):
        build_cache(recipe, part=Part(1, 2), progress=no_progress)
    where = f"cache {cache_folder(recipe)}: part 1 of 2"
    assert [record.getMessage() for record in caplog.records] == [
        f"{where} measures the means of its codes; waiting for 0 minutes at most",
        f"{where} has not brought the means; measuring them here",
    ]
    build_cache(recipe, part=Part(0, 2), progress=no_progress)
    assert_same_records(records(recipe), whole)


def test_a_part_that_waits_takes_the_means_that_come(videos, tmp_path, monkeypatch):
    measured = []

    def noted(*arguments, **options):
        measured.append(threading.current_thread().name)
        return live.calibrate(*arguments, **options)

    monkeypatch.setattr(cache_build, "calibrate", noted)
    # Open files with a process's own number are a dead one's, but here two builds share it.
    monkeypatch.setattr(cache_build, "remove_leftovers", lambda folder: 0)
    monkeypatch.setattr(cache_build, "MEANS_POLL_SECONDS", 0.01)
    recipe = four_bits(videos, tmp_path / "cache")
    waiting = threading.Thread(
        name="second",
        target=build_cache,
        args=[recipe],
        kwargs={"part": Part(1, 2), "progress": no_progress},
    )
    waiting.start()
    build_cache(recipe, part=Part(0, 2), progress=no_progress)
    waiting.join()
    assert measured == ["MainThread"]
    assert num_committed(cache_folder(recipe)) == 2 * CLIPS


def test_the_measurer_is_a_part_that_has_work(videos, tmp_path, monkeypatch):
    """The first batch's clips are all in quarantine, so part 1 of 4 would never load a teacher."""
    monkeypatch.setattr(cache_build, "MEANS_WAIT_SECONDS", None)  # nobody is to wait
    recipe = four_bits(videos, tmp_path / "cache")
    cache_folder(recipe).mkdir()
    clips = read_list(recipe.data.train)
    quarantine = Quarantine(tmp_path / "cache/quarantine.jsonl", total=2, max_share=1.0)
    for clip in clips[:2]:
        quarantine.add(clip, "the file is empty")
    assert build_cache(recipe, part=Part(0, 4), progress=None).written == 0
    assert build_cache(recipe, part=Part(1, 4), progress=no_progress).written == 4


def test_what_parts_find_together_may_be_too_much(videos, tmp_path):
    """While this part runs, with all of its own, another puts three of the seven clips aside."""
    recipe = make_recipe(videos, tmp_path / "cache", data={"max_quarantined": 0.4})
    clips = read_list(recipe.data.train)

    @contextmanager
    def meanwhile(title, *, total, unit, done=0):
        other = Quarantine(tmp_path / "cache/quarantine-other.jsonl", total=7, max_share=1.0)
        for clip in (clips[0], clips[1], clips[4]):
            other.add(clip, "the file is empty")
        with no_progress(title, total=total, unit=unit) as bar:
            yield bar

    message = "^3 of 7 clips cannot be decoded, more than data.max_quarantined=0.4 allows; "
    with pytest.raises(StateError, match=message):
        build_cache(recipe, part=Part(1, 2), progress=meanwhile)
    assert num_committed(cache_folder(recipe)) == 6


def test_sigterm_commits_every_batch_that_was_handed_over(videos, tmp_path):
    """A real process, ended while its first shard is open."""
    recipe = four_bits(videos, tmp_path / "cache")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    folder = cache_folder(recipe)
    command = [sys.executable, "-m", "distill", "cache-teacher", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + 60
        while not any(size > 5000 for size in open_folder(folder).sizes("open-").values()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert process.returncode == 128 + signal.SIGTERM
    found = num_committed(folder)
    assert 2 <= found <= 2 * CLIPS
    assert not list(folder.glob("open-*"))
    held = set(records(recipe))
    ids = [clip.id for clip in read_list(recipe.data.train)]
    whole_batches = [
        {(clip, view) for clip in ids[start : start + 2]}
        for view in (0, 1)
        for start in (0, 2, 4, 6)
    ]
    assert all(batch <= held or not batch & held for batch in whole_batches)
    assert build_cache(recipe, progress=no_progress).written == 2 * CLIPS - found
