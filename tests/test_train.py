"""The loop on real videos: what a run leaves, and that interruptions do not show in the result."""

import fcntl
import json
import math
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import (
    CLASSES,
    VAL_CLIPS,
    assert_same_run,
    classify,
    distil,
    metrics,
    run_cli,
    stop_after,
    wait_for_step,
    write_clips,
    write_recipe,
)
from torch.testing import assert_close

import distill.train
from distill.checkpoint import latest_checkpoint, load_checkpoint
from distill.data.index import read_list
from distill.engines.plain import Engine, seed_generators
from distill.errors import InputError, StateError
from distill.objective import ClassifyObjective
from distill.recipe_file import differences, load_recipe
from distill.run.interrupt import Interrupted
from distill.train import train


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def finished(videos, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("finished")
    return folder, train(classify(videos), folder)


def test_a_run_leaves_weights_metrics_and_a_summary(finished, videos):
    folder, summary = finished
    assert summary == json.loads((folder / "summary.json").read_text())
    assert (summary["name"], summary["objective"], summary["steps"]) == ("tiny", "classify", 6)
    weights = load_file(folder / "model.safetensors")
    assert summary["parameters"] == sum(tensor.numel() for tensor in weights.values())
    with safe_open(folder / "model.safetensors", "pt") as file:
        described = file.metadata()
    assert (described["recipe"], described["frames"]) == ("tiny", "2")
    assert (described["num_classes"], json.loads(described["size"])["width"]) == ("3", 32)
    assert summary["evaluation"]["split"] == "test"
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["top1"] == summary["evaluation"]["top1"]
    assert load_file(folder / "scores.safetensors")["logits"].shape == (2 * VAL_CLIPS, CLASSES)
    assert differences(load_recipe(folder / "recipe.yaml"), classify(videos)) == []


def test_metrics_hold_every_step_and_follow_the_schedule(finished):
    folder, summary = finished
    lines = metrics(folder)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in steps] == [0, 0, 0, 1, 1, 1]
    # Two steps of warm-up from 0 to the peak, then four of the cosine from the peak.
    cosine = [1e-5 + (2e-2 - 1e-5) * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert [line["lr"] for line in steps] == pytest.approx([0.0, 2e-2, *cosine])
    for line in steps:
        assert line["clips_per_second"] > 0
        assert 0 <= line["data_wait"] <= 1.01
        assert line["tflops"] > 0
        assert line["grad_norm"] > 0
    left = [line["seconds_left"] for line in steps]
    assert min(left[:-1]) > 0 == left[-1]
    checks = [line for line in lines if "val/top1" in line]
    assert [(line["step"], line["epoch"]) for line in checks] == [(3, 0), (6, 1)]
    assert summary["last"]["loss"] == steps[-1]["loss"]


def test_tensorboard_holds_the_same(finished):
    folder, _ = finished
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    rates = ("clips_per_second", "data_wait", "tflops", "seconds_left")
    for name in ("loss", "lr", "grad_norm", *rates):
        events = [(event.step, event.value) for event in board.Scalars(f"train/{name}")]
        expected = [(line["step"], line[name]) for line in metrics(folder) if name in line]
        assert [step for step, _ in events] == [step for step, _ in expected]
        assert_close([value for _, value in events], [value for _, value in expected])
    assert [event.step for event in board.Scalars("val/top1")] == [3, 6]


def test_training_learns_what_tells_the_classes_apart(videos, tmp_path):
    recipe = classify(
        videos,
        optim__epochs=6,
        optim__batch_size=2,
        optim__lr=5e-3,
        model__drop_path=0.0,
        objective__fc_drop=0.0,
        objective__label_smoothing=0.0,
        evaluate__every_epochs=0,
        run__log_steps=30,
    )
    summary = train(recipe, tmp_path)
    assert summary["last"]["loss"] < 0.6 < math.log(CLASSES)
    assert summary["evaluation"]["top1"] == 100.0


def test_a_finished_run_only_gives_its_summary(finished, videos, monkeypatch):
    folder, summary = finished
    monkeypatch.setattr(distill.train, "build_job", None)  # would fail if it were called
    assert train(classify(videos), folder) == summary


@pytest.mark.parametrize("step", [2, 3, 6])
def test_a_run_stopped_after_any_step_ends_with_the_same_bits(
    finished, videos, tmp_path, monkeypatch, step
):
    with monkeypatch.context() as patch:
        # An evaluation looks for a stop after each of its batches too, hence one more.
        stop_after(patch, step if step < 4 else step + 1)
        with pytest.raises(Interrupted) as caught:
            train(classify(videos), tmp_path)
    assert caught.value.code == 143
    assert load_checkpoint(latest_checkpoint(tmp_path / "checkpoints")).state["step"] == step
    assert not (tmp_path / "summary.json").exists()
    train(classify(videos), tmp_path)
    assert_same_run(tmp_path, finished[0])


def test_no_step_depends_on_what_a_generator_has_drawn(finished, videos, tmp_path, monkeypatch):
    """So no checkpoint needs those of processes beside the first, and any number goes on alike."""
    step = Engine.step

    def after_other_draws(self, *arguments, **settings):
        seed_generators(1000 + settings["step"])
        return step(self, *arguments, **settings)

    monkeypatch.setattr(Engine, "step", after_other_draws)
    train(classify(videos), tmp_path)
    assert_same_run(tmp_path, finished[0])


def test_a_run_stopped_in_an_evaluation_evaluates_again(finished, videos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 4)  # three steps, then the first batch of views
        with pytest.raises(Interrupted):
            train(classify(videos), tmp_path)
    position = load_checkpoint(latest_checkpoint(tmp_path / "checkpoints")).state["position"]
    assert (position["epoch"], position["step_in_epoch"], position["best"]) == (0, 3, {})
    train(classify(videos), tmp_path)
    assert_same_run(tmp_path, finished[0])


def test_real_signals_and_kill_9_do_not_show_in_the_result(videos, tmp_path):
    recipe = classify(
        videos,
        optim__batch_size=1,  # ten steps an epoch
        optim__epochs=2,
        optim__micro_batch=None,
        run__save_minutes=1e-9,  # every step, for kill -9 leaves no time to save
    )
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    process = run_cli(write_recipe(recipe, tmp_path / "straight.yaml", straight))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output

    path = write_recipe(recipe, tmp_path / "broken.yaml", broken)
    stops = [(2, signal.SIGTERM, 143), (5, signal.SIGKILL, -9), (13, signal.SIGINT, 130)]
    stopped_at = []
    for step, signum, code in stops:
        process = run_cli(path)
        wait_for_step(broken, step, process)
        process.send_signal(signum)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == code, output
        saved = load_checkpoint(latest_checkpoint(broken / "checkpoints")).state["step"]
        if signum != signal.SIGKILL:
            assert f"saved after step {saved}" in re.sub(r"\s+", " ", output)
        stopped_at.append(saved)
    assert all(step % 10 for step in stopped_at), f"none in mid-epoch: {stopped_at}"
    process = run_cli(path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"goes on after step {stopped_at[-1]}" in re.sub(r"\s+", " ", output)
    assert_same_run(broken, straight)


def test_the_best_epoch_outlives_a_resume(videos, tmp_path, monkeypatch):
    """A worse epoch after a resume does not replace the best one, nor does pruning drop it."""
    tops, stops = iter([40.0, 90.0, 50.0]), iter([False, False, True, False])
    real = distill.train.evaluate

    def scripted(model, recipe, *, split, **settings):
        if split == "test":
            return real(model, recipe, split=split, **settings)
        if next(stops):
            raise Interrupted(143)
        return {"top1": next(tops), "top5": 100.0}

    monkeypatch.setattr(distill.train, "evaluate", scripted)
    recipe = classify(videos, optim__epochs=3, run__keep_checkpoints=1)
    with pytest.raises(Interrupted):
        train(recipe, tmp_path)
    summary = train(recipe, tmp_path)
    best = summary["best_on_val"]
    assert (best["top1"], best["epoch"], best["step"]) == (90.0, 1, 6)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000006", "step-00000009"]
    assert best["weights"] == str(tmp_path / "checkpoints/step-00000006/model.safetensors")
    load_file(best["weights"])


def test_another_recipe_is_refused_and_harmless_settings_are_not(videos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            train(classify(videos), tmp_path)
    with pytest.raises(StateError) as caught:
        train(classify(videos, optim__lr=1e-3), tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: was started with other settings (optim.lr: ")
    changed = {"run__log_steps": 3, "run__keep_checkpoints": 5, "data__workers": 2}
    train(classify(videos, **changed), tmp_path)


def test_a_finished_run_refuses_another_recipe_too(finished, videos):
    with pytest.raises(StateError, match=r"other settings \(run\.seed: 5, now 6\)"):
        train(classify(videos, run__seed=6), finished[0])


def test_before_the_first_checkpoint_any_recipe_may_come(videos, tmp_path):
    wrong = classify(videos, data__train={"list": str(videos / "train.csv"), "prefix": "nowhere"})
    with pytest.raises(InputError, match=r"nowhere/0\.mp4 is not there.*set the list's `prefix`"):
        train(wrong, tmp_path)
    assert train(classify(videos, optim__epochs=0), tmp_path)["steps"] == 0


def test_a_damaged_checkpoint_is_named_and_left_alone(videos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            train(classify(videos), tmp_path)
    path = latest_checkpoint(tmp_path / "checkpoints") / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(StateError, match=re.escape(f"{path}: damaged checkpoint")):
        train(classify(videos), tmp_path)
    assert path.read_bytes() == data


def test_two_processes_do_not_train_in_one_folder(videos, tmp_path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StateError, match="another process is training there"):
            train(classify(videos), tmp_path)


def test_a_non_finite_loss_stops_with_step_and_clip_names(videos, tmp_path, monkeypatch):
    forward, seen = ClassifyObjective.forward, []

    def poisoned(self, batch):
        outputs = forward(self, batch)
        seen.append(batch["clip_id"].tolist())
        scale = math.nan if len(seen) > 3 else 1.0  # the second step's second micro-batch
        return {**outputs, "loss": outputs["loss"] * scale}

    monkeypatch.setattr(ClassifyObjective, "forward", poisoned)
    recipe = classify(videos, run__save_minutes=1e-9)
    with pytest.raises(StateError) as caught:
        train(recipe, tmp_path)
    names = {clip.id: clip.name for clip in read_list(recipe.data.train)}
    clips = [names[clip_id] for clip_id in seen[2] + seen[3]]
    assert str(caught.value).startswith(
        f"{tmp_path}: step 2: loss nan, gradient norm nan; stopped before the weights changed; "
        f"clips: {', '.join(clips)};"
    )
    assert json.loads((tmp_path / "non_finite.json").read_text()) == {"step": 2, "clips": clips}
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step-00000001"


def test_undecodable_clips_are_left_out_counted_and_listed(videos, tmp_path, caplog):
    lines = (videos / "train.csv").read_text()
    (tmp_path / "broken.mp4").write_bytes(b"this is text")
    (tmp_path / "train.csv").write_text(lines + f"{tmp_path}/broken.mp4,0\n")
    section = {"list": str(tmp_path / "train.csv"), "prefix": str(videos)}
    recipe = classify(videos, data__train=section, data__max_quarantined=0.2)
    summary = train(recipe, tmp_path / "run")
    assert (summary["steps"], summary["quarantined"]) == (6, 1)
    assert "went on without 1 clips that could not be read" in caplog.text
    assert "broken.mp4" in (tmp_path / "run" / "quarantine.jsonl").read_text()
    strict = classify(videos, data__train=section, data__max_quarantined=0.05)
    with pytest.raises(StateError):
        train(strict, tmp_path / "strict")
    # The line is taken out of the list, and its entry is still there.
    (tmp_path / "train.csv").write_text(lines)
    assert train(strict, tmp_path / "strict")["quarantined"] == 0
    assert "broken.mp4" in (tmp_path / "strict" / "quarantine.jsonl").read_text()


def test_no_epochs_evaluates_the_weights_as_they_are(finished, videos, tmp_path):
    weights = {"checkpoint": str(finished[0] / "model.safetensors"), "head": "keep"}
    summary = train(classify(videos, optim__epochs=0, model__weights=weights), tmp_path)
    assert summary["steps"] == 0
    assert summary["evaluation"]["top1"] == finished[1]["evaluation"]["top1"]
    one, other = (
        load_file(tmp_path / "scores.safetensors"),
        load_file(finished[0] / "scores.safetensors"),
    )
    assert_close(one["logits"], other["logits"], rtol=0, atol=0)


def test_no_epochs_need_neither_the_training_list_nor_val(finished, videos, tmp_path):
    weights = {"checkpoint": str(finished[0] / "model.safetensors"), "head": "keep"}
    gone = {"list": str(tmp_path / "gone.csv")}
    lists = {"data__train": {"list": None}, "data__val": gone, "model__weights": weights}
    summary = train(classify(videos, optim__epochs=0, **lists), tmp_path / "run")
    assert summary["evaluation"]["top1"] == finished[1]["evaluation"]["top1"]
    assert (summary["train_seconds"], summary["quarantined"]) == (0.0, 0)
    with pytest.raises(InputError, match=r"gone\.csv: no such list file"):
        train(classify(videos, optim__epochs=0, data__test=gone), tmp_path / "other")


def test_without_lists_to_evaluate_on_a_run_only_trains(videos, tmp_path):
    summary = train(classify(videos, data__val=None, data__test=None, optim__epochs=1), tmp_path)
    assert (summary["steps"], summary["evaluation"]) == (3, None)


def test_a_missing_evaluation_list_fails_before_training(videos, tmp_path):
    with pytest.raises(InputError, match=r"there is no data\.test"):
        train(classify(videos, data__test=None), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("trainable", ["head", "pool"])
def test_probing_leaves_the_backbone_as_it_was(finished, videos, tmp_path, trainable):
    start = finished[0] / "model.safetensors"
    recipe = classify(
        videos,
        model__weights={"checkpoint": str(start), "head": "reset"},
        objective__trainable=trainable,
        optim__epochs=1,
    )
    train(recipe, tmp_path)
    before, after = load_file(start), load_file(tmp_path / "model.safetensors")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head", "fc_norm"} | ({"clip_projector"} if trainable == "pool" else set())


@pytest.fixture(scope="module")
def distilled(videos, tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for targets in ("live", "cached"):
        folders[targets] = tmp_path_factory.mktemp(targets)
        summary = train(distil(videos, targets), folders[targets])
        assert (summary["objective"], summary["steps"]) == ("distill", 6)
        assert summary["evaluation"] is None
    return folders


def test_distilling_logs_every_layer_and_learns(distilled):
    lines = [line for line in metrics(distilled["cached"]) if "loss" in line]
    assert {"middle", "pooled", "layer_00", "layer_01", "grad_norm"} <= lines[0].keys()
    for line in lines:
        assert line["loss"] == pytest.approx(line["middle"] + line["pooled"])
        assert line["middle"] == pytest.approx((line["layer_00"] + line["layer_01"]) / 2)
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]


def test_live_and_cached_targets_give_one_loss_curve(distilled):
    curves = {
        targets: [line["loss"] for line in metrics(folder) if "loss" in line]
        for targets, folder in distilled.items()
    }
    assert len(curves["live"]) == 6
    assert_close(curves["cached"], curves["live"], rtol=2e-3, atol=0)


@pytest.mark.parametrize("targets", ["cached", "live"])
def test_a_distilling_run_resumes_with_the_same_bits(
    videos, distilled, tmp_path, monkeypatch, targets
):
    recipe = distil(videos, targets)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted):
            train(recipe, tmp_path)
    train(recipe, tmp_path)
    assert_same_run(tmp_path, distilled[targets])
