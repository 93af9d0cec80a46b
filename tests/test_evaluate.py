"""Views of real videos scored: that none is left out silently, and what is written of them."""

import csv
import json
import math

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

from distill import recipe as schema
from distill.checkpoint import write_tensors
from distill.data.index import read_list
from distill.data.load import Task, collate, load_eval_view
from distill.errors import InputError, StateError
from distill.evaluation.evaluate import evaluate, evaluate_recipe, labelled_clips
from distill.evaluation.metrics import RESAMPLES, measure
from distill.evaluation.scores import hash_pixels, read_evaluation, write_evaluation
from distill.models import build_classifier
from distill.students.warmstart import file_sha256

CPU = torch.device("cpu")


# Three classes told apart by brightness.
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


def read_csv(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


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
                    expected.append((item.id, c, j, hash_pixels(view.pixels), logits))
                    sums[item.id] = sums.get(item.id, 0) + logits.softmax(0) / 6
    found = load_file(tmp_path / "scores.safetensors")
    assert found["clip_id"].tolist() == [row[0] for row in expected]
    assert found["clip_index"].tolist() == [row[1] for row in expected]
    assert found["crop_index"].tolist() == [row[2] for row in expected]
    assert found["pixels_hash"].tolist() == [row[3] for row in expected]
    assert_close(found["logits"], torch.stack([row[4] for row in expected]))
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
    assert list(result["unreadable"]) == ["2.mp4", "4.mp4"]
    assert result["unreadable"]["4.mp4"] == f"{tmp_path}/4.mp4: no such video"
    assert (
        "test: 2 of 6 clips could not be read and count as wrong, e.g. 2.mp4 "
        f"({result['unreadable']['2.mp4']}); top-1 is" in caplog.text
    )
    assert len(load_file(tmp_path / "scores.safetensors")["clip_id"]) == 24
    # Written tables: class 1 has 1.mp4 and 4.mp4, the latter missing.
    rows = read_csv(tmp_path / "classes.csv")
    assert [(row["class"], row["clips"], row["read"]) for row in rows] == [
        ("0", "2", "2"),
        ("1", "2", "1"),
        ("2", "2", "1"),
    ]
    assert float(rows[0]["ap"]) > 0 and float(rows[1]["top1"]) <= 50
    confusion = read_csv(tmp_path / "confusion.csv")
    assert [row["missing"] for row in confusion] == ["0", "1", "1"]
    assert [sum(map(int, list(row.values())[1:])) for row in confusion] == [2, 2, 2]
    hits = sum(int(confusion[number][str(number)]) for number in range(3))
    assert result["top1"] == pytest.approx(100 * hits / 6)


def test_nothing_readable_is_an_error(recipe, tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.mp4").unlink()
    with pytest.raises(
        StateError, match=r"none of 6 clips could be read, e\.g\. .*0\.mp4: no such video"
    ):
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
        assert json.loads(file.metadata()["manifest"]) == result["manifest"]
        assert_close(
            file.get_tensor("logits"), load_file(tmp_path / "scores.safetensors")["logits"]
        )
    assert json.loads((folder / "evaluation.json").read_text()) == result
    ran = result["manifest"]["run"]
    assert ran["weights"] == str(tmp_path / "m.safetensors")
    assert ran["weights_sha256"] == file_sha256(tmp_path / "m.safetensors")


def test_every_number_comes_again_from_the_file_of_scores(recipe, tmp_path):
    """Without videos, weights or list, and with intervals and a missing clip among them."""
    lines = ["0.mp4,1.25,0,0.5,0", "0.mp4,1.25,0.5,1.25,1", "1.mp4,-1,-1,-1,1", "gone.mp4,2,0,1,2"]
    (tmp_path / "test.csv").write_text("\n".join(lines) + "\n")
    folder = tmp_path / "scored"
    folder.mkdir()
    result = run(make_model(recipe), recipe, folder)
    assert (result["num_clips"], result["num_videos"], result["num_missing"]) == (4, 3, 1)
    assert result["missing"] == ["gone.mp4 (0 to 1 s)"]
    assert result["confidence_intervals"]["resamples"] == RESAMPLES
    for path in [*tmp_path.glob("*.mp4"), tmp_path / "test.csv"]:
        path.unlink()
    read = read_evaluation(folder / "scores.safetensors")
    again = measure(read, resamples=RESAMPLES)
    assert again | {"seconds": result["seconds"]} == result
    write_evaluation(tmp_path / "copy.safetensors", read)
    copy = read_evaluation(tmp_path / "copy.safetensors")
    assert (copy.clips, copy.unreadable) == (read.clips, read.unreadable)


def test_what_is_no_file_of_scores_is_refused(recipe, tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(
        InputError, match=r"x\.safetensors: no such file; 'distill evaluate' writes"
    ):
        read_evaluation(path)
    path.write_bytes(b"\x80\x04no pickle is read")
    with pytest.raises(InputError, match=r"x\.safetensors: cannot be read as safetensors: "):
        read_evaluation(path)
    write_tensors(path, {"logits": torch.zeros(2, 3)}, metadata={"split": "test"})
    with pytest.raises(InputError) as caught:
        read_evaluation(path)
    assert str(caught.value) == (
        f"{path}: not a file of scores that this version reads (layout none, expected 1); "
        "evaluate again to make one"
    )


def test_the_manifest_says_what_was_asked_and_what_was_seen(recipe, tmp_path):
    model = make_model(recipe)
    first = run(model, recipe)["manifest"]
    assert first["question"].items() >= {"clips": 6, "classes": 3}.items()
    views = {"clips": 2, "crops": 3, "frames": 2, "image_size": 28, "sampling": {"kind": "sparse"}}
    assert first["views"].items() >= views.items()
    ran = first["run"]
    assert ran["list_sha256"] == file_sha256(tmp_path / "test.csv")
    assert (ran["precision"], ran["ranks"], ran["weights"]) == ("fp32", 1, None)
    assert sum(ran["decoders"].values()) == 36
    assert torch.__version__.startswith(ran["packages"]["torch"])

    # Another order and another batch size ask and see the same.
    lines = (tmp_path / "test.csv").read_text().splitlines()
    (tmp_path / "test.csv").write_text("\n".join(reversed(lines)) + "\n")
    batches = recipe.evaluate.model_copy(update={"batch_size": 4})
    again = run(model, recipe.model_copy(update={"evaluate": batches}))["manifest"]
    assert (again["question"], again["views"]) == (first["question"], first["views"])
    assert again["run"]["list_sha256"] != ran["list_sha256"]

    # Another video under a name, and another label, show.
    write_video(tmp_path / "3.mp4", 21)
    changed = run(model, recipe)["manifest"]
    assert changed["question"] == first["question"]
    assert changed["views"]["decoded"] != first["views"]["decoded"]
    (tmp_path / "test.csv").write_text("\n".join(lines).replace("3.mp4,0", "3.mp4,1") + "\n")
    assert run(model, recipe)["manifest"]["question"] != first["question"]


def test_which_views_a_damaged_clip_loses_does_not_depend_on_the_order(recipe, tmp_path):
    """A view that fails does not keep the clip's other views from being read."""
    (tmp_path / "test.csv").write_text("frames,10,0\n1.mp4,10,1\n")
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(10):
        rgb = np.full((48, 64, 3), 20 * number, np.uint8)
        Image.fromarray(rgb).save(folder / f"{number:05d}.png")
    (folder / "00003.png").write_bytes(b"no picture")  # frame 3 is in the first clip alone
    few = recipe.model_copy(
        update={"evaluate": recipe.evaluate.model_copy(update={"batch_size": 1})}
    )
    sampling = schema.SegmentSampling(kind="segment")
    views = recipe.data.views.model_copy(update={"sampling": sampling, "frames": 1})
    few = few.model_copy(update={"data": recipe.data.model_copy(update={"views": views})})
    result = run(make_model(few), few, tmp_path, num_clips=10, num_crops=1)
    read = load_file(tmp_path / "scores.safetensors")
    seen = read["clip_index"][read["clip_id"] == read_list(few.data.test)[0].id].tolist()
    assert seen == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert (result["missing"], result["incomplete"]) == ([], ["frames"])


def test_only_a_classifier_is_evaluated(recipe, tmp_path):
    teacher = schema.Teacher(size=SIZE, random=True)
    distill = recipe.model_copy(
        update={"objective": schema.Distill(kind="distill", teacher=teacher)}
    )
    with pytest.raises(InputError, match="tiny: objective.kind is 'distill'; only a classifier"):
        evaluate_recipe(distill, tmp_path / "m.safetensors")
