"""Probes: what is trained, what the frozen backbone keeps, and what a weights file knows."""

import re

import pytest
import torch
from fill import clip, fill
from safetensors.torch import save_file
from torch.testing import assert_close

from distill import recipe as schema
from distill.checkpoint import write_tensors
from distill.checks.recipe import missing_inputs
from distill.errors import InputError
from distill.evaluation.evaluate import evaluate_recipe
from distill.models import build_classifier, load_recipe_weights
from distill.objective import ClassifyObjective
from distill.recipe_file import load_recipe
from distill.students import create_classifier, create_student
from distill.students.classifier import MERGES
from distill.students.vit import ViTSize
from distill.students.warmstart import WeightsError, file_sha256, load_weights
from distill.use.describe import describe_model

SIZE = {"width": 32, "depth": 2, "heads": 2, "pooled_width": 16}
TINY = ViTSize(**SIZE)
CLASSES = 3


def recipe(**changes) -> schema.Recipe:
    tree = {
        "name": "tiny",
        "data": {
            "train": {"list": "train.csv"},
            "val": {"list": "val.csv"},
            "test": {"list": "test.csv"},
            "views": {"frames": 2, "image_size": 28},
        },
        "model": {"size": SIZE},
        "objective": {"kind": "classify", "num_classes": CLASSES, "trainable": "head"},
        "optim": {"lr": 1e-2, "batch_size": 4, "epochs": 2},
    }
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        section = tree
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return schema.Recipe.model_validate(tree)


def objective(**changes) -> ClassifyObjective:
    one = recipe(**changes)
    return ClassifyObjective(fill(build_classifier(one)), one.objective, seed=0)


def batch(size: int = 4) -> dict:
    return {
        "clip_id": torch.arange(size),
        "pixels": clip(size, 2, 28),
        "label": torch.arange(size) % CLASSES,
        "epoch": 0,
    }


def trained(size, trainable, classes=400, **settings) -> dict[str, int]:
    """Trained parameters of a published size, by the first part of their names."""
    with torch.device("meta"):
        model = create_classifier(size, num_classes=classes, frames=16, **settings)
        section = schema.Classify(kind="classify", num_classes=classes, trainable=trainable)
        ClassifyObjective(model, section, seed=0)
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.split(".")[0]
            counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


# What is trained


@pytest.mark.parametrize(("size", "pool"), [("1B", 7_042_176), ("6B", 33_207_168)])
def test_an_attentive_probe_trains_the_published_parameters(size, pool):
    counts = trained(size, "pool")
    assert counts.pop("clip_projector") == pool
    assert counts == {"fc_norm": 1_536, "head": 309_136 - 1_536}
    counts = trained(size, "pool", probe="attentive_mlp")
    assert counts.pop("extra_mlp") == 4_723_968
    assert counts == {"clip_projector": pool, "fc_norm": 1_536, "head": 307_600}


@pytest.mark.parametrize(
    ("probe", "norm", "expected"),
    [
        (None, "LN", {"fc_norm": 1_536, "head": 174 * 769}),
        ("cls_avg1", "LN", {"down_norm": 2 * 1408, "head": 174 * (2 * 1408 + 1)}),
        (
            "cls_avg1_proj",
            "BN",
            {"fc_norm": 1_536, "down_norm": 2 * 1408, "head": 174 * (2 * 1408 + 769)},
        ),
        ("cls_avgN", "kaiming_BN", {"down": 768 * 1409, "head": 174 * (768 * 17 + 1)}),
        (
            "cls_avgN_proj",
            "LN",
            {
                "fc_norm": 1_536,
                "down": 768 * 1409,
                "down_norm": 1_536,
                "head": 174 * (768 * 18 + 1),
            },
        ),
    ],
)
def test_a_linear_probe_trains_its_head_and_norms_alone(probe, norm, expected):
    """Upstream's merges without the pooled vector compute `fc_norm` and throw it away."""
    assert trained("1B", "head", 174, probe=probe, probe_norm=norm) == expected


@pytest.mark.parametrize("changes", [{}, {"probe": "cls_avgN_proj"}, {"trainable": "pool"}])
def test_a_frozen_backbone_keeps_no_activations(changes):
    probe = objective(**{f"objective__{name}": value for name, value in changes.items()})
    inputs = {name: value for name, value in batch().items() if name != "pixels"}
    frozen = {id(p) for p in probe.parameters() if not p.requires_grad}
    kept = []

    def keep(tensor):
        if id(tensor) not in frozen:
            kept.append(tensor.numel())
        return tensor

    losses = {}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses["whole"] = probe({**inputs, "pixels": batch()["pixels"]})["loss"]
        from_pixels, kept = sum(kept), []
        with torch.no_grad():
            h = probe.model.hidden(batch()["pixels"])
            given = h if changes.get("trainable") else probe.model.summary(h["hidden"])
        losses["features"] = probe({**inputs, "features": given})["loss"]
    assert from_pixels == sum(kept)
    assert_close(losses["whole"], losses["features"], rtol=0, atol=0)
    losses["whole"].backward()
    assert {name.split(".")[0] for name, p in probe.model.named_parameters() if p.grad is not None}
    assert all(p.grad is None for p in probe.parameters() if not p.requires_grad)


def test_the_backward_ends_at_the_features():
    probe = objective(objective__trainable="pool")
    probe.model.requires_grad_(True)
    probe(batch())["loss"].backward()
    reached = {
        name.split(".")[0] for name, p in probe.model.named_parameters() if p.grad is not None
    }
    assert reached == {"clip_projector", "fc_norm", "head"}


@pytest.mark.parametrize("norm", ["LN", "BN", "kaiming_BN"])
@pytest.mark.parametrize("probe", MERGES)
def test_the_same_logits_come_from_pixels_and_from_features(probe, norm):
    model = fill(build_classifier(recipe(objective__probe=probe, objective__probe_norm=norm)))
    model.eval()
    x = clip(2, 2, 28)
    hidden = model.hidden(x)
    summary = model.summary(hidden["hidden"])
    assert summary["tokens"].shape == (2, 3 if "avgN" in probe else 2, 32)
    assert ("pooled" in summary) == probe.endswith("_proj")
    for features in (hidden, summary):
        assert_close(model(features=features), model(x), rtol=0, atol=0)


def test_a_linear_probe_normalises_with_the_statistics_of_its_batch_and_keeps_a_mean():
    probe = objective(objective__probe="cls_avg1", objective__probe_norm="BN").train()
    tokens = probe.model.summary(probe.model.hidden(batch()["pixels"])["hidden"])["tokens"]
    probe(batch())
    expected = 0.1 * tokens.mean((0, 1))
    assert_close(probe.model.down_norm.running_mean, expected, rtol=1e-4, atol=1e-6)


# What a weights file knows


def save(path, one: schema.Recipe):
    model = fill(build_classifier(one))
    write_tensors(path, model.state_dict(), metadata=describe_model(one))
    return model


def test_a_weights_file_says_which_probe_it_holds(tmp_path):
    one = recipe(objective__probe="cls_avg1_proj", objective__probe_norm="BN")
    assert describe_model(one)["probe"] == "cls_avg1_proj"
    assert describe_model(one)["probe_norm"] == "BN"
    assert "probe" not in describe_model(recipe())
    file = tmp_path / "m.safetensors"
    model = save(file, one)
    again = build_classifier(one)
    load_weights(again, file, head="keep")
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_another_probe_than_the_files_is_refused_by_name(tmp_path):
    file = tmp_path / "m.safetensors"
    save(file, recipe(objective__probe="cls_avgN", objective__probe_norm="LN"))
    other = recipe(objective__probe="cls_avgN", objective__probe_norm="BN")
    message = (
        f"{file}: its head is for probe cls_avgN with LN, the model's for cls_avgN with BN; set "
        "objective.probe and probe_norm to the file's, or head to reset"
    )
    with pytest.raises(WeightsError, match=f"^{re.escape(message)}$"):
        evaluate_recipe(other, file)
    with pytest.raises(WeightsError, match="probe cls_avgN with LN, the model's for none;"):
        evaluate_recipe(recipe(), file)
    plain = tmp_path / "plain.safetensors"
    save(plain, recipe())
    with pytest.raises(WeightsError, match="probe none, the model's for attentive_mlp;"):
        evaluate_recipe(recipe(objective__probe="attentive_mlp"), plain)
    attentive = build_classifier(recipe(objective__probe="attentive_mlp"))
    report = load_weights(attentive, plain, head="reset")  # its own head stays
    assert {name.split(".")[0] for name in report.left_at_init} == {"extra_mlp", "head"}


# weights.extra: a stage-2 file over the base


def save_stage2(path, *, frames: int = 1) -> dict[str, torch.Tensor]:
    """As upstream's: a student with linear decoders as the vision encoder of a larger model."""
    model = create_student(
        TINY, frames=frames, image_size=28, teacher_width=24, teacher_pooled=16, num_layers=1,
        decoder="linear",
    )  # fmt: skip
    state = fill(model, positions=True).state_dict()
    state = {name: 1.5 * value for name, value in state.items()}
    vision = {f"vision_encoder.{name}": value for name, value in state.items()}
    torch.save({"module": {**vision, "temp": torch.ones(())}}, path)
    return state


def test_an_extra_file_is_read_over_the_first(tmp_path):
    base = fill(build_classifier(recipe()), positions=True).state_dict()
    save_file(base, tmp_path / "base.safetensors")
    stage2 = save_stage2(tmp_path / "stage2.pth")
    weights = {
        "checkpoint": str(tmp_path / "base.safetensors"),
        "head": "keep",
        "extra": {
            "checkpoint": str(tmp_path / "stage2.pth"),
            "frames": 1,
            "sha256": file_sha256(tmp_path / "stage2.pth"),
        },
    }
    model = build_classifier(recipe())
    reports = load_recipe_weights(model, schema.Weights.model_validate(weights))
    state = model.state_dict()
    for name, value in state.items():
        if name.startswith(("fc_norm.", "head.")):
            assert_close(value, base[name], rtol=0, atol=0)
        elif name != "pos_embed":
            assert_close(value, stage2[name], rtol=0, atol=0)
    # One frame's table goes to each of the two.
    rows = stage2["pos_embed"]
    assert_close(state["pos_embed"], torch.cat([rows, rows[:, 1:]], dim=1))
    first, second = (report.lines() for report in reports)
    assert first == [f"{tmp_path}/base.safetensors: {len(base)} tensors taken as they are"]
    assert second == [
        f"{tmp_path}/stage2.pth: {len(base) - 5} tensors taken as they are",
        "resized: pos_embed, 1x2x2 -> 2x2x2 patches",
        "left as they were: fc_norm.* (2), head.* (2)",
        "unused: clip_pos_embed, clip_decoder.* (4), final_clip_decoder.* (4), temp",
    ]


def test_an_extra_file_is_checked_like_the_first(tmp_path):
    base, stage2 = tmp_path / "base.safetensors", tmp_path / "stage2.pth"
    save_file(build_classifier(recipe()).state_dict(), base)
    save_stage2(stage2)
    model = build_classifier(recipe())

    def refusal(checkpoint, **settings) -> str:
        extra = {"checkpoint": str(checkpoint), **settings}
        weights = schema.Weights.model_validate({"checkpoint": str(base), "extra": extra})
        with pytest.raises(WeightsError) as caught:
            load_recipe_weights(model, weights)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert refusal(stage2, sha256="ab").startswith(f"{stage2}: sha256 is ")
    assert refusal(base).startswith(
        f"{base}: expected a multi-modality checkpoint with vision_encoder.* entries, found blocks"
    )
    assert refusal(tmp_path / "gone.pth").startswith(f"{tmp_path}/gone.pth: no such file")
    assert "4 patch positions, which are not 8 square grids" in refusal(stage2, frames=8)
    state = {f"vision_encoder.{name}": value for name, value in model.state_dict().items()}
    partial = {name: value for name, value in state.items() if ".blocks.1" not in name}
    torch.save(partial, tmp_path / "partial.pth")
    assert "blocks.* (13) of the model would stay at init" in refusal(tmp_path / "partial.pth")


CLASSIFY = """
data:
  train: {list: train.csv}
  val: {list: val.csv}
  test: {list: test.csv}
  views: {frames: 2, image_size: 28}
model: {size: {width: 32, depth: 2, heads: 2}}
objective: {kind: classify, num_classes: 3, trainable: head}
optim: {lr: 1.0e-2, batch_size: 4, epochs: 2}
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(CLASSIFY)
    return "r.yaml"


def test_a_missing_extra_file_is_named_with_its_source(written, tmp_path):
    (tmp_path / "base.pth").write_text("")
    weights = "model.weights={checkpoint: base.pth, extra: {checkpoint: s2.pth, source: the hub}}"
    lines = missing_inputs(load_recipe(written, [weights]), "train")
    assert lines[-1] == (
        "model.weights.extra.checkpoint: s2.pth: no such file (the hub); "
        "set model.weights.extra.checkpoint=PATH"
    )


FEATURES = "objective.features={folder: f}"
SWEEP = "objective.sweep={lrs: [1e-2, 1e-3]}"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["objective.trainable=pool", "objective.probe=cls_avg1"],
         "objective.probe=cls_avg1: cls_avg1 is a linear probe; set objective.trainable=head"),
        (["objective.probe=attentive_mlp"],
         "objective.probe=attentive_mlp: attentive_mlp is trained with the pool; set "
         "trainable=pool"),
        (["objective.probe_norm=BN"], "objective.probe_norm=BN: has no effect without a probe of "
         "cls_avg1, cls_avgN, cls_avg1_proj, cls_avgN_proj"),
        (["objective.trainable=all", FEATURES], f"{FEATURES}: is for probes, whose backbone is "
         "frozen; set objective.trainable to head or pool"),
        (["objective.trainable=all", SWEEP], f"{SWEEP}: is for probes, whose backbone is frozen; "
         "set objective.trainable to head or pool"),
        (["model.drop_path=0.1"],
         "model.drop_path=0.1: must be 0, as objective.trainable=head freezes the blocks"),
        (["model.checkpoint_blocks=1"],
         "model.checkpoint_blocks=1: must be 0, as objective.trainable=head freezes the blocks"),
        (["optim.layer_decay=0.9"],
         "optim.layer_decay=0.9: must be 1, as no block of a probe is trained"),
        ([FEATURES, "objective.mixing={}"], "objective.mixing={}: mixes pixels, which cached "
         "features no longer have; drop mixing or features"),
        ([FEATURES, "data.augment.repeats=2"], "data.augment.repeats=2: must be 1 with cached "
         "features; raise objective.features.views instead"),
        (["objective.sweep={lrs: [1e-2, 0.01]}"],
         "objective.sweep={lrs: [1e-2, 0.01]}: objective.sweep.lrs: holds a value twice"),
        ([SWEEP, "optim.min_lr=2e-3"],
         "optim.min_lr=2e-3: must be at most the sweep's smallest lr, 0.001"),
        ([SWEEP, "data.val=null"],
         "data.val=null: missing: a sweep chooses on it; set data.val.list=FILE"),
        ([SWEEP, "data.test=null"],
         "data.test=null: missing: a sweep reports on it; set data.test.list=FILE"),
        ([SWEEP, "evaluate.every_epochs=0"],
         "evaluate.every_epochs=0: must be 1 to optim.epochs, 2, as a sweep chooses on val; got 0"),
        ([SWEEP, "evaluate.split=val"],
         "evaluate.split=val: must be 'test', as a sweep's settings are chosen on val"),
        ([SWEEP, "optim.clip_grad=1"],
         "optim.clip_grad=1: must be null, as its norm would be over all of a sweep"),
        ([SWEEP, "optim.precision=fp16"], "optim.precision=fp16: must be fp32 or bf16: a loss "
         "scale would be over all probes"),
        ([SWEEP, "optim.ema=0.9"], "optim.ema=0.9: must be null with a sweep"),
        (["model.weights={checkpoint: a.pth, extra: {checkpoint: 'stage:x'}}"],
         "model.weights={checkpoint: a.pth, extra: {checkpoint: 'stage:x'}}: "
         "model.weights.extra.checkpoint: must be a file; stages have no vision encoder to take"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_in_one_line(written, overrides, line):
    with pytest.raises(InputError) as caught:
        load_recipe(written, overrides)
    assert line in str(caught.value).splitlines()


def test_a_teacher_has_no_extra_file(written):
    objective = (
        "objective={kind: distill, targets: live, teacher: {size: S14, layers: 2, interval: 1, "
        "weights: {checkpoint: a, extra: {checkpoint: b}}}}"
    )
    with pytest.raises(InputError, match="weights.extra: is for model.weights alone"):
        load_recipe(written, [objective])
