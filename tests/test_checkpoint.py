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
    DamagedError,
    latest_checkpoint,
    load_checkpoint,
    load_latest,
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
    assert str(caught.value).endswith(
        f"; set run.damaged_checkpoint=previous or delete {path} to go on from step-00000005"
    )
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
    with pytest.raises(StateError) as caught:
        save(tmp_path, 2)
    assert re.fullmatch(
        rf"{tmp_path}: the checkpoint of step 2 could not be written \(No space left on device\); "
        r"it needs 6\.18 kB, and [\d.]+ [kMGT]B are free; make room, and the same command goes on "
        "from step-00000001",
        str(caught.value),
    )
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


def damage(path, kind):
    """Flip a bit of the file, cut it or remove it."""
    data = bytearray(path.read_bytes())
    if kind == "flip":
        data[-2] ^= 1
    path.unlink()
    if kind != "remove":
        path.write_bytes(data[: len(data) // 2] if kind == "cut" else data)


def test_the_previous_one_is_used_only_if_that_is_allowed(tmp_path, caplog):
    for step in (5, 7, 9):
        save(tmp_path, step)
    damage(tmp_path / "step-00000007/optimizer.safetensors", "cut")
    assert load_latest(tmp_path, damaged="stop").state["step"] == 9
    damage(tmp_path / "step-00000009/model.safetensors", "flip")
    with pytest.raises(DamagedError, match=r"9/model\.safetensors: damaged checkpoint"):
        load_latest(tmp_path, damaged="stop")
    assert len(list(tmp_path.glob("step-*"))) == 3
    assert load_latest(tmp_path, damaged="previous").state["step"] == 5
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/step-0000000{step}/{file}.safetensors: damaged checkpoint, the file does not "
        "match the hash in state.json; run.damaged_checkpoint is 'previous': goes on from "
        f"step-00000005, and step-0000000{step} is now damaged-step-0000000{step}"
        for step, file in ((9, "model"), (7, "optimizer"))
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "damaged-step-00000007",
        "damaged-step-00000009",
        "step-00000005",
    ]


def test_where_none_is_whole_nothing_begins_anew(tmp_path):
    assert load_latest(tmp_path, damaged="previous") is None
    for step in (5, 7):
        damage(save(tmp_path, step) / "state.json", "remove")
    with pytest.raises(DamagedError) as caught:
        load_latest(tmp_path, damaged="previous")
    assert str(caught.value).startswith(f"{tmp_path}/step-00000007/state.json: damaged checkpoint")
    assert str(caught.value).endswith("; no other checkpoint there is whole")
    assert len(list(tmp_path.glob("step-*"))) == 2


def test_a_copy_does_not_change_with_the_original():
    original = dataclasses.replace(make_checkpoint(3), ema={"a": torch.zeros(2)})
    copy = original.copy()
    for tensors in original.files().values():
        for tensor in tensors.values():
            tensor.add_(1)
    expected = dataclasses.replace(make_checkpoint(3), ema={"a": torch.zeros(2)})
    assert copy.state == expected.state
    for name, tensors in expected.files().items():
        for key, tensor in tensors.items():
            assert_close(copy.files()[name][key], tensor, rtol=0, atol=0)


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
