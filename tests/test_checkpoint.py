"""Checkpoints are whole or not there, damage is named, and random states come back exactly."""

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import safetensors
import torch
from torch.testing import assert_close

from distill.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    random_state,
    remove_partial,
    restore_random_state,
    save_checkpoint,
    step_folder,
)
from distill.errors import StateError


def make_checkpoint(step: int, **state) -> Checkpoint:
    rng = torch.Generator().manual_seed(step)
    return Checkpoint(
        weights={"a": torch.randn(257, 3, generator=rng), "n": torch.tensor(7)},
        optimizer={"a/exp_avg": torch.randn(257, 3, generator=rng)},
        state={"step": step, "best": 0.1 + 0.2, **state},
    )


def save(folder, step, **state):
    return save_checkpoint(folder, make_checkpoint(step, **state), metadata={"frames": "8"})


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    path = save(tmp_path, 12)
    expected, found = make_checkpoint(12), load_checkpoint(path)
    assert path == tmp_path / "step-00000012"
    for name in expected.weights:
        assert_close(found.weights[name], expected.weights[name], rtol=0, atol=0)
    assert_close(found.optimizer["a/exp_avg"], expected.optimizer["a/exp_avg"], rtol=0, atol=0)
    assert found.state == {"step": 12, "best": 0.30000000000000004}
    with safetensors.safe_open(path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "frames": "8"}


def test_averaged_weights_have_a_file_of_their_own(tmp_path):
    checkpoint = dataclasses.replace(make_checkpoint(3), ema={"a": torch.full((2,), 0.3)})
    path = save_checkpoint(tmp_path, checkpoint, metadata={})
    assert_close(load_checkpoint(path).ema["a"], checkpoint.ema["a"], rtol=0, atol=0)
    assert load_checkpoint(save(tmp_path, 4)).ema is None
    (path / "model_ema.safetensors").unlink()
    with pytest.raises(
        StateError, match=r"model_ema\.safetensors: damaged checkpoint, the file is"
    ):
        load_checkpoint(path)


def test_latest_is_the_highest_step(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    for step in (9, 100, 20):
        save(tmp_path, step)
    assert latest_checkpoint(tmp_path).name == "step-00000100"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_named_with_what_to_do(tmp_path, name, damage):
    save(tmp_path, 5)
    path = save(tmp_path, 7)
    file = path / name
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        # A digit inside the state, so that the JSON still parses; any byte of the others.
        place = data.index(b"0.3000") + 4 if name == "state.json" else len(data) - 2
        data[place] ^= 1
        file.write_bytes(data)
    with pytest.raises(StateError) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{file}: damaged checkpoint, the file ")
    assert str(caught.value).endswith(f"; delete {path} to go on from step-00000005")
    load_checkpoint(step_folder(tmp_path, 5))


def test_damage_of_the_only_one_says_start_again(tmp_path):
    path = save(tmp_path, 5)
    (path / "model.safetensors").unlink()
    with pytest.raises(StateError, match="the file is missing; delete .* to start again$"):
        load_checkpoint(path)


def test_another_layout_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.checkpoint.LAYOUT", 2)
    path = save(tmp_path, 5)
    monkeypatch.undo()
    with pytest.raises(StateError, match="has layout 2, this version reads 1"):
        load_checkpoint(path)


def test_saving_a_step_again_replaces_its_state_only(tmp_path):
    path = save(tmp_path, 3, epoch=0)
    before = (path / "model.safetensors").stat()
    assert save(tmp_path, 3, epoch=1) == path
    assert (path / "model.safetensors").stat().st_ino == before.st_ino
    assert load_checkpoint(path).state["epoch"] == 1


def test_pruning_keeps_the_last_ones_and_the_best(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, keep=2, best_step=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000003",
        "step-00000005",
        "step-00000006",
    ]
    prune_checkpoints(tmp_path, keep=1, best_step=None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


def test_a_failed_save_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distill.checkpoint._write_state", fail)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert latest_checkpoint(tmp_path).name == "step-00000001"
    remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from distill.checkpoint import Checkpoint, prune_checkpoints, save_checkpoint
folder = Path(sys.argv[1])
step = int(sys.argv[2])
while True:
    step += 1
    tensors = {"a": torch.full((4096,), float(step))}
    save_checkpoint(folder, Checkpoint(tensors, tensors, {"step": step}), metadata={})
    prune_checkpoints(folder, keep=2, best_step=None)
    print(step, flush=True)
"""


def test_kill_9_while_saving_never_leaves_a_damaged_checkpoint(tmp_path):
    rng, last = random.Random(0), 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, tmp_path, str(last)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(rng.randint(2, 20)):
            last = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        path = latest_checkpoint(tmp_path)
        found = load_checkpoint(path)
        step = found.state["step"]
        assert step >= last
        assert re.fullmatch(r"step-0*(\d+)", path.name)[1] == str(step)
        assert_close(found.weights["a"], torch.full((4096,), float(step)), rtol=0, atol=0)
        for other in tmp_path.glob("step-*"):
            load_checkpoint(other)
        remove_partial(tmp_path)
        last = step


def draws():
    return torch.rand(3), np.random.rand(3), np.random.standard_normal(3), random.gauss(0, 1)


def test_random_states_of_every_kind_come_back(tmp_path):
    draws()  # leaves NumPy and Python with a cached second Gaussian
    path = save(tmp_path, 1, random=random_state())
    expected = draws()
    draws()
    restore_random_state(load_checkpoint(path).state["random"])
    found = draws()
    assert_close(found[0], expected[0], rtol=0, atol=0)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[2], expected[2])
    assert found[3] == expected[3]
