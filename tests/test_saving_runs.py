"""Runs that save while they train, and what damage, kills and full disks leave of them."""

import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny_runs import assert_same_run, classify, stop_after, write_clips, write_recipe
from torch.testing import assert_close

import distill.train
from distill.checkpoint import latest_checkpoint, load_checkpoint
from distill.engines.plain import Engine
from distill.errors import StateError
from distill.run.interrupt import Interrupted
from distill.train import train

EVERY_STEP = {"run__save_minutes": 1e-9, "run__keep_checkpoints": 9, "optim__ema": 0.5}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def finished(videos, tmp_path_factory) -> Path:
    """The folder of a run of six steps, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("finished")
    train(classify(videos, **EVERY_STEP), folder)
    return folder


def saved_steps(folder: Path) -> list[int]:
    """Steps with a checkpoint, all of which are whole."""
    return [
        load_checkpoint(path).state["step"] for path in sorted(folder.glob("checkpoints/step-*"))
    ]


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    ours, theirs = load_checkpoint(found), load_checkpoint(expected)
    assert ours.state["random"] == theirs.state["random"]
    for name, tensors in theirs.files().items():
        for key, tensor in tensors.items():
            assert_close(ours.files()[name][key], tensor, rtol=0, atol=0, msg=f"{name}: {key}")


def test_a_step_taken_during_the_write_is_not_in_the_checkpoint(
    finished, videos, tmp_path, monkeypatch
):
    steps, is_next_done, waited = [], threading.Event(), []
    step, save = Engine.step, distill.train.save_checkpoint

    def counted(self, *arguments, **settings):
        losses = step(self, *arguments, **settings)
        steps.append(settings["step"])
        if settings["step"] == 2:
            is_next_done.set()
        return losses

    def held(folder, checkpoint, *, metadata):
        if checkpoint.state["step"] == 1:
            waited.append(is_next_done.wait(300))
        return save(folder, checkpoint, metadata=metadata)

    monkeypatch.setattr(Engine, "step", counted)
    monkeypatch.setattr(distill.train, "save_checkpoint", held)
    stop_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train(classify(videos, **EVERY_STEP), tmp_path)
    assert (waited, steps, saved_steps(tmp_path)) == ([True], [1, 2], [1, 2])
    for name in ("step-00000001", "step-00000002"):
        assert_same_checkpoint(tmp_path / "checkpoints" / name, finished / "checkpoints" / name)


def test_a_failed_write_stops_the_run_before_another_save(videos, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise StateError("the disk is full")

    monkeypatch.setattr(distill.train, "save_checkpoint", fail)
    with pytest.raises(StateError, match="^the disk is full$"):
        train(classify(videos, optim__epochs=1), tmp_path)
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_run_goes_on_from_the_previous_checkpoint_with_the_same_bits(
    finished, videos, tmp_path, caplog, damage
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "summary.json").unlink()
    path = folder / "checkpoints/step-00000006/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.unlink()
    if damage != "remove":
        path.write_bytes(data if damage == "flip" else data[:1000])
    with pytest.raises(StateError, match=f"^{re.escape(str(path))}: damaged checkpoint, the file"):
        train(classify(videos, **EVERY_STEP), folder)
    train(classify(videos, **EVERY_STEP, run__damaged_checkpoint="previous"), folder)
    assert "goes on from step-00000005, and step-00000006 is now damaged-step-00000006" in (
        caplog.text
    )
    assert saved_steps(folder) == [1, 2, 3, 4, 5, 6]
    assert_same_run(folder, finished)


HANG_IN_THE_WRITE = """\
import sys
import time

from distill import checkpoint

hash_file, seen = checkpoint._hash_file, []

def hang(path):
    seen.append(path)
    if path.parent.name == ".step-00000003.tmp" and path.name.startswith("optimizer"):
        print("writing", flush=True)
        time.sleep(1000)
    return hash_file(path)

checkpoint._hash_file = hang

if __name__ == "__main__":
    from distill.cli import main
    main()
"""


def test_kill_9_in_the_middle_of_a_write_leaves_the_previous_checkpoint(finished, videos, tmp_path):
    recipe, folder = classify(videos, **EVERY_STEP), tmp_path / "run"
    (tmp_path / "hang.py").write_text(HANG_IN_THE_WRITE)
    command = [sys.executable, str(tmp_path / "hang.py"), "train"]
    process = subprocess.Popen(
        [*command, str(write_recipe(recipe, tmp_path / "r.yaml", folder))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = []
    for line in process.stdout:
        output.append(line)
        if line == "writing\n":
            break
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=300)
    assert output[-1:] == ["writing\n"], "".join(output)
    assert (folder / "checkpoints/.step-00000003.tmp/optimizer.safetensors").exists()
    assert saved_steps(folder) == [1, 2]
    train(recipe, folder)
    assert not list(folder.glob("checkpoints/.*"))
    assert_same_run(folder, finished)


LIMITED = """\
import resource

from distill import train

save = train.save_checkpoint

def limited(folder, checkpoint, *, metadata):
    if checkpoint.state["step"] == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    return save(folder, checkpoint, metadata=metadata)

train.save_checkpoint = limited

if __name__ == "__main__":
    from distill.cli import main
    main()
"""

# A disk of its own, which only the shell and what it starts can see.
ON_A_SMALL_DISK = """\
mkdir -p {run} && mount -t tmpfs -o size={size_bytes} none {run} || exit 99
{python} -m distill train {recipe} > {place}/output 2>&1
echo $? > {place}/code
cp -a {run} {place}/full
mount -o remount,size=64m {run} && {python} -m distill train {recipe} && cp -a {run} {place}/room
"""


def can_mount() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return bool(shutil.which("unshare")) and not subprocess.run(command, check=False).returncode


@pytest.mark.parametrize("disk", ["limited", *(["mounted"] if can_mount() else [])])
def test_a_full_disk_stops_the_run_in_one_line_and_loses_nothing(finished, videos, tmp_path, disk):
    run = tmp_path / "run"
    # Metrics, written meanwhile, would find no room either and say so.
    recipe = classify(videos, **EVERY_STEP, run__log_steps=100)
    path = write_recipe(recipe, tmp_path / "r.yaml", run)
    if disk == "mounted":
        checkpoint = finished / "checkpoints/step-00000001"
        one = sum(file.stat().st_size for file in checkpoint.iterdir())
        script = ON_A_SMALL_DISK.format(
            python=sys.executable, recipe=path, place=tmp_path, run=run, size_bytes=3 * one
        )
        command = ["unshare", "-rm", "sh", "-c", script]
    else:
        (tmp_path / "limited.py").write_text(LIMITED)
        command = [sys.executable, str(tmp_path / "limited.py"), "train", str(path)]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if disk == "mounted":
        assert done.returncode == 0, done.stdout
        output, code = ((tmp_path / name).read_text() for name in ("output", "code"))
        full, end = tmp_path / "full", tmp_path / "room"
    else:
        output, code, full = done.stdout, str(done.returncode), tmp_path / "full"
        shutil.copytree(run, full)
        train(recipe, run)
        end = run
    assert int(code) == 2, output
    assert "Traceback" not in output
    reason = "No space left on device" if disk == "mounted" else "File too large"
    line = next(line for line in output.splitlines() if "could not be written" in line)
    assert line.startswith(f"{run}/checkpoints: the checkpoint of step ")
    assert reason in line
    assert re.search(r"; it needs [\d.]+ [kM]B, and [\d.]+ ([kMGT]B|bytes) are free; ", line)
    last = latest_checkpoint(full / "checkpoints").name
    assert line.endswith(f"make room, and the same command goes on from {last}")
    steps = saved_steps(full)
    assert steps == list(range(1, len(steps) + 1))
    assert 1 <= len(steps) < 6
    assert not list(full.glob("checkpoints/.*"))
    assert saved_steps(end) == [1, 2, 3, 4, 5, 6]
    for number in (len(steps), 6):
        name = f"step-{number:08d}"
        assert_same_checkpoint(end / "checkpoints" / name, finished / "checkpoints" / name)
