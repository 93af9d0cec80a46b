"""A step that does not log asks nothing of the device: no number of a tensor is looked at."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_runs import classify, distil, write_clips
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from distill.engines.overlap import overlapped
from distill.engines.plain import Engine
from distill.train import Run, train

# Each makes a host wait for a GPU; the first is what item, bool, int and float come to.
LOOKS = {"_local_scalar_dense", "nonzero", "equal", "tolist", "numpy", "cpu"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("videos"))


class Looks:
    """Counts what a step looks at, by the number of the step."""

    def __init__(self, monkeypatch) -> None:
        self.found, self.step = Counter(), 0
        step, check = Run.step, Engine.check

        def counted(run, batch):
            self.step = run.at.step + 1
            step(run, batch)
            self.step = 0

        def only_when_asked(engine):
            """On a CPU, which nobody waits for, the engine asks after every step by itself."""
            if self.step % 3 == 0:
                check(engine)

        monkeypatch.setattr(Run, "step", counted)
        monkeypatch.setattr(Engine, "check", only_when_asked)

    def see(self, name: str) -> None:
        if self.step and name in LOOKS:
            self.found[self.step] += 1


class Operations(TorchDispatchMode):
    def __init__(self, looks: Looks) -> None:
        super().__init__()
        self.looks = looks

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        self.looks.see(function.overloadpacket.__name__)
        return function(*arguments, **settings or {})


class Methods(TorchFunctionMode):
    def __init__(self, looks: Looks) -> None:
        super().__init__()
        self.looks = looks

    def __torch_function__(self, function, types, arguments=(), settings=None):
        self.looks.see(getattr(function, "__name__", ""))
        return function(*arguments, **settings or {})


@pytest.mark.parametrize("kind", ["distill", "finetune"])
def test_only_steps_that_log_look_at_numbers(videos, tmp_path, monkeypatch, kind):
    if kind == "distill":
        cache = {"objective__cache__tokens": "superset", "objective__cache__codes": "4bit"}
        recipe = distil(videos, "cached", objective__cache__folder=str(tmp_path / "cache"), **cache)
    else:
        recipe = classify(videos, evaluate__every_epochs=0, optim__ema=0.5)
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"log_steps": 3})})
    looks = Looks(monkeypatch)
    with Operations(looks), Methods(looks):
        train(recipe, tmp_path / "run")
    # The first batch of a run that reads videos is shown in TensorBoard, once.
    assert set(looks.found) == {3, 6} | ({1} if kind == "finetune" else set())


def test_on_a_cpu_batches_are_handed_on_as_they_are():
    batches = [{"codes": torch.ones(2)}, {"codes": torch.zeros(1)}]
    assert list(map(id, overlapped(batches, torch.device("cpu")))) == list(map(id, batches))
