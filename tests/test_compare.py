"""Two evaluations side by side: may they be compared, what differs, and by how much."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from distill.checkpoint import write_json
from distill.cli import app
from distill.data.index import Clip, clip_id
from distill.errors import InputError
from distill.evaluation.compare import compare, mcnemar
from distill.evaluation.metrics import measure
from distill.evaluation.scores import (
    Evaluation,
    Scores,
    in_order,
    read_evaluation,
    write_evaluation,
)

CLASSES = 4
VIEWS = 2


def listed(count: int = 40) -> list[Clip]:
    names = [f"{number}.mp4" for number in range(count)]
    return [Clip(clip_id(name), name, name, i % CLASSES) for i, name in enumerate(names)]


def write(
    folder: Path, clips: list[Clip], *, skill: float, seed: int, pixels: int = 0, **run
) -> Path:
    """An evaluation as `distill evaluate` leaves it; `skill` is added to the right logit."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.arange(len(clips)).repeat_interleave(VIEWS)
    logits = torch.randn(len(rows), CLASSES, generator=rng)
    labels = torch.tensor([clip.label for clip in clips])
    logits[torch.arange(len(rows)), labels[rows]] += skill
    scores = Scores(
        clip_id=torch.tensor([clip.id for clip in clips])[rows],
        clip_index=torch.arange(VIEWS).repeat(len(clips)),
        crop_index=torch.zeros(len(rows), dtype=torch.int64),
        pixels_hash=torch.arange(len(rows)) // 60 * pixels,  # in the last views only
        logits=logits,
    )
    manifest = {
        "question": {"clips": len(clips), "classes": CLASSES, "hash": str(labels.tolist())},
        "views": {"clips": VIEWS, "crops": 1, "decoded": str(pixels)},
        "run": {"split": "test", "weights": f"{seed}.safetensors", "precision": "fp32", **run},
    }
    evaluation = Evaluation(scores, clips, {}, manifest)
    folder.mkdir()
    write_evaluation(folder / "scores.safetensors", evaluation)
    write_json(folder / "evaluation.json", measure(evaluation))
    return folder


@pytest.fixture
def two(tmp_path) -> tuple[Path, Path]:
    first = write(tmp_path / "a", listed(), skill=0.5, seed=0)
    return first, write(tmp_path / "b", listed(), skill=1.5, seed=1, precision="bf16")


def test_a_better_model_is_better_by_what_its_files_say(two):
    found = compare(*two)
    assert found.verdict == ("comparable: the same clips and labels, and the same pixels of them")
    assert found.differing == {
        "run.weights": ("0.safetensors", "1.safetensors"),
        "run.precision": ("fp32", "bf16"),
    }
    written = [json.loads((folder / "evaluation.json").read_text()) for folder in two]
    numbers = found.differences
    for name, one in numbers.metrics.items():
        assert (one.first, one.second) == (written[0][name], written[1][name])
        assert one.low <= one.second - one.first <= one.high
    assert numbers.metrics["top1"].low > 0
    assert numbers.only_first > 0
    gained = numbers.only_second - numbers.only_first
    top1 = numbers.metrics["top1"]
    assert 100 * gained / 40 == pytest.approx(top1.second - top1.first)


def test_the_interval_is_of_differences_within_the_same_resamples(two):
    """Of a share p of n clips won and q lost: close to (p - q) +- 1.96 sqrt(var / n)."""
    numbers = compare(*two, resamples=3000).differences
    won, lost = numbers.only_second / 40, numbers.only_first / 40
    half = 100 * 1.96 * np.sqrt((won + lost - (won - lost) ** 2) / 40)
    top1 = numbers.metrics["top1"]
    expected = [top1.second - top1.first - half, top1.second - top1.first + half]
    assert [top1.low, top1.high] == pytest.approx(expected, abs=2.0)
    same = compare(two[0], two[0]).differences
    assert all((one.low, one.high) == (0.0, 0.0) for one in same.metrics.values())
    assert (same.only_first, same.only_second, same.p_value) == (0, 0, 1.0)


def test_the_order_of_the_list_does_not_matter(two, tmp_path):
    clips = listed()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    read = read_evaluation(two[1] / "scores.safetensors")
    shuffled = [clips[place] for place in order]
    again = replace(read, clips=shuffled, scores=in_order(read.scores, shuffled))
    write_evaluation(tmp_path / "shuffled.safetensors", again)
    assert compare(two[0], tmp_path / "shuffled.safetensors").differences == (
        compare(*two).differences
    )


def test_mcnemar_is_the_exact_binomial_test():
    # 2 of 8 or more uneven, on both sides: 2 (1 + 8 + 28) / 2^8.
    assert mcnemar(2, 6) == mcnemar(6, 2) == pytest.approx(2 * 37 / 256)
    assert (mcnemar(0, 0), mcnemar(5, 5)) == (1.0, 1.0)


def test_other_clips_or_labels_are_not_compared(two, tmp_path):
    fewer = write(tmp_path / "c", listed(30), skill=1.0, seed=2)
    found = compare(two[0], fewer)
    assert found.differences is None
    assert found.verdict == (
        "not comparable: 10 clips only in the first, 0 only in the second, and 0 of the 30 in "
        "both with another label"
    )
    clips = listed()
    clips[3] = replace(clips[3], label=0)
    found = compare(two[0], write(tmp_path / "d", clips, skill=1.0, seed=2))
    assert found.verdict.endswith("and 1 of the 40 in both with another label")
    assert "question.hash" in found.differing


def test_other_pixels_are_named_and_counted(two, tmp_path):
    other = write(tmp_path / "c", listed(), skill=2.0, seed=3, pixels=1)
    found = compare(two[0], other)
    assert found.verdict == (
        "comparable with care: the same clips and labels, looked at differently "
        "(views.decoded: 20 of 80 common views with other pixels)"
    )
    assert found.differences is not None


def test_scores_beside_another_result_are_refused(two):
    first, second = two
    (second / "evaluation.json").write_text((first / "evaluation.json").read_text())
    message = r"b/evaluation\.json: scores\.safetensors beside it is of another evaluation; keep"
    with pytest.raises(InputError, match=message):
        compare(first, second / "evaluation.json")
    assert compare(first, first / "evaluation.json").differing == {}
    (second / "evaluation.json").write_text("[]")
    with pytest.raises(InputError, match=r"evaluation\.json: not an evaluation\.json of 'distill"):
        compare(first, second / "evaluation.json")
    with pytest.raises(InputError, match=r"a/nowhere: no such file; 'distill evaluate' writes it"):
        compare(first, first / "nowhere")


def shell(*arguments: object) -> str:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["evaluate", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_shell_shows_differences_and_what_they_rest_on(two):
    output = shell("--compare", *two)
    numbers = compare(*two).differences
    top1 = numbers.metrics["top1"]
    row = next(line for line in output.splitlines() if "│ top-1" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "top-1",
        f"{top1.first:.2f}",
        f"{top1.second:.2f}",
        f"{top1.second - top1.first:+.2f}",
        f"{top1.low:+.2f} to {top1.high:+.2f}",
    ]
    assert "│ run.precision │ fp32" in output
    last = output.splitlines()[-2:]
    assert last[0] == (
        f"top-1: {numbers.only_first} of 40 right in the first only, {numbers.only_second} in the "
        f"second only; exact McNemar test p = {numbers.p_value:.3g}"
    )
    assert last[1].startswith("comparable: ")
    assert json.loads(shell("--json", "--compare", *two)) == json.loads(
        json.dumps(compare(*two).report())
    )


def test_the_shell_gives_numbers_again_from_scores_alone(two):
    path = two[0] / "scores.safetensors"
    written = json.loads((two[0] / "evaluation.json").read_text())
    again = json.loads(shell("--scores", path, "--json"))
    assert again.pop("confidence_intervals")["top1"][0] < written["top1"]
    assert again == written
    row = next(line for line in shell("--scores", path).splitlines() if "│ mAP  " in line)
    assert f" {written['map']:.2f} │" in row
