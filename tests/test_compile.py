"""A run whose steps are compiled learns what the same run learns as written."""

from pathlib import Path

import pytest
import torch
from tiny_runs import ROUNDING, classify, distil, metrics, timeless, write_clips
from torch.testing import assert_close

from distill.errors import InputError
from distill.objective import compile_losses
from distill.recipe_file import load_recipe
from distill.train import train


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("videos"))


@pytest.mark.parametrize("kind", ["distill", "finetune"])
def test_a_compiled_run_has_the_losses_of_one_as_written(videos, tmp_path, monkeypatch, kind):
    """Micro-batches of two and of one, and a last batch of one clip: two sizes to compile."""
    compile, modes = torch.compile, []

    def traced(call, *, mode: str, dynamic: bool):
        """As for other backends, but for new kernels, which take a compiler minutes."""
        modes.append(mode)
        return compile(call, backend="aot_eager", dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", traced)
    changes = {"optim__batch_size": 3, "optim__micro_batch": 2, "optim__epochs": 2}
    if kind == "distill":
        recipe = distil(videos, "cached", objective__cache__folder=str(tmp_path / "c"), **changes)
    else:
        recipe = classify(videos, objective__fc_drop=0.0, evaluate__every_epochs=0, **changes)
    train(recipe, tmp_path / "none")
    run = recipe.run.model_copy(update={"compile": "reduce-overhead"})
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    train(recipe.model_copy(update={"run": run}), tmp_path / "compiled")
    assert modes == ["reduce-overhead"]
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    ours, theirs = (
        [timeless(line) for line in metrics(tmp_path / name) if "loss" in line]
        for name in ("compiled", "none")
    )
    assert len(ours) == len(theirs) == 8
    for line, other in zip(ours, theirs, strict=True):
        assert_close(line, other, **ROUNDING)


@pytest.mark.parametrize(
    ("device", "needs"), [("cpu", r"a C\+\+ compiler"), ("cuda", "Triton and a C compiler")]
)
def test_without_a_compiler_there_is_one_line_before_the_first_step(monkeypatch, device, needs):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=f"^run.compile is 'default', which takes {needs}"):
        compile_losses(torch.nn.Identity(), "default", torch.device(device))


def test_only_plain_torch_is_compiled():
    with pytest.raises(InputError, match="run.compile=default: must be none with engine.kind=fsdp"):
        load_recipe("S14", ["run.compile=default", "engine.kind=fsdp"])
