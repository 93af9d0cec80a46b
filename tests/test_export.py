"""Exports: that each, loaded by its target's own loader, gives what the original gives."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from fill import fill
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny_runs import SIZE, classify, distil, write_video
from torch.testing import assert_close
from toys import load_here
from typer.testing import CliRunner

import distill.students.timm_models  # noqa: F401  registers the name
from distill import recipe as schema
from distill.checkpoint import write_tensors
from distill.cli import app
from distill.data.load import load_eval_view
from distill.errors import InputError, StateError
from distill.evaluation.evaluate import evaluate_recipe
from distill.models import build_classifier, build_student
from distill.recipe_file import dump_recipe
from distill.students.encoder import embed
from distill.students.hub import VideoModel
from distill.use import export as exporting
from distill.use.describe import describe_model
from distill.use.export import TARGETS, export
from distill.use.predict import find_videos

NAMES = ("dark", "grey", "bright")
CLOSE = {"rtol": 0, "atol": 1e-4}
# Loads graphs where this project cannot be imported, and runs them on batches of several sizes.
STRANGER = """
import sys
sys.modules["distill"] = None
import numpy, onnxruntime, torch
clips = numpy.load("clips.npy")
session = onnxruntime.InferenceSession("onnx/model.onnx", providers=["CPUExecutionProvider"])
program = torch.export.load("graph/model.pt2").module()
for size in (1, 2, 5):
    (logits,) = session.run(["logits"], {"clip": clips[:size]})
    numpy.save(f"onnx{size}.npy", logits)
    numpy.save(f"graph{size}.npy", program(torch.from_numpy(clips[:size])).detach().numpy())
"""


def classifier(folder: Path, **changes) -> schema.Recipe:
    """Everything random that training has, which an export must not have."""
    return classify(
        folder,
        **{
            "run__folder": str(folder / "run"),
            "model__tubelet": 2,
            "model__positions": "separable",
            "model__head_drop_path": 0.2,
            "model__weights": {"checkpoint": str(folder / "student")},
            "objective__probe": "attentive_mlp",
            "objective__class_names": NAMES,
            **changes,
        },
    )


def student(folder: Path) -> schema.Recipe:
    return distil(folder, "cached", run__folder=str(folder / "student"))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Videos, and the folders of two runs: a student's and that of the classifier made of it."""
    folder = tmp_path_factory.mktemp("place")
    for number in range(3):
        write_video(folder / f"{number}.mp4", number)
    (folder / "val.csv").write_text("0.mp4,0\n1.mp4,1\n2.mp4,2\n")
    for recipe, build in ((classifier(folder), build_classifier), (student(folder), build_student)):
        write(recipe, fill(build(recipe), positions=True), Path(recipe.run.folder))
        (Path(recipe.run.folder) / "recipe.yaml").write_text(dump_recipe(recipe))
    return folder


@pytest.fixture(scope="module")
def exports(place) -> tuple[Path, str]:
    """All exports of the classifier by one command, and what it printed."""
    to = [word for target in TARGETS for word in ("--to", target)]
    done = run("export", place / "run", *to, "--video", place / "1.mp4", "--licence", "mit")
    assert done.exit_code == 0, done.output
    return place / "run/export", done.output


def write(recipe: schema.Recipe, model: torch.nn.Module, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "model.safetensors"
    write_tensors(path, model.state_dict(), metadata=describe_model(recipe))
    return path


def original(recipe: schema.Recipe, path: Path) -> torch.nn.Module:
    model = build_classifier(recipe) if "classify" in recipe.objective.kind else None
    model = model or build_student(recipe)
    model.load_state_dict(load_file(path))
    return model.eval()


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def pixels_of(place: Path, recipe: schema.Recipe) -> torch.Tensor:
    """Five real views uint8 [5,3,T,S,S]."""
    views = [
        load_eval_view(
            clip,
            clip_index=index,
            num_clips=2,
            crop_index=0,
            num_crops=1,
            views=recipe.data.views,
        ).pixels
        for clip in find_videos([str(place / "val.csv")])
        for index in range(2)
    ]
    return torch.from_numpy(np.stack(views[:5]))


def as_config_says(pixels: torch.Tensor, folder: Path) -> np.ndarray:
    """Clips as a stranger makes them who has config.json alone."""
    section = json.loads((folder / "config.json").read_text())["preprocessing"]
    assert section["shape"] == ["batch", *pixels.shape[1:]]
    mean, std = (np.array(section[name])[:, None, None, None] for name in ("mean", "std"))
    return ((pixels.numpy() / 255 - mean) / std).astype(np.float32)


def test_graphs_run_where_this_project_is_not(place, exports, tmp_path):
    folder, _ = exports
    recipe = classifier(place)
    pixels = pixels_of(place, recipe)
    np.save(tmp_path / "clips.npy", as_config_says(pixels, folder / "onnx"))
    shutil.copytree(folder / "onnx", tmp_path / "onnx")
    shutil.copytree(folder / "torch-export", tmp_path / "graph")
    subprocess.run([sys.executable, "-I", "-c", STRANGER], cwd=tmp_path, check=True)
    with torch.no_grad():
        expected = original(recipe, place / "run/model.safetensors")(pixels)
    assert float(expected.std()) > 0.1
    for size in (1, 2, 5):
        for kind in ("onnx", "graph"):
            found = torch.from_numpy(np.load(tmp_path / f"{kind}{size}.npy"))
            assert_close(found, expected[:size], **CLOSE)


def test_nothing_random_is_left_in_a_graph(exports):
    program = torch.export.load(exports[0] / "torch-export/model.pt2")
    names = {str(node.target) for node in program.graph.nodes}
    assert not [name for name in names if "drop" in name or "rand" in name or "bernoulli" in name]
    assert any("scaled_dot_product" in name for name in names)


def test_weights_are_loaded_by_timm_the_hub_and_this_project(place, exports):
    folder, _ = exports
    recipe = classifier(place)
    pixels = pixels_of(place, recipe)
    clips = torch.from_numpy(as_config_says(pixels, folder / "timm"))
    ours = distill.load_model(folder / "safetensors")
    timms = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval()
    hubs = VideoModel.from_pretrained(folder / "hub")
    with torch.no_grad():
        expected = original(recipe, place / "run/model.safetensors")(pixels)
        for model in (ours.model, timms, hubs):
            assert_close(model(clips), expected, **CLOSE)
            assert_close(model(pixels[:1]), expected[:1], **CLOSE)
    assert ours.class_names == tuple(hubs.label_names) == NAMES
    assert timms.pretrained_cfg["label_names"] == list(NAMES)
    assert list(timm.data.resolve_model_data_config(timms)["std"]) == [0.229, 0.224, 0.225]


def test_timm_gives_features_or_another_classifier(place, exports):
    name = f"local-dir:{exports[0] / 'timm'}"
    recipe = classifier(place)
    pixels = pixels_of(place, recipe)
    with torch.no_grad():
        expected = embed(original(recipe, place / "run/model.safetensors"), pixels)
        found = timm.create_model(name, pretrained=True, num_classes=0).eval()(pixels)
        assert_close(found, expected, **CLOSE)
        other = timm.create_model(name, pretrained=True, num_classes=7)
    assert other(pixels).shape == (5, 7)
    assert_close(other.cls_token, load_file(place / "run/model.safetensors")["cls_token"])


def test_a_hub_model_is_saved_and_loaded_strictly(exports, tmp_path):
    VideoModel.from_pretrained(exports[0] / "hub").save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert_close(saved, load_file(exports[0] / "hub/model.safetensors"), rtol=0, atol=0)
    del saved["head.bias"]
    save_file(saved, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"head\.bias"):
        VideoModel.from_pretrained(tmp_path)


def test_what_is_written_is_printed_with_sizes_and_latencies(exports):
    folder, printed = exports
    for target in TARGETS:
        names = sorted(path.name for path in (folder / target).iterdir())
        assert f"{folder / target}: {', '.join(names)}\n" in printed
        size = sum(path.stat().st_size for path in (folder / target).iterdir())
        (row,) = [line for line in printed.splitlines() if line.startswith(f"│ {target} ")]
        _, megabytes, latency, before, difference = (cell.strip() for cell in row.split("│")[1:-1])
        assert megabytes == f"{size / 1e6:.1f}"
        assert float(latency) > 0 and float(before) > 0
        assert float(difference) < 1e-4


@pytest.mark.parametrize("target", ["timm", "torch-export"])
def test_a_student_is_exported_without_its_projectors(place, tmp_path, target):
    recipe = student(place)
    made = export(place / "student", target, folder=tmp_path / "out")
    pixels = pixels_of(place, recipe)
    model = original(recipe, place / "student/model.safetensors")
    mask = torch.zeros(5, 1 + model.num_patches, dtype=torch.bool)
    clips = torch.from_numpy(as_config_says(pixels, tmp_path / "out"))
    with torch.no_grad():
        expected = model.decoder_inputs(pixels, mask).pooled
        assert_close(exporting.load_target(made.folder, target)(clips), expected, **CLOSE)
    assert expected.shape == (5, SIZE["pooled_width"])
    if target == "timm":
        names = set(load_file(tmp_path / "out/model.safetensors"))
        assert names < set(model.state_dict())
        assert not [name for name in names if "decoder" in name or name.startswith("clip_pos")]
    else:
        program = torch.export.load(tmp_path / "out/model.pt2")
        assert not [name for name in program.state_dict if "decoder" in name]


@pytest.mark.parametrize("target", ["hub", "torch-export"])
def test_a_model_of_timms_is_exported(place, tmp_path, target):
    recipe = classify(
        place,
        model={"timm": "test_resnet"},
        objective={"kind": "classify", "num_classes": 3},
        data__views__image_size=56,
    )
    model = fill(build_classifier(recipe)).eval()
    write(recipe, model, tmp_path)
    made = export(tmp_path, target)
    pixels = pixels_of(place, recipe)
    clips = torch.from_numpy(as_config_says(pixels, made.folder))
    with torch.no_grad():
        found = exporting.load_target(made.folder, target)(clips)
        assert_close(found, model(pixels), **CLOSE)


def test_an_export_that_differs_is_not_kept(place, tmp_path, monkeypatch):
    def wrong(path, tensors, *, metadata):
        tensors = {**tensors, "head.bias": tensors["head.bias"] + 1e-3}
        write_tensors(path, tensors, metadata=metadata)

    monkeypatch.setattr(exporting, "write_tensors", wrong)
    with pytest.raises(StateError, match=r"timm export of .*: differs from the original by 0\.001"):
        export(place / "run", "timm", folder=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_is_replaced_and_nothing_else(place, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        export(place / "run", "safetensors", folder=out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    done = run("export", place / "run", "--to", "timm", "--out", mine)
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == (
        f"{mine}: is there and is no export; choose another place with --out"
    )
    assert (mine / "thesis.txt").exists()


def test_a_missing_package_is_named_with_what_installs_it(place, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name)
    )
    with pytest.raises(InputError) as raised:
        export(place / "run", "onnx")
    assert str(raised.value) == "--to onnx needs onnxscript: pip install 'distill-video[export]'"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--to", "tflite"],
            "--to tflite: no such target; choose of safetensors, timm, hub, onnx, torch-export",
        ),
        (
            ["--to", "timm", "--to", "hub", "--out", "x"],
            "--out is for one target; give one --to, or leave --out",
        ),
    ],
)
def test_what_cannot_be_meant_is_one_line(place, words, message):
    done = run("export", place / "run", *words)
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (2, message)


def test_a_card_tells_teacher_data_recipe_numbers_and_licence(place, tmp_path, monkeypatch):
    load_here(monkeypatch)
    recipe = classifier(place)
    shutil.copytree(place / "run", tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    path = tmp_path / "run/model.safetensors"
    result = evaluate_recipe(recipe, path, folder=tmp_path / "run/evaluate-test")
    export(tmp_path / "run", "hub", licence="mit")
    card = ModelCard.load(tmp_path / "run/export/hub/README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "video-classification")
    numbers = {one.metric_name: one.metric_value for one in card.data.eval_results}
    assert numbers["top-1 accuracy"] == round(result["top1"], 2)
    low, high = result["confidence_intervals"]["top1"]
    row = f"| top-1 accuracy | {result['top1']:.2f} | {low:.2f} to {high:.2f} |"
    assert row in card.text
    assert "On test, val.csv: 3 clips, 2 x 1 views of each, 0 unreadable" in card.text
    assert "1. **tiny**: distilled without labels from internvideo2 32 wide and 2 deep" in card.text
    assert "2. **tiny**: finetuned, 3 classes; data train.csv, 2 epochs of batches of" in card.text
    assert str(place) not in card.content and str(tmp_path) not in card.content
    # Numbers of other weights are not taken for this file's.
    state = load_file(path)
    state["head.bias"] += 1
    write_tensors(path, state, metadata=describe_model(recipe))
    export(tmp_path / "run", "hub")
    card = ModelCard.load(tmp_path / "run/export/hub/README.md")
    assert card.data.eval_results is None and card.data.license == "other"
    assert "Not evaluated: `distill evaluate` writes numbers" in card.text
