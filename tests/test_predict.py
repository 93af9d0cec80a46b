"""Trained models at work: that a video gets the scores of an evaluation, and kind refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fill import fill
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_runs import SIZE, classify, distil, write_video
from torch.testing import assert_close
from toys import load_here
from typer.testing import CliRunner

import distill
from distill import recipe as schema
from distill.checkpoint import write_tensors
from distill.cli import app
from distill.data.index import read_list
from distill.data.load import Task, collate, load_eval_view
from distill.errors import InputError
from distill.evaluation.evaluate import evaluate_recipe
from distill.evaluation.metrics import merge_views
from distill.evaluation.scores import read_evaluation
from distill.models import build_classifier, build_student
from distill.recipe_file import dump_recipe
from distill.use.describe import describe_model, find_weights, load_described, read_names
from distill.use.predict import find_videos

NAMES = ("dark", "grey", "a bright one")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Three videos with a list, class names, a classifier's weights and a student's."""
    folder = tmp_path_factory.mktemp("place")
    for number in range(3):
        write_video(folder / f"{number}.mp4", number)
    (folder / "val.csv").write_text("0.mp4,0\n1.mp4,1\n2.mp4,2\n")
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n\n")
    for recipe, build in ((classifier(folder), build_classifier), (student(folder), build_student)):
        Path(recipe.run.folder).mkdir()
        state = fill(build(recipe)).state_dict()
        write_tensors(weights(recipe), state, metadata=describe_model(recipe))
    return folder


def classifier(folder: Path, **changes) -> schema.Recipe:
    return classify(
        folder,
        **{
            "run__folder": str(folder / "run"),
            "objective__class_names": NAMES,
            "evaluate__crops": 3,
            "data__views__antialias": False,
            "objective__probe": "cls_avg1_proj",
            **changes,
        },
    )


def student(folder: Path) -> schema.Recipe:
    return distil(folder, "cached", run__folder=str(folder / "student"))


def weights(recipe: schema.Recipe) -> Path:
    return Path(recipe.run.folder) / "model.safetensors"


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_videos_get_the_scores_of_an_evaluation_and_broken_ones_are_named(
    place, tmp_path, monkeypatch
):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    done = run("predict", place / "run", broken, place / "val.csv", "--top", 2, "--json")
    assert done.exit_code == 2
    first, *others = json.loads(done.stdout)
    assert first["top"] is None
    assert first["problem"].startswith(f"{broken}: not a video")
    assert done.stderr.splitlines()[-2:] == [
        first["problem"],
        "1 of 4 videos could not be read in full",
    ]
    load_here(monkeypatch)
    recipe = classifier(place)
    evaluate_recipe(recipe, weights(recipe), folder=tmp_path)
    evaluation = read_evaluation(tmp_path / "scores.safetensors")
    answers = merge_views(evaluation.scores, evaluation.clips, num_classes=3)
    assert len(evaluation.scores.logits) == 3 * 2 * 3  # videos, clips, crops
    assert [result["video"] for result in others] == ["0.mp4", "1.mp4", "2.mp4"]
    for result, scores in zip(others, torch.from_numpy(answers.scores), strict=True):
        best, labels = scores.topk(2)
        assert [guess["label"] for guess in result["top"]] == labels.tolist()
        assert [guess["name"] for guess in result["top"]] == [NAMES[label] for label in labels]
        found = torch.tensor([guess["probability"] for guess in result["top"]])
        assert_close(found.double(), best, rtol=0, atol=1e-6)
        assert result["problem"] is None


def test_in_python_a_video_gets_the_same_in_three_lines(place, monkeypatch):
    load_here(monkeypatch)
    video = place / "1.mp4"
    model = distill.load_model(place / "run")
    guesses, vector = model.predict(video), model.features(video)
    (result,) = model.predict_all(find_videos([str(video)]), clips=None, crops=None, workers=1)
    assert sum(guess.probability for guess in guesses) == pytest.approx(1)
    for guess in guesses:
        assert guess.name == NAMES[guess.label]
        assert guess.probability == pytest.approx(result.values[guess.label], abs=1e-6)
    assert [guess.probability for guess in guesses] == sorted(
        (guess.probability for guess in guesses), reverse=True
    )
    assert vector.shape == (SIZE["pooled_width"],)
    assert len(model.predict(video, top=1, clips=1, crops=1)) == 1


def test_what_is_likeliest_is_printed_with_names_or_numbers(place, monkeypatch):
    load_here(monkeypatch)
    model = distill.load_model(place / "run")
    best = model.predict(place / "0.mp4")[0]
    lines = run("predict", place / "run", place / "0.mp4").stdout.splitlines()
    shown = lines[lines.index(str(place / "0.mp4")) + 1]
    assert shown == f"  {100 * best.probability:5.1f} %  {best.name}"
    nameless = classifier(place, objective__class_names=None)
    write_tensors(
        place / "nameless.safetensors",
        load_file(place / "run/model.safetensors"),
        metadata=describe_model(nameless),
    )
    done = run("predict", place / "nameless.safetensors", place / "0.mp4")
    assert f"%  class {best.label}\n" in done.stdout
    done = run(
        "predict",
        *(place / "nameless.safetensors", place / "0.mp4", "--names", place / "names.txt"),
    )
    assert f"%  {best.name}\n" in done.stdout


def test_features_are_the_pooled_vectors_of_a_students_backbone(place, tmp_path, monkeypatch):
    load_here(monkeypatch)
    recipe = student(place)
    out = tmp_path / "new/features.safetensors"
    done = run("features", place / "student", place / "val.csv", "--out", out, "--crops", 3)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == f"{out}: features 3 x 16"
    model = build_student(recipe).eval()
    model.load_state_dict(load_file(weights(recipe)))
    clips = read_list(recipe.data.val)
    expected = []
    for clip in clips:
        views = [
            load_eval_view(
                clip,
                clip_index=0,
                num_clips=1,
                crop_index=crop,
                num_crops=3,
                views=recipe.data.views,
            )
            for crop in range(3)
        ]
        pixels = collate([(Task(clip), view) for view in views])["pixels"]
        mask = torch.zeros(3, 1 + model.num_patches, dtype=torch.bool)
        with torch.no_grad():
            expected.append(model.decoder_inputs(pixels, mask).pooled.mean(0))
    assert_close(load_file(out)["features"], torch.stack(expected), rtol=1e-5, atol=1e-5)
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["names"]) == ["0.mp4", "1.mp4", "2.mp4"]
    vector = distill.load_model(place / "student").features(place / "2.mp4", crops=3)
    assert_close(vector, expected[2], rtol=1e-5, atol=1e-5)


def test_a_student_without_classes_says_so(place):
    done = run("predict", place / "student", place / "0.mp4")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == (
        f"{place}/student/model.safetensors: a distilled student has features and no classes; "
        "finetune it, or ask for features"
    )


def test_a_model_of_timms_is_used_alike(place, tmp_path, monkeypatch):
    load_here(monkeypatch)
    recipe = classifier(
        place,
        model={"timm": "test_resnet"},
        objective={"kind": "classify", "num_classes": 3},
        data__views__image_size=56,
    )
    model = fill(build_classifier(recipe)).eval()
    write_tensors(
        tmp_path / "model.safetensors", model.state_dict(), metadata=describe_model(recipe)
    )
    loaded = distill.load_model(tmp_path)
    view = load_eval_view(
        find_videos([str(place / "0.mp4")])[0],
        clip_index=0,
        num_clips=1,
        crop_index=0,
        num_crops=1,
        views=recipe.data.views,
    )
    with torch.no_grad():
        pixels = torch.from_numpy(view.pixels)[None]
        probabilities, pooled = model(pixels)[0].softmax(0), model.show(pixels)[1][0]
    best = loaded.predict(place / "0.mp4", clips=1, crops=1, top=1)[0]
    assert best.probability == pytest.approx(float(probabilities.max()), abs=1e-5)
    assert_close(loaded.features(place / "0.mp4"), pooled, rtol=1e-5, atol=1e-5)


def test_a_released_file_takes_its_recipe(place, tmp_path):
    recipe = classifier(place)
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    torch.save({"module": load_file(weights(recipe))}, tmp_path / "released.bin")
    with pytest.raises(InputError, match=r"released.bin: does not say which model it is of.*--rec"):
        load_described(tmp_path / "released.bin")
    model, description, _ = load_described(
        tmp_path / "released.bin", recipe=str(tmp_path / "r.yaml")
    )
    ours = load_file(weights(recipe))
    assert_close(dict(model.state_dict()), ours, rtol=0, atol=0)
    assert (description.clips, description.crops) == (2, 3)
    assert not description.views.antialias


def test_an_older_file_is_read_with_the_default_views(place, tmp_path, caplog):
    recipe = classifier(place)
    described = describe_model(recipe)
    for name in ("views", "evaluate", "precision", "class_names"):
        del described[name]
    path = tmp_path / "old.safetensors"
    write_tensors(path, load_file(weights(recipe)), metadata=described)
    _, found, _ = load_described(path)
    assert (found.views.frames, found.views.image_size) == (2, 28)
    assert (found.clips, found.crops, found.precision, found.class_names) == (4, 3, "fp32", ())
    assert f"{path}: does not say how frames are sampled; taken as sparse" in caplog.text


def test_names_of_a_file_fit_the_classes(place):
    assert read_names(str(place / "names.txt"), 3) == NAMES
    with pytest.raises(InputError, match=r"names.txt: 3 class names for a model of 4 classes; giv"):
        read_names(str(place / "names.txt"), 4)
    with pytest.raises(InputError, match=r"absent.txt: cannot read class names: No such file"):
        load_described(place / "run", names=str(place / "absent.txt"))
    with pytest.raises(InputError, match=r"has features and no classes; leave --names"):
        load_described(place / "student", names=str(place / "names.txt"))


def test_a_folder_without_weights_says_what_it_holds(place, tmp_path):
    with pytest.raises(InputError, match=f"holds several runs; name one of {place}/run, {place}/s"):
        find_weights(place)
    (tmp_path / "checkpoints/step-00000004").mkdir(parents=True)
    with pytest.raises(InputError, match=r"the run has not ended; finish it, or name .*/step-0+4$"):
        find_weights(tmp_path)


def test_videos_are_found_in_folders_and_lists_once(place, tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    for name in ("deep/b.mp4", "deep/er/a.MKV", "deep/notes.md"):
        (tmp_path / name).touch()
    frames = tmp_path / "frames"
    frames.mkdir()
    Image.new("RGB", (8, 8)).save(frames / "00001.jpg")
    places = [str(tmp_path / "deep"), str(frames), str(tmp_path / "deep/b.mp4")]
    found = [Path(clip.path).relative_to(tmp_path).as_posix() for clip in find_videos(places)]
    assert found == ["deep/b.mp4", "deep/er/a.MKV", "frames"]
    listed = find_videos([str(place / "val.csv")], prefix=str(tmp_path))
    assert [clip.path for clip in listed] == [f"{tmp_path}/{number}.mp4" for number in range(3)]
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"none: no video in it \(a file that ends in .3gp, "):
        find_videos([str(tmp_path / "none")])
    with pytest.raises(InputError, match=r"absent.mp4: no such video; check the path"):
        find_videos(["absent.mp4"])


def test_importing_the_package_loads_nothing_heavy():
    code = "import distill, sys; assert distill.load_model; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "distill" in loaded
    assert not {"torch", "numpy", "pydantic", "timm", "av", "distill.use.predict"} & set(loaded)
