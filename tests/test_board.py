"""What a distillation shows of its agreement with the teacher, in metrics.jsonl and TensorBoard."""

import io
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import TRAIN_CLIPS, classify, distil, metrics, write_clips
from torch.testing import assert_close

from distill.cache.identity import cache_identity
from distill.job import WATCHED_CLIPS, build_job
from distill.run import pictures
from distill.run.provenance import note_provenance
from distill.run.watch import Watch, statistics
from distill.train import train


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def distilled(videos, tmp_path_factory):
    """The folder of a run of two epochs from a cache, and its recipe."""
    folder = tmp_path_factory.mktemp("distilled")
    recipe = distil(videos, "cached")
    train(recipe, folder)
    return folder, recipe


@pytest.fixture(scope="module")
def board(distilled):
    sizes = {"histograms": 0, "images": 0, "scalars": 0, "tensors": 0}
    return EventAccumulator(str(distilled[0] / "tensorboard"), size_guidance=sizes).Reload()


def looks(folder):
    return [line for line in metrics(folder) if "watched/layer_00_mean" in line]


def test_every_epoch_ends_with_a_look(distilled):
    folder, _ = distilled
    assert [(line["step"], line["epoch"]) for line in looks(folder)] == [(3, 0), (6, 1)]
    for line in looks(folder):
        for layer in ("layer_00", "layer_01"):
            low, middle, high = (line[f"watched/{layer}_{name}"] for name in ("p05", "p50", "p95"))
            assert -1 <= low <= middle <= high <= 1
            assert line[f"watched/{layer}_std"] > 0


def test_a_look_is_the_cosine_of_the_final_student(distilled):
    """By hand, from the cache's records and the run's weights."""
    folder, recipe = distilled
    job = build_job(recipe, folder, device=torch.device("cpu"))
    job.model.load_state_dict(load_file(folder / "model.safetensors"))
    order = job.batches.order(0)[:WATCHED_CLIPS]
    cache = job.batches.cache
    assert len(order) == WATCHED_CLIPS < TRAIN_CLIPS
    expected = []
    for place in order:
        arrays, _ = cache.read(int(cache.rows[place, 0]))
        tensors = {name: torch.from_numpy(array)[None] for name, array in arrays.items()}
        middle, _ = job.model.eval()(
            patches=tensors["patches"], tokens=tensors["tokens"].long()
        )  # [K,1,M,E]
        target = F.normalize(tensors["codes"][0].float(), dim=-1)  # [K,M,E], in half precision
        expected.append((middle[:, 0] * target).sum(dim=-1))
    expected = torch.stack(expected, dim=1)  # [K,B,M]
    last = looks(folder)[-1]
    for layer in range(2):
        name = f"watched/layer_{layer:02d}"
        points = np.quantile(expected[layer].detach().numpy(), [0.05, 0.5, 0.95])
        found = [last[f"{name}_{key}"] for key in ("mean", "std", "p05", "p50", "p95")]
        mean, std = expected[layer].mean(), expected[layer].std(unbiased=False)
        assert_close(found, [mean.item(), std.item(), *points], rtol=0, atol=2e-5)


def test_a_step_s_cosine_follows_from_its_loss(distilled):
    folder, _ = distilled
    steps = [line for line in metrics(folder) if "loss" in line]
    for line in steps:
        for layer in ("layer_00", "layer_01"):
            assert line[f"cosine/{layer}"] == pytest.approx(1 - line[layer] / 2)
    assert steps[-1]["cosine/layer_01"] > steps[0]["cosine/layer_01"]


def test_looking_changes_nothing(distilled, monkeypatch, tmp_path):
    folder, recipe = distilled
    monkeypatch.setattr(Watch, "write", lambda *_, **__: None)
    train(recipe, tmp_path)
    blind, seeing = (load_file(place / "model.safetensors") for place in (tmp_path, folder))
    for name, value in seeing.items():
        assert_close(blind[name], value, rtol=0, atol=0, msg=name)
    assert not looks(tmp_path)


def test_tensorboard_has_the_scalars(distilled, board):
    folder, _ = distilled
    for name in ("watched/layer_01_mean", "watched/layer_00_p05", "cosine/layer_01"):
        events = [(event.step, event.value) for event in board.Scalars(name)]
        expected = [(line["step"], line[name]) for line in metrics(folder) if name in line]
        assert len(expected) in (2, 6)
        assert [step for step, _ in events] == [step for step, _ in expected]
        assert_close([value for _, value in events], [value for _, value in expected])


def test_tensorboard_has_a_histogram_of_every_layer_s_tokens(distilled, board):
    folder, recipe = distilled
    for layer in ("layer_00", "layer_01"):
        events = board.Histograms(f"watched/{layer}")
        assert [event.step for event in events] == [3, 6]
        for event, line in zip(events, looks(folder), strict=True):
            value = event.histogram_value
            rows = WATCHED_CLIPS * (1 + 2 * 2 * 2 // 2)  # with the class token
            assert value.num == rows == sum(value.bucket)
            assert value.sum / rows == pytest.approx(line[f"watched/{layer}_mean"], abs=1e-6)


def test_tensorboard_has_pictures_of_watched_clips(distilled, board):
    folder, _ = distilled
    events = board.Images("watched/clip_0")
    assert [event.step for event in events] == [3, 6]
    image = Image.open(io.BytesIO(events[-1].encoded_image_string))
    side = 3 * 28
    assert image.size == (2 * side + pictures.GAP, 5 * side + 4 * pictures.GAP)
    strip = Image.open(folder / "watched" / "0-seen.png")
    top = image.convert("RGB").crop((0, 0, image.width, side))
    np.testing.assert_array_equal(np.asarray(top), np.asarray(strip.convert("RGB")))
    assert {f"watched/clip_{number}" for number in range(4)} <= set(board.Tags()["images"])


def test_tensorboard_has_the_settings(distilled, board):
    content = board.PluginTagToContent("hparams")
    assert "_hparams_/session_start_info" in content
    told = content["_hparams_/session_start_info"]
    assert b"optim.batch_size" in told and b"objective.mask.ratio" in told


def test_a_run_notes_what_it_was_made_with(distilled):
    folder, recipe = distilled
    known = json.loads((folder / "provenance.json").read_text())
    assert torch.__version__.startswith(known["versions"]["torch"])
    assert known["hardware"]["cores"] == os.cpu_count()
    assert known["hardware"]["memory_bytes"] > 2**28
    assert known["cache"]["folder"] == recipe.objective.cache.folder
    assert known["cache"]["identity"].items() >= cache_identity(recipe).items()


def test_a_run_that_goes_on_keeps_its_note(distilled):
    folder, recipe = distilled
    before = (folder / "provenance.json").read_bytes()
    note_provenance(recipe, folder, device=torch.device("cpu"))
    assert (folder / "provenance.json").read_bytes() == before


def test_the_latest_look_lies_in_the_folder(distilled):
    folder, recipe = distilled
    watched = json.loads((folder / "watched" / "watched.json").read_text())
    assert (watched["step"], watched["epoch"]) == (6, 1)
    assert len(watched["clips"]) == WATCHED_CLIPS
    assert watched["clips"][0]["name"].endswith(".mp4")
    assert sum(watched["counts"]["layer_01"]) == WATCHED_CLIPS * 5
    for row in watched["rows"]:
        assert (folder / "watched" / f"3-{row}.png").exists()
    assert watched["rows"] == ["seen", "attention", "teacher", "student", "agreement"]


def test_a_live_run_sees_the_same(videos, distilled, tmp_path):
    """The same clips, masks and weights as from a cache in half precision."""
    folder, _ = distilled
    train(distil(videos, "live"), tmp_path)
    for mine, theirs in zip(looks(tmp_path), looks(folder), strict=True):
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, abs=2e-3), name


def test_a_classifier_shows_its_first_clips(videos, tmp_path):
    train(classify(videos, optim__epochs=1, evaluate__every_epochs=0), tmp_path)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = board.Images("inputs/clips")
    assert (event.width, event.height) == (2 * 84 + 3, 4 * 84 + 3 * 3)
    assert not (tmp_path / "watched").exists()


def test_statistics_are_those_of_all_tokens():
    values = torch.linspace(-1, 1, 101).reshape(1, 101)
    found = statistics({"layer_00": values})
    assert found == {
        "watched/layer_00_mean": pytest.approx(0, abs=1e-7),
        "watched/layer_00_std": pytest.approx(values.double().std(unbiased=False).item()),
        "watched/layer_00_p05": pytest.approx(-0.9),
        "watched/layer_00_p50": pytest.approx(0, abs=1e-7),
        "watched/layer_00_p95": pytest.approx(0.9),
    }


def test_colours_follow_the_directions_of_greatest_spread():
    rows = np.zeros((101, 5))
    rows[:, 3] = np.linspace(-1, 1, 101)
    palette = pictures.Palette.of(rows)
    assert abs(palette.axes[3, 0]) == pytest.approx(1)
    reds = palette.colours(rows)[:, 0].astype(int)
    assert (np.diff(reds) >= 0).all() and (reds[0], reds[-1]) == (0, 255)


def test_heat_goes_from_dark_to_bright():
    colours = pictures.heat(np.array([-1.0, 0.0, 0.5, 1.0, 2.0]), low=0.0, high=1.0)
    np.testing.assert_array_equal(colours[0], colours[1])
    np.testing.assert_array_equal(colours[3], colours[4])
    assert (
        colours[1].astype(int).sum() < colours[2].astype(int).sum() < colours[3].astype(int).sum()
    )
