"""Probes from cached features, and many settings of a probe side by side."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
from safetensors.torch import load_file
from tiny_runs import (
    CLASSES,
    SIZE,
    assert_same_run,
    classify,
    metrics,
    stop_after,
    write_recipe,
    write_video,
)
from torch.testing import assert_close
from typer.testing import CliRunner

from distill import features
from distill import recipe as schema
from distill.checkpoint import latest_checkpoint, load_checkpoint
from distill.cli import app
from distill.data.index import read_list
from distill.errors import StateError
from distill.evaluation.evaluate import evaluate_recipe
from distill.recipe_file import dump_recipe
from distill.run.interrupt import Interrupted
from distill.students.warmstart import file_sha256
from distill.train import train

TRAIN_CLIPS, VAL_CLIPS, TEST_CLIPS = 8, 4, 4
SWEEP = {"lrs": [1e-2, 3e-2], "weight_decays": [0.0, 0.5]}
HALF = {"rtol": 1e-2, "atol": 2e-3}  # of training with features rounded to half precision


@pytest.fixture(scope="module", autouse=True)
def here():
    """Clips come from workers in other processes' runs alone."""
    with pytest.MonkeyPatch.context() as patch:
        toys.load_here(patch)
        yield


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    first = 0
    for name, count in (("train", TRAIN_CLIPS), ("val", VAL_CLIPS), ("test", TEST_CLIPS)):
        numbers = range(first, first + count)
        for number in numbers:
            write_video(folder / f"{number}.mp4", number)
        lines = [f"{number}.mp4,{number % CLASSES}\n" for number in numbers]
        (folder / f"{name}.csv").write_text("".join(lines))
        first += count
    return folder


def probe(videos: Path, folder: Path | None = None, **changes) -> schema.Recipe:
    """Two epochs of two steps; `folder` is that of the features."""
    settings = {
        "data__test": {"list": str(videos / "test.csv")},
        "model": {"size": SIZE | {"init_std": 0.2, "layer_scale": 0.5}},
        "objective__trainable": "head",
        "optim__layer_decay": 1.0,
        "optim__clip_grad": None,
        "optim__eps": 1e-3,  # or AdamW makes steps of gradients that are rounding alone
        "optim__micro_batch": None,
        "evaluate": {"clips": 2, "crops": 1},
    }
    if folder is not None:
        settings["objective__features"] = {"folder": str(folder), "views": 2, "seed": 5}
    return classify(videos, **{**settings, **changes})


MODES = {
    "linear": {"model__head_drop_path": 0.3},
    "merge": {"objective__probe": "cls_avgN_proj", "objective__probe_norm": "BN"},
    "merge without pool": {
        "objective__probe": "cls_avg1",
        "objective__probe_norm": "kaiming_BN",
    },
    "attentive": {"objective__trainable": "pool"},
    "attentive mlp": {
        "objective__trainable": "pool",
        "objective__probe": "attentive_mlp",
        "data__augment": {"rand_augment": {}, "erase": {"probability": 1.0}},
    },
}


@pytest.mark.parametrize("mode", MODES)
def test_probes_from_features_and_from_videos_are_the_same(videos, tmp_path, mode):
    changes = MODES[mode]
    live = train(probe(videos, **changes), tmp_path / "live")
    cached = train(probe(videos, tmp_path / "features", **changes), tmp_path / "cached")
    curves = [
        [line["loss"] for line in metrics(tmp_path / name) if "loss" in line]
        for name in ("cached", "live")
    ]
    assert len(curves[0]) == 4
    assert_close(*curves, **HALF)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("cached", "live"))
    assert_close(one, other, **HALF)
    one, other = (load_file(tmp_path / name / "scores.safetensors") for name in ("cached", "live"))
    assert_close(one["logits"], other["logits"], **HALF)
    assert cached["evaluation"]["num_clips"] == live["evaluation"]["num_clips"] == TEST_CLIPS
    views = [
        json.loads((tmp_path / name / "evaluation.json").read_text())["manifest"]["views"]
        for name in ("cached", "live")
    ]
    assert views[0] == views[1]  # down to a hash of every pixel


@pytest.fixture(scope="module")
def built(videos, tmp_path_factory) -> tuple[Path, Path]:
    """The folder of features and that of a run."""
    folder = tmp_path_factory.mktemp("built")
    train(probe(videos, folder / "features"), folder / "run")
    return folder / "features", folder / "run"


def records(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.glob("shard-*"))}


def test_each_list_has_a_folder_with_its_views(built, videos):
    recipe = probe(videos, built[0])
    assert sorted(path.name for path in built[0].iterdir()) == ["test-2x1", "train", "val-1x1"]
    shelf = features.training_shelf(recipe)
    clips = read_list(recipe.data.train)
    cache, _ = features.open_features(recipe, None, shelf, clips, device=torch.device("cpu"))
    assert cache.rows.shape == (TRAIN_CLIPS, 2)
    arrays, info = cache.read(0)
    assert {name: (value.dtype.name, value.shape) for name, value in arrays.items()} == {
        "pixels_hash": ("int64", (1,)),
        "pooled": ("float16", (16,)),
    }
    assert (info["view"], info["seed"]) == (0, 5)
    assert features.features_identity(recipe, shelf) == cache_identity_of(built[0] / "train")


def cache_identity_of(folder: Path) -> dict:
    from distill.cache.index import found_identity
    from distill.cache.store import LocalFolder

    return found_identity(LocalFolder(folder))


def test_a_second_probe_needs_no_video_and_makes_nothing(built, videos, tmp_path):
    """Another learning rate, seed of training and decoder; the videos are gone."""
    before = {path: path.stat().st_mtime_ns for path in built[0].rglob("shard-*")}
    lists = {
        f"data__{name}": {"list": str(videos / f"{name}.csv"), "prefix": str(tmp_path)}
        for name in ("train", "val", "test")
    }
    recipe = probe(videos, built[0], optim__lr=1e-3, **lists)
    summary = train(recipe, tmp_path / "run")
    assert summary["evaluation"]["num_missing"] == 0
    assert {path: path.stat().st_mtime_ns for path in built[0].rglob("shard-*")} == before


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"run__seed": 6}, "model.weights (sha256) random, seed 5, 3 classes, the recipe asks for "
         "random, seed 6, 3 classes"),
        ({"objective__trainable": "pool"},
         "objective.trainable head, the recipe asks for pool"),
        ({"objective__probe": "cls_avg1"},
         "model.weights (sha256) random, seed 5, 3 classes, the recipe asks for random, seed 5, "
         "cls_avg1, 3 classes"),
        ({"data__views__flip": 0.0}, "data.views.flip 0.5, the recipe asks for 0.0"),
        ({"optim__precision": "bf16"}, "optim.precision fp32, the recipe asks for bf16"),
        ({"data__augment__erase": {}},
         'data.augment {"rand_augment": null, "erase": null, "repeats": 1}, the recipe asks for '
         '{"rand_augment": null, "erase": {"probability": 0.25}, "repeats": 1}'),
    ],
)  # fmt: skip
def test_features_of_other_settings_are_refused_by_name(built, videos, tmp_path, changes, line):
    with pytest.raises(StateError) as caught:
        train(probe(videos, built[0], **changes), tmp_path / "run")
    assert str(caught.value) == (
        f"features {built[0]}/train: made with {line}; put that back, or set "
        "objective.features.folder to a new folder"
    )


def test_features_know_the_weights_they_are_of(built, videos, tmp_path):
    weights = {"checkpoint": str(built[1] / "model.safetensors"), "sha256": "AB"}
    extra = {"checkpoint": "s2.pth", "sha256": "cd", "frames": 4}
    recipe = probe(videos, built[0], model__weights={**weights, "extra": extra})
    identity = features.features_identity(recipe, features.training_shelf(recipe))
    assert list(identity.items())[:4] == [
        ("model.weights (sha256)", "ab"),
        ("model.weights.frames", None),
        ("model.weights.extra (sha256)", "cd"),
        ("model.weights.extra.frames", 4),
    ]


KILLED = """
import os, signal, sys
from pathlib import Path
from distill import features
from distill.recipe_file import load_recipe
from distill.train import train

make, count = features.make_features, 0

def killed(*args):
    global count
    count += 1
    if count == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return make(*args)

features.MEGABYTE = 1  # a shard for every batch
features.make_features = killed
train(load_recipe(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_killed_build_keeps_what_is_committed_and_ends_with_the_same_bits(
    built, videos, tmp_path
):
    folder = tmp_path / "features"
    recipe = probe(videos, folder)
    section = recipe.objective.features.model_copy(update={"batch_size": 3})
    recipe = recipe.model_copy(
        update={"objective": recipe.objective.model_copy(update={"features": section})}
    )
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    command = [sys.executable, "-c", KILLED, tmp_path / "r.yaml", tmp_path / "run"]
    done = subprocess.run(command, check=False)
    assert done.returncode == -signal.SIGKILL
    committed = records(folder / "train")
    # Two queued batches at most are not written yet, and no batch is there in part.
    assert 1 <= len(committed) <= 3
    train(recipe, tmp_path / "run")
    assert committed.items() <= records(folder / "train").items()
    assert not list((folder / "train").glob("open-*"))
    whole = recipe.objective.features.model_copy(update={"folder": str(tmp_path / "whole")})
    whole = recipe.model_copy(
        update={"objective": recipe.objective.model_copy(update={"features": whole})}
    )
    train(whole, tmp_path / "again")
    assert_same_run(tmp_path / "run", tmp_path / "again")


def test_a_damaged_record_is_named_with_the_command_that_mends_it(videos, tmp_path):
    folder = tmp_path / "features"
    train(probe(videos, folder, optim__epochs=1), tmp_path / "run")
    (shard,) = (folder / "train").glob("shard-*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    with pytest.raises(StateError, match=r"is damaged .* run 'distill train' again to make its"):
        train(probe(videos, folder, optim__epochs=1), tmp_path / "again")


def test_features_too_large_for_half_precision_are_refused(videos, tmp_path, monkeypatch):
    def huge(model, clip, **settings):
        return {"pooled": torch.full((len(clip), 16), 1e5)}

    monkeypatch.setattr(features, "frozen_features", huge)
    with pytest.raises(StateError, match=r"^features: pooled of 0\.mp4 does not fit half precis"):
        train(probe(videos, tmp_path / "features"), tmp_path / "run")


def test_undecodable_clips_are_left_out_of_training_and_wrong_in_evaluation(videos, tmp_path):
    lists = {}
    for name in ("train", "test"):
        (tmp_path / f"{name}-broken.mp4").write_bytes(b"no video")
        text = (videos / f"{name}.csv").read_text() + f"{tmp_path}/{name}-broken.mp4,0\n"
        (tmp_path / f"{name}.csv").write_text(text)
        lists[f"data__{name}"] = {"list": str(tmp_path / f"{name}.csv"), "prefix": str(videos)}
    recipe = probe(videos, tmp_path / "f", data__max_quarantined=0.2, **lists)
    for folder in ("one", "two"):  # made, and found
        summary = train(recipe, tmp_path / folder)
        assert (summary["steps"], summary["quarantined"]) == (4, 1)
        assert summary["evaluation"]["num_missing"] == 1
        assert summary["evaluation"]["num_clips"] == TEST_CLIPS + 1
    strict = probe(videos, tmp_path / "g", data__max_quarantined=0.05, **lists)
    with pytest.raises(StateError):
        train(strict, tmp_path / "strict")


# Sweeps


def sweep(videos: Path, folder: Path | None, **changes) -> schema.Recipe:
    return probe(videos, folder, objective__sweep=SWEEP, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective__probe": "cls_avgN_proj", "objective__probe_norm": "BN"},
        {"objective__trainable": "pool"},
    ],
)
def test_a_sweep_ends_with_the_weights_of_separate_runs(videos, tmp_path, changes):
    """Dropout, batch statistics and schedules included, with features and without."""
    folder = tmp_path / "features"
    train(sweep(videos, folder, **changes), tmp_path / "sweep")
    train(sweep(videos, None, **changes), tmp_path / "live")
    last = latest_checkpoint(tmp_path / "sweep" / "checkpoints")
    found = load_checkpoint(last).weights
    live = load_checkpoint(latest_checkpoint(tmp_path / "live" / "checkpoints")).weights
    assert_close(found, live, **HALF)
    lines = [line for line in metrics(tmp_path / "sweep") if "loss" in line]
    for number, lr, decay in ((0, 1e-2, 0.0), (3, 3e-2, 0.5)):
        alone = probe(videos, folder, optim__lr=lr, optim__weight_decay=decay, **changes)
        train(alone, tmp_path / str(number))
        expected = load_file(tmp_path / str(number) / "model.safetensors")
        own = {name: value for name, value in found.items() if name.startswith(f"{number}.")}
        assert {name.split(".")[1] for name in own} >= {"head", "fc_norm"}
        for name, value in own.items():
            assert_close(value, expected[name.partition(".")[2]], rtol=0, atol=0, msg=name)
        losses = [line["loss"] for line in metrics(tmp_path / str(number)) if "loss" in line]
        assert losses == [line[f"loss_{number:02d}"] for line in lines]
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line[f"loss_{n:02d}"] for n in range(4)))


def test_the_setting_that_does_best_on_val_is_reported_on_test(videos, built, tmp_path):
    recipe = sweep(videos, built[0], optim__epochs=3)
    summary = train(recipe, tmp_path / "run")
    table = summary["sweep"]["settings"]
    assert [(row["lr"], row["weight_decay"]) for row in table] == [
        (lr, decay) for lr in SWEEP["lrs"] for decay in SWEEP["weight_decays"]
    ]
    best = max(row["best_top1"] for row in table)
    assert summary["best_on_val"]["top1"] == best == summary["sweep"]["chosen"]["best_top1"]
    chosen = summary["best_on_val"]["setting"]
    assert summary["sweep"]["chosen"] == table[int(chosen)]
    assert summary["best_on_val"]["epoch"] == table[int(chosen)]["best_epoch"]
    # The file is that setting's at that epoch, and whole: any evaluation takes it.
    epoch = int(summary["best_on_val"]["epoch"])
    step = latest_checkpoint(tmp_path / "run" / "checkpoints").with_name(
        f"step-{2 * (epoch + 1):08d}"
    )
    weights = load_checkpoint(step).weights
    own = load_file(tmp_path / "run" / "model.safetensors")
    assert_close(own["head.weight"], weights[f"{int(chosen)}.head.weight"], rtol=0, atol=0)
    again = evaluate_recipe(recipe, summary["weights"], folder=tmp_path)
    assert again["top1"] == summary["evaluation"]["top1"]
    assert (again["split"], summary["evaluation"]["split"]) == ("test", "test")
    one, other = (load_file(p / "scores.safetensors") for p in (tmp_path, tmp_path / "run"))
    assert_close(other["logits"], one["logits"], **HALF)


def test_the_best_is_chosen_over_settings_and_epochs(videos, built, tmp_path, monkeypatch):
    """Setting 2 is best in epoch 0, and no other reaches it later."""
    tops = iter([[10, 20, 90, 30], [40, 60, 50, 90]])

    def results(*args, **settings):
        return [{"top1": float(top), "top5": 100.0} for top in next(tops)]

    monkeypatch.setattr("distill.train.evaluate_settings", results)
    summary = train(sweep(videos, built[0]), tmp_path)
    assert (summary["best_on_val"]["setting"], summary["best_on_val"]["epoch"]) == (2, 0)
    chosen = {"lr": 3e-2, "weight_decay": 0.0, "top1": 50.0, "top5": 100.0}
    assert summary["sweep"]["chosen"] == {**chosen, "best_top1": 90.0, "best_epoch": 0}
    assert [row["best_epoch"] for row in summary["sweep"]["settings"]] == [1, 1, 0, 1]


def test_an_interrupted_sweep_ends_with_the_same_bits(videos, built, tmp_path, monkeypatch):
    recipe = sweep(videos, built[0])
    whole = train(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Interrupted):
            train(recipe, tmp_path / "again")
    again = train(recipe, tmp_path / "again")
    assert_same_run(tmp_path / "again", tmp_path / "whole")
    assert again["sweep"] == whole["sweep"]


STUDY = """
run: {folder: RUNS, log_steps: 1}
data:
  train: {list: VIDEOS/train.csv}
  val: {list: VIDEOS/val.csv}
  test: {list: VIDEOS/test.csv}
  views: {frames: 2, image_size: 28}
  workers: 1
model: {size: &size {width: 32, depth: 2, heads: 2, pooled_width: 16}}
optim: {lr: 1.0e-2, lr_per_batch: null, min_lr: 0, batch_size: 4, epochs: 1}
evaluate: {clips: 1, crops: 3}
stages:
  distilled:
    objective:
      kind: distill
      teacher: {size: *size, random: true, layers: 2, interval: 1.0}
      mask: {kind: random, ratio: 0.5}
      targets: live
  attentive:
    model: {weights: {checkpoint: 'stage:distilled'}}
    objective: &probe
      kind: classify
      num_classes: 3
      trainable: pool
      features: {folder: RUNS/features-attentive}
      sweep: {lrs: [1.0e-2, 1.0e-3], weight_decays: [0, 0.1]}
  linear:
    model: {weights: {checkpoint: 'stage:distilled'}}
    objective:
      kind: classify
      num_classes: 3
      trainable: head
      probe: cls_avgN_proj
      features: {folder: RUNS/features-linear}
      sweep: {lrs: [1.0e-2, 1.0e-3]}
"""


def test_a_distilled_student_is_probed_by_recipe_alone(videos, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.replace("VIDEOS", str(videos)).replace("RUNS", str(tmp_path / "runs")))
    done = CliRunner().invoke(app, ["train", str(path)])
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "runs" / "summary.json").read_text())
    assert [row["name"] for row in summary["rows"]] == ["attentive", "linear"]
    for stage, settings in (("attentive", 4), ("linear", 2)):
        found = summary["stages"][stage]
        assert len(found["sweep"]["settings"]) == settings
        assert found["evaluation"]["num_clips"] == TEST_CLIPS
        assert f"{stage}: settings, on val" in done.output
    assert done.output.count("chosen") == 2
    identity = cache_identity_of(tmp_path / "runs" / "features-linear" / "train")
    weights = tmp_path / "runs" / "distilled" / "model.safetensors"
    assert identity["model.weights (sha256)"] == file_sha256(weights)


def run_ranks(count: int, recipe: Path) -> None:
    """The processes that torchrun would start, without one more of torchrun's own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "distill", "train", str(recipe)],
            env={**os.environ, **{key: str(value) for key, value in given.items()}},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for given in ({**place, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count))
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, outputs


def test_two_processes_make_the_features_in_parts_and_sweep_as_one(videos, tmp_path):
    """With a merge that leaves `fc_norm` without a gradient."""
    kept = {"views": 2, "seed": 5, "batch_size": 3}  # so that either has some to make
    changes = {"objective__probe": "cls_avg1", "objective__fc_drop": 0.0}
    one, two = (
        sweep(videos, None, objective__features={"folder": str(tmp_path / name), **kept}, **changes)
        for name in ("f1", "f2")
    )
    found, expected = tmp_path / "two", tmp_path / "one"
    alone = train(one, expected)
    path = write_recipe(two, tmp_path / "r.yaml", found)
    run_ranks(2, path)
    one, other = (
        load_checkpoint(latest_checkpoint(folder / "checkpoints")).weights
        for folder in (found, expected)
    )
    assert_close(one, other, **HALF)
    together = json.loads((found / "summary.json").read_text())
    assert together["sweep"]["settings"] == alone["sweep"]["settings"]
    assert together["evaluation"]["num_clips"] == TEST_CLIPS
    views = [json.loads((f / "evaluation.json").read_text())["manifest"] for f in (found, expected)]
    assert views[0]["views"] == views[1]["views"]
