"""Every engine takes the steps of plain torch and leaves what any other goes on from."""

import copy
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import engines
import pytest
import steps
import torch
from tiny_runs import (
    assert_alike,
    classify,
    distil,
    metrics,
    torchrun,
    write_clips,
    write_recipe,
)
from torch.testing import assert_close

from distill.engines.plain import LOSS_SCALE_WINDOW, reproducible
from distill.engines.zero import HYSTERESIS, LossScale
from distill.errors import InputError
from distill.recipe_file import load_recipe
from distill.train import train

JOB = Path(__file__).with_name("engines_job.py")
# How far weights and the like may be from those of plain torch, as a share of all that training
# has moved them: rounding. In half precision ZeRO's weights themselves are rounded.
NEAR = {"fp32": 1e-4, "fp16": 0.1, "bf16": 0.25}
LOSSES = {
    "fp32": {"rtol": 1e-4, "atol": 1e-5},
    "fp16": {"rtol": 0.01, "atol": 0.01},
    "bf16": {"rtol": 0.05, "atol": 0.01},
}


def precision(case: str) -> str:
    return engines.CASES[case][1].get("precision", "fp32")


MONITOR = {"every_epochs": 1, "clips": 6, "exact_clips": 3}
OPTIM = {"optim__ema": 0.5, "optim__eps": 1e-4, "optim__micro_batch": 1}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def recipe(videos):
    return classify(videos, **OPTIM)


@pytest.fixture(scope="module")
def distillation(videos):
    """From a cache, monitored at the end of both epochs."""
    return distil(videos, "cached", objective__monitor=MONITOR, **OPTIM)


def run_job(start: list[str], folder: Path, cases: Iterable[str]) -> Path:
    done = subprocess.run(
        [sys.executable, *start, str(JOB), str(folder), *cases],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def together(recipe, distillation, tmp_path_factory) -> Path:
    """The folder of what two processes have found."""
    folder = tmp_path_factory.mktemp("together")
    write_recipe(distillation, folder / "d.yaml", folder / "distilled")
    write_recipe(recipe, folder / "r.yaml", folder / "chain")
    return run_job(torchrun(2), folder, engines.TOGETHER)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The folder of what DeepSpeed has found in one process."""
    return run_job([], tmp_path_factory.mktemp("one"), engines.ALONE)


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[dict, dict]]:
    """What plain torch finds in one process, and the weights it began with, for each case."""
    with reproducible(engines.CPU, seed=0):
        found = {
            case: (engines.run_case(case), copy.deepcopy(engines.build(case).weights()))
            for case in ("ddp", "ddp-bf16", "ddp-fp16", "ddp-distill")
        }
    return {case: found["-".join(["ddp", *case.split("-")[1:]])] for case in engines.CASES}


def results(folder: Path, case: str) -> dict:
    return torch.load(folder / f"{case}.pt", weights_only=True)


def assert_trained_alike(found: dict, expected: dict, start: dict, *, of: str) -> None:
    columns = [0, 1, 2] if of == "fp32" else [0, 2]  # a tie of two classes may turn over
    losses, others = (side["losses"][""][:, columns] for side in (found, expected))
    assert_close(losses, others, **LOSSES[of])
    for kind in ("weights", "ema", "moments"):
        assert found[kind].keys() == expected[kind].keys()
        moved, apart = [], []
        for name, value in expected[kind].items():
            if name.endswith("/step"):
                assert_close(found[kind][name], value, rtol=0, atol=0)
                continue
            assert found[kind][name].dtype == value.dtype == torch.float32
            moved.append((value - start.get(name, torch.zeros(()))).norm())
            apart.append((found[kind][name] - value).norm())
        moved, apart = torch.stack(moved).norm(), torch.stack(apart).norm()
        assert float(moved) > 0.01
        assert float(apart / moved) < NEAR[of], (kind, float(apart / moved))


@pytest.mark.parametrize("case", engines.TOGETHER)
def test_two_processes_take_the_steps_of_one(case, together, alone):
    """Uneven shares, spare processes, micro-batches, clipping and averages included."""
    assert_trained_alike(results(together, case), *alone[case], of=precision(case))
    norms = alone[case][0]["losses"][""][:, 2]
    if not engines.is_distilling(case):
        assert float(norms.min()) < 4.0 < float(norms.max())  # some steps were clipped


@pytest.mark.parametrize("case", engines.ALONE)
def test_deepspeed_alone_takes_the_steps_of_plain_torch(case, one, alone):
    assert_trained_alike(results(one, case), *alone[case], of=precision(case))


@pytest.mark.parametrize("case", engines.TOGETHER)
def test_what_goes_on_from_the_middle_ends_with_the_same_bits(case, together, one):
    folders = (together, one) if case in engines.ALONE else (together,)
    for folder in folders:
        assert bool(results(folder, case)["told"]["goes on"])


@pytest.mark.parametrize("case", engines.TOGETHER)
def test_a_loss_that_is_no_number_in_one_process_stops_all_before_the_step(case, together):
    told = results(together, case)["told"]
    ids = steps.CLIPS.tolist() if engines.is_distilling(case) else range(100, 107)
    line = f"step 77, clips {sorted(ids)}"
    assert line in told and bool(told[line])


@pytest.mark.parametrize("case", engines.TOGETHER)
def test_models_to_evaluate_have_the_weights_that_are_saved(case, together):
    found = results(together, case)
    for model, saved in (("trained", "weights"), ("averaged", "ema")):
        assert found[model].keys() == found[saved].keys()
        for name, value in found[saved].items():
            assert_close(found[model][name], value, rtol=0, atol=0)


@pytest.fixture(scope="module")
def distilled(together, distillation, tmp_path_factory) -> Path:
    """The run of one process with plain torch, from the cache that the two have made."""
    folder = tmp_path_factory.mktemp("distilled")
    train(distillation, folder)
    return folder


@pytest.mark.parametrize("engine", engines.DISTILLED)
def test_a_distillation_by_recipe_is_that_of_one_process(engine, together, distilled):
    """Weights, averages, and what is told of the student at the end of each epoch."""
    run = together / "distilled" / engine
    assert_alike(run, distilled)
    names = ("watched/layer_01_mean", "monitor/knn_top1", "monitor/linear_top1")
    for name in (*names, "monitor/exact_loss"):
        told = [(line["epoch"], line["step"]) for line in metrics(run) if name in line]
        assert told == [(0, 3), (1, 6)]
    looks, summaries = (
        [json.loads((folder / name).read_text()) for folder in (run, distilled)]
        for name in ("watched/watched.json", "summary.json")
    )
    assert [clip["name"] for clip in looks[0]["clips"]] == [
        clip["name"] for clip in looks[1]["clips"]
    ]
    assert summaries[0]["monitor"] == pytest.approx(summaries[1]["monitor"], rel=1e-3)


def test_a_run_goes_on_with_other_engines(recipe, together, tmp_path):
    """Stopped in the middle of epochs; the last step and evaluations by DeepSpeed's launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port]
    train_it = ["--no_local_rank", "--module", "distill", "train", str(together / "r.yaml")]
    done = subprocess.run(
        [sys.executable, *launcher, *train_it, "engine.kind=deepspeed"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "goes on after step 5" in " ".join((done.stdout + done.stderr).split())
    train(recipe, tmp_path / "alone")
    assert_alike(together / "chain", tmp_path / "alone")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["model.size=null", "model.timm=vit_tiny_patch16_224", "engine.kind=fsdp"],
         "engine.kind=fsdp: must be ddp for one of timm's models, as fsdp needs blocks"),
        (["objective.trainable=head", "objective.sweep.lrs=[0.1]", "engine.kind=fsdp"],
         "engine.kind=fsdp: must be ddp for objective.sweep, whose probes are small"),
        (["engine.kind=deepspeed", "engine.offload_weights=true"],
         "engine.offload_weights=true: needs engine.stage 3 or more, which have shards"),
        (["engine.kind=deepspeed", "engine.stage=0", "engine.offload_optimizer=true"],
         "engine.offload_optimizer=true: needs engine.stage 1 or more, which have shards"),
        (["engine.kind=deepspeed", "optim.precision=bf16", "objective.probe_norm=BN"],
         "objective.probe_norm=BN: must be LN for ZeRO in bf16, which would round running "
         "statistics; set optim.precision=fp32, or engine.kind=ddp"),
    ],
)  # fmt: skip
def test_what_an_engine_cannot_do_is_told_in_a_line(recipe, tmp_path, overrides, line):
    path = write_recipe(recipe, tmp_path / "r.yaml", tmp_path / "run")
    with pytest.raises(InputError) as error:
        load_recipe(path, overrides)
    assert line in str(error.value).splitlines()


def test_a_loss_scale_goes_on_from_any_count_of_good_steps(monkeypatch):
    """As DeepSpeed's would have; torch's takes the count too, which stays below its window."""
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    monkeypatch.setattr(loss_scaler, "dist", SimpleNamespace(get_rank=lambda: 1))  # who logs it
    settings = {
        "init_scale": 2.0**4,
        "scale_window": LOSS_SCALE_WINDOW,
        "min_scale": 1,
        "delayed_shift": HYSTERESIS,
        "consecutive_hysteresis": False,
        "raise_error_at_min_scale": False,
    }
    overflows = [False] * 1100 + [True] * 3 + [False] * 900
    first = DynamicLossScaler(**settings)
    for number, is_overflow in enumerate(overflows):
        if number in (0, 3, 499, 500, 501, 1001, 1102, 1103, 1603, 1604):
            one, other = DynamicLossScaler(**settings), copy.copy(first)
            LossScale(one).load_state_dict(LossScale(first).state_dict())
            for later in overflows[number:]:
                one.update_scale(later)
                other.update_scale(later)
                assert (one.cur_scale, one.cur_hysteresis) == (
                    other.cur_scale,
                    other.cur_hysteresis,
                )
            assert LossScale(first).state_dict()["_growth_tracker"] < LOSS_SCALE_WINDOW
        first.update_scale(is_overflow)
    assert first.cur_scale == 2.0**5  # doubled twice, halved twice, doubled
