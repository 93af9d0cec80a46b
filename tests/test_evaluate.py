"""Scores of several views: how they are merged, and that no clip is left out silently."""

import json
import math

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

from distill import recipe as schema
from distill.checkpoint import write_tensors
from distill.data.index import Clip, read_list
from distill.data.load import Task, collate, load_eval_view
from distill.errors import InputError, StateError
from distill.evaluate import Scores, evaluate, evaluate_recipe, labelled_clips, merge_views
from distill.models import build_classifier

CPU = torch.device("cpu")


def clip(number: int, label: int, name: str | None = None) -> Clip:
    name = name or f"{number}.mp4"
    return Clip(id=number, path=f"/v/{name}", name=name, label=label, line=number)


def scores(*views: tuple[int, int, list[float]]) -> Scores:
    """Views as (clip id, clip index, logits)."""
    return Scores(
        clip_id=torch.tensor([view[0] for view in views]),
        clip_index=torch.tensor([view[1] for view in views]),
        crop_index=torch.zeros(len(views), dtype=torch.long),
        logits=torch.tensor([view[2] for view in views]),
    )


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


def test_softmaxes_are_averaged_and_not_logits():
    # The mean probability is (.54, .46), so class 0 wins; the mean logit would choose class 1.
    views = scores((1, 0, logs(0.98, 0.02)), (1, 1, logs(0.1, 0.9)))
    logit_mean = views.logits.mean(dim=0)
    assert logit_mean[0] > logit_mean[1]
    views = scores((1, 0, logs(0.999, 0.001)), (1, 1, logs(0.4, 0.6)), (1, 2, logs(0.05, 0.95)))
    assert views.logits.softmax(1).mean(0).argmax() == 1
    assert views.logits.mean(0).argmax() == 0
    assert merge_views(views, [clip(1, 1)], num_views=3)["top1"] == 100.0
    assert merge_views(views, [clip(1, 0)], num_views=3)["top1"] == 0.0


def test_top1_and_top5_are_percent_over_clips():
    falling = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    clips = [clip(1, 0), clip(2, 1), clip(3, 4), clip(4, 5)]
    merged = merge_views(scores(*((c.id, 0, falling) for c in clips)), clips, num_views=1)
    assert (merged["top1"], merged["top5"]) == (25.0, 75.0)
    assert (merged["top1_of_read"], merged["top5_of_read"]) == (25.0, 75.0)


def test_missing_clips_are_named_counted_as_wrong_and_reported_both_ways():
    clips = [clip(1, 0), clip(2, 0, "a/b.mp4"), clip(3, 1), clip(4, 0)]
    views = scores((1, 0, [2.0, 1.0]), (3, 0, [2.0, 1.0]), (4, 0, [2.0, 1.0]))
    merged = merge_views(views, clips, num_views=1)
    assert (merged["num_clips"], merged["num_missing"], merged["missing"]) == (4, 1, ["a/b.mp4"])
    assert merged["top1"] == 50.0
    assert merged["top1_of_read"] == pytest.approx(100 * 2 / 3)
    assert (merged["top5"], merged["top5_of_read"]) == (75.0, 100.0)


def test_a_clip_with_some_views_is_scored_by_them_and_named():
    clips = [clip(1, 0), clip(2, 1)]
    views = scores((1, 0, [2.0, 1.0]), (1, 1, [2.0, 1.0]), (2, 1, [1.0, 2.0]))
    merged = merge_views(views, clips, num_views=2)
    assert (merged["top1"], merged["num_missing"]) == (100.0, 0)
    assert (merged["num_incomplete"], merged["incomplete"]) == (1, ["2.mp4"])


def test_equal_file_names_in_two_folders_stay_two_clips():
    clips = [clip(1, 0, "a/x.mp4"), clip(2, 1, "b/x.mp4")]
    views = scores((1, 0, [9.0, 0.0]), (2, 0, [0.0, 1.0]))
    assert merge_views(views, clips, num_views=1)["top1"] == 100.0


def test_the_order_in_which_views_come_does_not_matter():
    rng = torch.Generator().manual_seed(0)
    clips = [clip(number, number % 3) for number in range(20)]
    rows = [(c.id, v, torch.randn(3, generator=rng).tolist()) for c in clips for v in range(4)]
    shuffled = [rows[i] for i in torch.randperm(len(rows), generator=rng)]
    first = merge_views(scores(*rows), clips, num_views=4)
    assert 0 < first["top1"] < 100
    assert merge_views(scores(*shuffled), clips, num_views=4) == first


# From here on with real videos: three classes told apart by brightness.
SIZE = schema.Size(width=32, depth=2, heads=2, pooled_width=16)


def write_video(path, level: int) -> None:
    rng = np.random.default_rng(level)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(10):
            noise = rng.integers(0, 40, (48, 64, 3))
            frame = av.VideoFrame.from_ndarray((level + noise).astype(np.uint8), "rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


@pytest.fixture
def recipe(tmp_path) -> schema.Recipe:
    lines = []
    for number in range(6):
        write_video(tmp_path / f"{number}.mp4", 20 + 60 * (number % 3))
        lines.append(f"{number}.mp4,{number % 3}")
    (tmp_path / "test.csv").write_text("\n".join(lines) + "\n")
    section = schema.ClipList(list=str(tmp_path / "test.csv"))
    return schema.Recipe(
        name="tiny",
        run=schema.Run(folder=str(tmp_path / "run")),
        data=schema.Data(
            train=section, test=section, views=schema.Views(frames=2, image_size=28), workers=1
        ),
        model=schema.Model(size=SIZE),
        objective=schema.Classify(kind="classify", num_classes=3),
        optim=schema.Optim(lr=1e-3, batch_size=2, epochs=1),
        evaluate=schema.Evaluate(clips=2, crops=3, batch_size=5),
    )


def make_model(recipe: schema.Recipe) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_classifier(recipe)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model.train()


def run(model, recipe, folder=None, **settings) -> dict:
    settings = {"split": "test", "num_clips": 2, "num_crops": 3, "device": CPU, **settings}
    return evaluate(model, recipe, folder=folder, **settings)


def test_every_view_is_scored_as_by_hand_and_written(recipe, tmp_path):
    model = make_model(recipe)
    result = run(model, recipe, tmp_path)
    assert model.training
    clips = read_list(recipe.data.test)
    sums = {}
    expected = []
    with torch.no_grad():
        for item in clips:
            for c in range(2):
                for j in range(3):
                    view = load_eval_view(
                        item,
                        clip_index=c,
                        num_clips=2,
                        crop_index=j,
                        num_crops=3,
                        views=recipe.data.views,
                    )
                    logits = model.eval()(collate([(Task(item), view)])["pixels"])[0]
                    expected.append((item.id, c, j, logits))
                    sums[item.id] = sums.get(item.id, 0) + logits.softmax(0) / 6
    found = load_file(tmp_path / "scores.safetensors")
    assert found["clip_id"].tolist() == [row[0] for row in expected]
    assert found["clip_index"].tolist() == [row[1] for row in expected]
    assert found["crop_index"].tolist() == [row[2] for row in expected]
    assert_close(found["logits"], torch.stack([row[3] for row in expected]))
    hits = sum(int(sums[item.id].argmax()) == item.label for item in clips)
    assert result["top1"] == pytest.approx(100 * hits / 6)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written == result
    assert (written["split"], written["clips"], written["crops"]) == ("test", 2, 3)
    assert (written["num_clips"], written["missing"], written["top5"]) == (6, [], 100.0)
    assert written["seconds"] > 0


def test_an_unreadable_video_is_missing_by_name_and_wrong(recipe, tmp_path, caplog):
    (tmp_path / "2.mp4").write_bytes(b"no video")
    (tmp_path / "4.mp4").unlink()
    result = run(make_model(recipe), recipe, tmp_path)
    assert result["missing"] == ["2.mp4", "4.mp4"]
    assert (result["num_clips"], result["num_missing"]) == (6, 2)
    assert result["top1"] == pytest.approx(result["top1_of_read"] * 4 / 6)
    assert "test: 2 of 6 clips could not be read and count as wrong, e.g. 2.mp4" in caplog.text
    assert len(load_file(tmp_path / "scores.safetensors")["clip_id"]) == 24


def test_nothing_readable_is_an_error(recipe, tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.mp4").unlink()
    with pytest.raises(StateError, match="none of 6 clips could be read"):
        run(make_model(recipe), recipe)


def test_scores_that_are_not_finite_name_the_clip(recipe):
    model = make_model(recipe)
    model.head.bias.data[1] = math.nan
    with pytest.raises(StateError, match=r"the model's scores of 0\.mp4 are not finite"):
        run(model, recipe)


def test_labels_outside_the_classes_are_refused_with_their_line(recipe, tmp_path):
    (tmp_path / "test.csv").write_text("0.mp4,0\n1.mp4,3\n2.mp4,-1\n")
    with pytest.raises(InputError) as caught:
        labelled_clips(recipe, "test")
    assert str(caught.value) == (
        f"{tmp_path}/test.csv:2: label 3, expected 0 to 2 (2 such lines); "
        "correct the list or objective.num_classes"
    )
    with pytest.raises(InputError, match=r"tiny: there is no data\.val; set data\.val\.list=FILE"):
        labelled_clips(recipe, "val")


def test_a_checkpoint_is_scored_by_its_own_head(recipe, tmp_path):
    model = make_model(recipe)
    write_tensors(tmp_path / "m.safetensors", model.state_dict(), metadata={"frames": "2"})
    result = evaluate_recipe(recipe, tmp_path / "m.safetensors")
    expected = run(model, recipe, tmp_path)
    assert result["top1"] == expected["top1"]
    folder = tmp_path / "run" / "evaluate-test"
    with safe_open(folder / "scores.safetensors", "pt") as file:
        assert file.metadata()["split"] == "test"
        assert_close(
            file.get_tensor("logits"), load_file(tmp_path / "scores.safetensors")["logits"]
        )
    assert json.loads((folder / "evaluation.json").read_text()) == result


def test_only_a_classifier_is_evaluated(recipe, tmp_path):
    teacher = schema.Teacher(size=SIZE, random=True)
    distill = recipe.model_copy(
        update={"objective": schema.Distill(kind="distill", teacher=teacher)}
    )
    with pytest.raises(InputError, match="tiny: objective.kind is 'distill'; only a classifier"):
        evaluate_recipe(distill, tmp_path / "m.safetensors")
