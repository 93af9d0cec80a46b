"""Evaluation shared out among processes: the same numbers, every view once, clean failure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import rich
import torch
import videos
from safetensors.torch import load_file
from tiny_runs import torchrun
from typer.testing import CliRunner

from distill import recipe as schema
from distill.checkpoint import write_tensors
from distill.cli import app
from distill.data.index import read_list
from distill.dist import WHOLE, Part
from distill.evaluation.evaluate import score_views
from distill.models import build_classifier
from distill.recipe_file import dump_recipe, load_recipe

LISTED = [
    "0.mp4,2,-1,-1,0",
    "1.mp4,1,0,0.5,1",
    "1.mp4,1,0.5,1,2",
    "gone.mp4,1,0,1,1",
    "2.mp4,2,-1,-1,2",
    "broken.mp4,1,0,1,0",
    "3.mp4,1,-1,-1,0",
]
VIEWS = 2 * 3
READABLE = 5

FAILING = """\
import os
from distill.evaluation import evaluate
from distill.errors import StateError

def fail(pixels):  # of its first batch
    raise StateError("rank 1 has no memory left; take a smaller batch")

if os.environ["RANK"] == "1":
    evaluate.hash_pixels = fail

if __name__ == "__main__":
    from distill.cli import main
    main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with videos, list, recipe (run.yaml) and weights (w.safetensors)."""
    folder = tmp_path_factory.mktemp("ranks")
    for number in range(4):
        videos.write(folder / f"{number}.mp4", num_frames=10 + 3 * number)
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "test.csv").write_text("\n".join(LISTED) + "\n")
    section = schema.ClipList(list=str(folder / "test.csv"))
    recipe = schema.Recipe(
        name="tiny",
        run=schema.Run(folder=str(folder / "run")),
        data=schema.Data(
            train=section, test=section, views=schema.Views(frames=2, image_size=28), workers=1
        ),
        model=schema.Model(size=schema.Size(width=32, depth=2, heads=2, pooled_width=16)),
        objective=schema.Classify(kind="classify", num_classes=3),
        optim=schema.Optim(lr=1e-3, batch_size=2, epochs=1),
        evaluate=schema.Evaluate(clips=2, crops=3, batch_size=5),
    )
    (folder / "run.yaml").write_text(dump_recipe(recipe))
    torch.manual_seed(0)
    model = build_classifier(recipe)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    write_tensors(folder / "w.safetensors", model.state_dict(), metadata={"frames": "2"})
    return folder


def command(place: Path, output: str) -> list[str]:
    return ["evaluate", str(place / "run.yaml"), "--json"] + [
        *("--checkpoint", str(place / "w.safetensors"), "--folder", str(place / output))
    ]


def evaluate_by(ranks: int, place: Path, output: str, *, program=("-m", "distill")):
    """The command of a person at the shell, with torchrun."""
    return subprocess.run(
        [sys.executable, *torchrun(ranks), *program, *command(place, output)],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def alone(place) -> dict:
    """What one process prints."""
    done = CliRunner().invoke(app, command(place, "alone"))
    rich.reconfigure()
    assert done.exit_code == 0, done.stderr
    assert "evaluate 42/42 views" in done.stderr
    return json.loads(done.stdout)


def without_circumstances(result: dict) -> dict:
    run = {key: value for key, value in result["manifest"]["run"].items() if key != "ranks"}
    kept = {key: value for key, value in result.items() if key != "seconds"}
    return {**kept, "manifest": {**result["manifest"], "run": run}}


def test_json_is_all_that_one_process_prints(place, alone):
    assert alone == json.loads((place / "alone/evaluation.json").read_text())
    assert alone["missing"] == ["gone.mp4 (0 to 1 s)", "broken.mp4 (0 to 1 s)"]
    assert (alone["num_clips"], alone["num_videos"]) == (7, 6)
    assert len(load_file(place / "alone/scores.safetensors")["clip_id"]) == READABLE * VIEWS


@pytest.mark.parametrize("ranks", [2, 3])
def test_torchrun_gives_the_same_as_one_process(place, alone, ranks):
    """Bit for bit, with every view once, and printed once."""
    done = evaluate_by(ranks, place, f"by{ranks}")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["manifest"]["run"]["ranks"] == ranks
    assert without_circumstances(result) == without_circumstances(alone)
    expected = load_file(place / "alone/scores.safetensors")
    found = load_file(place / f"by{ranks}/scores.safetensors")
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name].nan_to_num(-1), expected[name].nan_to_num(-1)), name
    views = torch.stack([found[name] for name in ("clip_id", "clip_index", "crop_index")], dim=1)
    assert len(views.unique(dim=0)) == len(views) == READABLE * VIEWS
    for rank in range(ranks):
        assert f"evaluate, part {rank + 1} of {ranks} " in done.stderr


def test_a_rank_that_fails_ends_all_with_its_line(place, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(FAILING)
    done = evaluate_by(2, place, "failed", program=[str(program)])
    assert done.returncode != 0
    assert done.stderr.count("rank 1 has no memory left; take a smaller batch\n") == 1
    assert "another process of this job is gone" not in done.stderr
    assert done.stdout == ""
    assert not (place / "failed/evaluation.json").exists()


@pytest.mark.parametrize("count", [2, 3, 20])
def test_parts_hold_every_view_once_with_the_same_bits(place, count):
    """Twenty are more than there are batches: the last ones have nothing to do."""
    recipe = load_recipe(place / "run.yaml")
    torch.manual_seed(0)
    model = build_classifier(recipe)
    clips = read_list(recipe.data.test)

    def share(part: Part):
        return score_views(
            model,
            clips,
            data=recipe.data,
            num_classes=3,
            num_clips=2,
            num_crops=3,
            batch_size=5,
            precision="fp32",
            device=torch.device("cpu"),
            part=part,
        )

    def rows(share) -> list[tuple]:
        columns = (tensor.tolist() for tensor in vars(share.scores).values())
        return [tuple(map(str, row)) for row in zip(*columns, strict=True)]

    parts = [share(Part(index, count)) for index in range(count)]
    found = [row for part in parts for row in rows(part)]
    assert sorted(found) == sorted(rows(share(WHOLE)))
    assert len(found) == READABLE * VIEWS
    assert sum(bool(len(part.scores.logits)) for part in parts) == min(
        count, 8
    )  # one of nine has none that can be read
    assert sum((part.decoders for part in parts), type(parts[0].decoders)()).total() == len(found)
