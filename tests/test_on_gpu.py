"""The one call that a GPU is waited for with: its order, its clock, and what it leaves behind."""

import json
from pathlib import Path

from benchmarks import on_gpu
from benchmarks.on_gpu import Step, steps, work_through

ROOT = Path(__file__).parents[1]


def test_every_file_of_gpu_tests_is_run_and_then_the_tables(monkeypatch, tmp_path):
    todo, left_out = steps(tmp_path, budget=100, others=["--seconds", "1"])
    *tests, tables = todo
    files = {step.command[-1] for step in tests}
    assert files == {f"tests/gpu/{path.name}" for path in (ROOT / "tests/gpu").glob("test_*.py")}
    assert tables.command[1:] == ["benchmarks.kernels", "--out", str(tmp_path), "--seconds", "1"]
    assert left_out == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    todo, left_out = steps(tmp_path, budget=100)
    needing = {
        path.name
        for path in (ROOT / "tests/gpu").glob("test_*.py")
        if "distill.recipe" in path.read_text() or "steps import" in path.read_text()
    }
    assert set(left_out) == needing == {*on_gpu.NEED_PACKAGES}
    assert len(todo) == len(files) + 1 - len(needing)


def test_what_is_done_stays_when_a_step_fails_or_hangs(monkeypatch, tmp_path):
    monkeypatch.setattr(on_gpu, "GRACE_SECONDS", 0.2)
    deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); print('begun', flush=True)"
    todo = [
        Step("fails", ["-c", "print('a line'); raise SystemExit(3)"], 60),
        Step("hangs", ["-c", f"{deaf}; time.sleep(600)"], 3),
        Step("late", ["-c", "print('never')"], 3),
        Step("last", ["-c", "print('done')"], 60),
    ]
    done = work_through(todo, tmp_path, left_out=["test_x.py"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {"steps": done, "left out": ["test_x.py"]}
    assert [each["exit"] for each in done] == [
        3,
        "did not end in its time",
        "not run: no time left",
        0,
    ]
    assert (tmp_path / "fails.txt").read_text() == "a line\n"
    assert (tmp_path / "last.txt").read_text() == "done\n"
    assert not (tmp_path / "late.txt").exists()
