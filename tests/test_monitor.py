"""What a monitor tells of a student that is being distilled, and that it changes nothing."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.neighbors import KNeighborsClassifier
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import (
    ROUNDING,
    SIZE,
    assert_same_run,
    distil,
    metrics,
    run_cli,
    stop_after,
    write_clips,
    write_recipe,
)
from torch.testing import assert_close

from distill.cache.identity import teacher_hash
from distill.checkpoint import latest_checkpoint, load_checkpoint, random_state
from distill.checks.recipe import missing_inputs
from distill.data.index import read_list
from distill.data.load import load_view
from distill.mask import draw_kept
from distill.models import build_student, build_teacher
from distill.recipe_file import differences
from distill.run.interrupt import Interrupted
from distill.run.monitor import TEMPERATURE, knn_top1, linear_top1, undisturbed
from distill.train import train, train_together

NAMES = ("monitor/knn_top1", "monitor/linear_top1", "monitor/exact_loss")
MONITOR = {"every_epochs": 2, "clips": 5, "neighbors": 3, "exact_clips": 3}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("videos"))


def recipe(videos: Path, targets: str = "cached", **changes):
    settings = {"optim__epochs": 3, "objective__cache__codes": "2bit"}
    return distil(videos, targets, **{**settings, "objective__monitor": MONITOR, **changes})


@pytest.fixture(scope="module")
def watched(videos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("watched")
    train(recipe(videos), folder)
    return folder


def told(folder: Path) -> list[dict]:
    return [line for line in metrics(folder) if NAMES[2] in line or NAMES[0] in line]


def test_values_are_logged_when_they_are_due_and_after_the_last_epoch(watched):
    lines = told(watched)
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 6), (2, 9)]
    board = EventAccumulator(str(watched / "tensorboard"))
    board.Reload()
    for name in NAMES:
        on_board = [(event.step, event.value) for event in board.Scalars(name)]
        assert on_board == [(line["step"], pytest.approx(line[name])) for line in lines]
    summary = json.loads((watched / "summary.json").read_text())
    assert summary["monitor"] == {
        "epoch": 2,
        "step": 9,
        **{name.removeprefix("monitor/"): lines[-1][name] for name in NAMES},
    }


def test_a_run_without_it_ends_with_the_same_bits_and_generators(videos, watched, tmp_path):
    train(recipe(videos, objective__monitor=None), tmp_path)
    own = [line for line in metrics(watched) if NAMES[0] not in line]
    (watched / "metrics.jsonl").rename(watched / "all.jsonl")
    (watched / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))
    try:
        assert_same_run(watched, tmp_path)
    finally:
        (watched / "all.jsonl").rename(watched / "metrics.jsonl")
    states = [
        load_checkpoint(latest_checkpoint(folder / "checkpoints")).state["random"]
        for folder in (watched, tmp_path)
    ]
    assert states[0] == states[1]
    assert json.loads((tmp_path / "summary.json").read_text())["monitor"] is None


# After a step of the first epoch, and after the step that the first check follows.
@pytest.mark.parametrize("step", [2, 6])
def test_a_stopped_run_goes_on_with_the_same_bits_and_values(
    videos, watched, tmp_path, monkeypatch, step
):
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Interrupted):
            train(recipe(videos), tmp_path)
    assert len(told(tmp_path)) == 0
    train(recipe(videos), tmp_path)
    assert_same_run(tmp_path, watched)


def test_the_exact_loss_is_that_of_the_formula_on_the_teachers_own_targets(videos, tmp_path):
    own = recipe(
        videos,
        optim__epochs=1,
        model__size={**SIZE, "layer_scale": 1.0},  # or dropping a path changes next to nothing
        objective__monitor={"clips": 4, "exact_clips": 6},  # all of val
        objective__loss_weights=(1.0, 2.0),
        objective__cache__folder=str(tmp_path / "cache"),
    )
    train(own, tmp_path / "run")
    student, teacher = build_student(own).eval(), build_teacher(own)
    student.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    losses = []
    for clip in read_list(own.data.val, seed=0):
        view = load_view(clip, 0, views=own.data.views, seed=own.objective.cache.seed)
        pixels = torch.from_numpy(view.pixels)[None]
        features = teacher(pixels)
        kept, _ = draw_kept(
            own.objective.mask,
            "visible",
            clip_ids=torch.tensor([clip.id]),
            view=torch.tensor([0]),
            seed=own.objective.cache.seed,
            grid=teacher.grid,
            attention=features.attention,
        )
        dropped = torch.ones(1, 1 + teacher.grid[0] * teacher.grid[1] * teacher.grid[2])
        seen = torch.cat([torch.zeros(1, 1, dtype=torch.int64), kept + 1], dim=1)
        mask = dropped.scatter(1, seen, 0).bool()
        with torch.no_grad():
            middle, pooled = student(pixels, mask)
        rows = features.middle[:, 0, seen[0]]
        distance = 2 - 2 * (middle[:, 0] * rows).sum(-1).mean()
        final = 2 - 2 * (pooled * features.pooled).sum(-1).mean()
        losses.append(distance + 2 * final)
    (line,) = told(tmp_path / "run")
    assert_close(line[NAMES[2]], torch.stack(losses).mean().item(), rtol=1e-5, atol=1e-6)


def test_live_targets_and_cached_codes_are_held_against_the_same_teacher(videos, watched, tmp_path):
    """The first check of two runs whose weights have not moved differs by no code."""
    still = {"optim__lr": 1e-12, "optim__min_lr": 0.0, "objective__monitor": {"clips": 4}}
    for targets in ("cached", "live", "hybrid"):
        train(recipe(videos, targets, **still), tmp_path / targets)
    lines = {targets: told(tmp_path / targets)[0] for targets in ("cached", "live", "hybrid")}
    for name in NAMES:
        assert lines["cached"][name] == pytest.approx(lines["live"][name], abs=1e-6)
        assert lines["cached"][name] == lines["hybrid"][name]
    losses = [metrics(tmp_path / targets)[0]["loss"] for targets in ("cached", "live")]
    assert abs(losses[0] - losses[1]) > 1e-4  # which codes of two bits do make differ


def test_students_that_learn_together_are_told_as_each_alone(videos, watched, tmp_path):
    other = recipe(videos, model__size={**SIZE, "width": 48})
    train_together([recipe(videos), other], [tmp_path / "one", tmp_path / "other"])
    assert_same_run(tmp_path / "one", watched)
    assert len(told(tmp_path / "other")) == 2


def test_two_processes_tell_what_one_does(videos, watched, tmp_path):
    path = write_recipe(recipe(videos), tmp_path / "tiny.yaml", tmp_path / "run")
    process = run_cli(path, ranks=2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    for ours, theirs in zip(told(tmp_path / "run"), told(watched), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_close(ours[name], theirs[name], **ROUNDING)


@pytest.mark.parametrize(
    ("changes", "left", "said"),
    [
        ({"data__val": None}, (), "tells nothing, for want of clips; set data.val.list=FILE"),
        ({"labels": False}, NAMES[2:], "without nearest neighbours and linear probe: "),
        (
            {"objective__cache__teacher_hash": True},
            NAMES[:2],
            "against the teacher itself: objective.teacher.weights is not set",
        ),
        ({"objective__monitor__exact_clips": 0}, NAMES[:2], None),
    ],
)
def test_what_cannot_be_told_is_left_out_and_said(
    videos, watched, tmp_path, caplog, changes, left, said
):
    changes = dict(changes)
    if not changes.pop("labels", True):
        bare = tmp_path / "bare.csv"
        bare.write_text("".join(f"{number}.mp4\n" for number in range(10, 16)))
        changes["data__val"] = {"list": str(bare), "prefix": str(videos)}
    if changes.get("objective__cache__teacher_hash"):
        changes["objective__cache__teacher_hash"] = teacher_hash(recipe(videos))
        changes["objective__teacher__random"] = False
    own = recipe(videos, optim__epochs=1, objective__monitor=dict(MONITOR), **changes)
    with caplog.at_level(logging.INFO, logger="distill"):
        train(own, tmp_path / "run")
    assert sorted(name for line in told(tmp_path / "run") for name in NAMES if name in line) == (
        sorted(left)
    )
    messages = [record.getMessage() for record in caplog.records]
    assert (said is None) == (not any(text.startswith("monitor: ") for text in messages))
    assert said is None or any(said in text for text in messages)


def test_clips_that_cannot_be_read_are_left_out(videos, watched, tmp_path):
    lists = {}
    for name, lines in (("train", range(10)), ("val", range(10, 16))):
        (tmp_path / f"{name}.csv").write_text(
            "".join(f"{number}.mp4,{number % 3}\n" for number in lines)
        )
        lists[f"data__{name}"] = {"list": str(tmp_path / f"{name}.csv"), "prefix": str(tmp_path)}
    for number in range(16):
        target = tmp_path / f"{number}.mp4"
        target.write_bytes((videos / f"{number}.mp4").read_bytes())
    monitor = {"clips": 10, "exact_clips": 6, "neighbors": 3}
    cache = {"objective__cache__folder": str(tmp_path / "cache")}
    changes = {"optim__epochs": 1, "objective__monitor": monitor, **cache, **lists}
    train(recipe(videos, **changes), tmp_path / "whole")
    (tmp_path / "12.mp4").write_bytes(b"no video")
    train(recipe(videos, **changes), tmp_path / "hurt")
    (whole,), (hurt,) = told(tmp_path / "whole"), told(tmp_path / "hurt")
    assert whole[NAMES[2]] != hurt[NAMES[2]]
    assert round(hurt[NAMES[0]] * 5 / 100, 3) in range(6)  # five clips are left


def test_neighbours_vote_as_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    train_x, val_x = rng.normal(size=(60, 5)), rng.normal(size=(40, 5))
    train_y, val_y = rng.integers(0, 4, 60), rng.integers(0, 4, 40)
    expected = KNeighborsClassifier(
        7, metric="cosine", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)
    ).fit(train_x, train_y)
    found = knn_top1(
        *(torch.tensor(x).float() for x in (train_x,)),
        torch.tensor(train_y),
        torch.tensor(val_x).float(),
        torch.tensor(val_y),
        neighbors=7,
    )
    assert found == pytest.approx(100 * expected.score(val_x, val_y))
    one = knn_top1(
        torch.tensor([[1.0, 0], [0, 1], [-1, 0]]),
        torch.tensor([0, 1, 2]),
        torch.tensor([[9.0, 1], [1, 9], [-1, 0.1], [1, 0]]),
        torch.tensor([0, 1, 2, 7]),  # a class that none of the others has
        neighbors=20,
    )
    assert one == 75.0


def test_a_linear_probe_finds_what_the_angle_does_not_tell():
    """Two classes of the same direction, by their length alone."""
    length = torch.cat([torch.linspace(1, 2, 20), torch.linspace(3, 4, 20)])
    vectors = length[:, None] * torch.tensor([[1.0, 1.0]])
    labels = (torch.arange(40) >= 20).long()
    args = (vectors[::2], labels[::2], vectors[1::2], labels[1::2])
    assert linear_top1(*args) == 100.0
    before = random_state()
    linear_top1(*args)
    assert random_state() == before


def test_a_check_leaves_modes_and_generators_as_they_were():
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm1d(2))
    module.train()
    before = random_state()
    with undisturbed(module):
        torch.rand(3), np.random.rand(3)
        assert not module[0].training
        module(torch.rand(4, 2))
    assert module.training and module[1].training
    assert random_state() == before
    assert_close(module[1].running_mean, torch.zeros(2))


def test_a_monitor_is_no_setting_that_keeps_a_run_from_going_on(videos):
    assert differences(recipe(videos), recipe(videos, objective__monitor=None)) == []
    assert differences(recipe(videos), recipe(videos, objective__monitor__clips=7)) == []


def test_a_val_list_that_is_missing_is_told_before_anything_runs(videos):
    gone = {"data__val": {"list": "gone.csv"}}
    (line,) = missing_inputs(recipe(videos, **gone), "train")
    assert line == "data.val.list: gone.csv: no such file; set data.val.list=PATH"
    assert missing_inputs(recipe(videos, objective__monitor=None, **gone), "train") == []
