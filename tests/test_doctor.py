"""`distill doctor`: what is tried, what is told, and when it counts as broken."""

import errno
import json
import os
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from distill import doctor
from distill.cli import app

NAMES = ["machine", "python", "packages", "gpu", "kernels", "pyav", "decord", "disk"]


def examine(folder: Path) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine(folder)}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "DISK_MB", 1)


def test_a_machine_in_order_is_told_so(tmp_path):
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "runs/to/come"), "--json"])
    report = json.loads(result.output)
    assert (result.exit_code, report["broken"]) == (0, [])
    found = {finding["name"]: finding for finding in report["findings"]}
    assert set(NAMES) <= set(found)
    assert f"torch {torch.__version__.partition('+')[0]}" in found["packages"]["found"]
    assert found["pyav"]["found"].startswith(f"pyav {metadata.version('av')}: the right frames")
    assert found["decord"]["state"] == "fine"
    assert found["disk"]["found"].startswith(f"{tmp_path}: writes ")
    assert found["torchrun"]["found"].startswith("gloo starts")
    assert list(tmp_path.iterdir()) == []
    table = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert table.output.splitlines()[-1] == "nothing is broken"


def test_a_decoder_that_returns_other_frames_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "ramp_level", lambda frame: 40 + 9 * frame)
    doctor.write_ramp(tmp_path / "ramp.mp4")
    monkeypatch.undo()
    found = doctor._decoder("pyav", tmp_path / "ramp.mp4")
    assert (found.state, found.mend) == ("broken", "pip install --force-reinstall av")
    assert "returns other frames than were asked for" in found.found
    (tmp_path / "ramp.mp4").write_bytes(b"nothing")
    found = doctor._decoder("decord", tmp_path / "ramp.mp4")
    assert found.state == "note" and found.found.startswith("does not decode: not a video")


def test_a_package_that_is_missing_ends_with_exit_code_1(tmp_path, monkeypatch):
    version = metadata.version

    def missing(name: str) -> str:
        if name == "einops":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", missing)
    result = CliRunner().invoke(app, ["doctor", str(tmp_path), "--json"])
    report = json.loads(result.output)
    assert (result.exit_code, report["broken"]) == (1, ["einops"])
    (einops,) = [one for one in report["findings"] if one["name"] == "einops"]
    assert einops["mend"].startswith("pip install 'einops")


def test_a_disk_that_takes_nothing_is_broken(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(doctor.os, "fsync", full)
    found = examine(tmp_path)["disk"]
    assert found.state == "broken"
    assert found.found == f"{tmp_path}: cannot be written (No space left on device)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine whose GPU torch cannot use")
def test_a_gpu_that_torch_cannot_use_is_broken(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    done = subprocess.CompletedProcess([], 0, stdout="NVIDIA H200, 570.12\n", stderr="")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: done)
    (found,) = doctor._gpu()
    assert found.state == "broken"
    assert found.found.startswith("NVIDIA H200, 570.12: not to be used by torch ")
