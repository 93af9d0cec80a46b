"""Training shared out among processes: the loss curve, weights and scores of one process."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    TRAIN_CLIPS,
    assert_alike,
    classify,
    distil,
    metrics,
    run_cli,
    torchrun,
    wait_for_step,
    write_clips,
    write_recipe,
)
from torch.testing import assert_close

from distill import recipe as schema
from distill.checkpoint import latest_checkpoint, load_checkpoint
from distill.data.index import read_list
from distill.data.load import ClipBatches, Quarantine
from distill.dist import Part
from distill.train import train

NAN_IN_RANK_1 = """\
import os

from distill import objective

forward = objective.ClassifyObjective.forward
seen = []

def poisoned(self, batch):
    losses = forward(self, batch)
    seen.append(batch)
    if os.environ["RANK"] == "1" and len(seen) == 2:
        losses["loss"] = losses["loss"] * float("nan")
    return losses

objective.ClassifyObjective.forward = poisoned

if __name__ == "__main__":
    from distill.cli import main
    main()
"""


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("videos"))


def finetuning(videos: Path, **changes) -> schema.Recipe:
    """Three steps an epoch, the last of two clips: fewer than four processes."""
    # AdamW would make steps of the rounding that is all of some gradients, as of keys' biases.
    changes = {"optim__micro_batch": 1, "optim__ema": 0.5, "optim__eps": 1e-4, **changes}
    return classify(videos, **changes)


@pytest.fixture(scope="module")
def alone(videos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    train(finetuning(videos), folder)
    return folder


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_processes_train_as_one(videos, alone, tmp_path, ranks):
    folder = tmp_path / "run"
    output = finish(
        run_cli(write_recipe(finetuning(videos), tmp_path / "r.yaml", folder), ranks=ranks)
    )
    assert output.count("summary.json holds the results") == 1
    assert_alike(folder, alone)
    ours, theirs = (json.loads((place / "summary.json").read_text()) for place in (folder, alone))
    for about, other in ((ours, theirs), (ours["ema"], theirs["ema"])):
        assert about["evaluation"]["top1"] == other["evaluation"]["top1"]
        assert about["evaluation"]["num_clips"] == other["evaluation"]["num_clips"]
    assert ours["steps"] == theirs["steps"] == 6


def test_a_stopped_job_goes_on_with_another_number_of_processes(videos, tmp_path):
    """Distilled from a cache that two processes build; SIGTERM; the rest by one process."""
    changes = {
        "optim__batch_size": 2,
        "optim__epochs": 4,
        "optim__eps": 1e-4,
        "optim__micro_batch": None,
        "objective__cache__folder": "",
    }
    runs = {}
    for name in ("whole", "parts"):
        changes["objective__cache__folder"] = str(tmp_path / f"cache-{name}")
        runs[name] = distil(videos, "cached", **changes)
    train(runs["whole"], tmp_path / "whole")

    path = write_recipe(runs["parts"], tmp_path / "parts.yaml", tmp_path / "parts")
    process = run_cli(path, ranks=2)
    wait_for_step(tmp_path / "parts", 3, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    saved = load_checkpoint(latest_checkpoint(tmp_path / "parts/checkpoints")).state["step"]
    assert 3 <= saved < 20
    assert f"saved after step {saved}" in re.sub(r"\s+", " ", output)
    assert f"goes on after step {saved}" in re.sub(r"\s+", " ", finish(run_cli(path)))
    assert_alike(tmp_path / "parts", tmp_path / "whole")


def test_a_loss_that_is_no_number_in_one_process_stops_all(videos, tmp_path):
    (tmp_path / "main.py").write_text(NAN_IN_RANK_1)
    recipe = finetuning(videos, optim__micro_batch=None, optim__ema=None)
    path = write_recipe(recipe, tmp_path / "r.yaml", tmp_path / "run")
    done = subprocess.run(
        [sys.executable, *torchrun(2), str(tmp_path / "main.py"), "train", str(path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    told = re.sub(r"\s+", " ", done.stderr)
    assert re.search(r"rank [01]: \S+/run: step 2: loss nan", told)
    logs = [path.read_text() for path in (tmp_path / "run").glob("log*.txt")]
    assert any(f" ERROR {tmp_path}/run: step 2: loss nan" in text for text in logs)
    clips = json.loads((tmp_path / "run/non_finite.json").read_text())
    assert clips["step"] == 2
    assert len(set(clips["clips"])) == 4
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1]
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_clip_is_in_one_share_of_an_epoch(videos, ranks):
    data = classify(videos).data
    clips = read_list(data.train)

    def batches(part: Part) -> list[dict]:
        quarantine = Quarantine(None, total=len(clips), max_share=0.0)
        loader = ClipBatches(
            clips, data, batch_size=4, seed=0, views_per_clip=None, quarantine=quarantine, part=part
        )
        return list(loader.epoch(1))

    whole = batches(Part())
    shares = [batches(Part(rank, ranks)) for rank in range(ranks)]
    seen = []
    for batch, *parts in zip(whole, *shares, strict=True):
        own = [part for part in parts if "is_spare" not in part]
        assert len(own) == min(ranks, len(batch["clip_id"]))
        for name in ("clip_id", "label", "pixels"):
            joined = torch.cat([part[name] for part in own])
            assert_close(joined, batch[name], rtol=0, atol=0)
        seen += torch.cat([part["clip_id"] for part in own]).tolist()
    assert sorted(seen) == sorted(clip.id for clip in clips)
    assert len(seen) == TRAIN_CLIPS
