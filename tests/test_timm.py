import pytest
import timm
import torch
from fill import clip

import distill.students.timm_models  # noqa: F401  registers the names
from distill.students import SIZES, VideoClassifier
from distill.students.student import DistillStudent

NAMES = [
    f"internvideo2{infix}_{size}_patch14_224"
    for infix in ("", "_cat", "_ap")
    for size in ("small", "base", "large", "1B", "6B")
] + [f"distill_internvideo2_{size}_patch14_224" for size in ("small", "base", "large")]


def create(name, **settings):
    with torch.device("meta"):
        return timm.create_model(name, **settings)


def test_all_of_upstreams_names_are_registered():
    found = timm.list_models("*internvideo2_*patch14_224")
    assert sorted(found) == sorted(NAMES)


@pytest.mark.parametrize(
    ("name", "size"),
    [("small", "S14"), ("base", "B14"), ("large", "L14"), ("1B", "1B"), ("6B", "6B")],
)
def test_a_name_builds_its_size(name, size):
    model = create(f"internvideo2_{name}_patch14_224", num_classes=174)
    assert isinstance(model, VideoClassifier)
    assert model.size == SIZES[size]
    assert model.head.out_features == 174


@pytest.mark.parametrize(("name", "size"), [("small", "S14"), ("base", "B14"), ("large", "L14")])
def test_a_distill_name_builds_its_student(name, size):
    model = create(f"distill_internvideo2_{name}_patch14_224", decoder="linear")
    assert isinstance(model, DistillStudent)
    assert model.size == SIZES[size]
    assert len(model.clip_decoder) == 6
    assert isinstance(model.clip_decoder[0].head, torch.nn.Linear)


def test_cat_and_ap_names_build_the_published_probes():
    cat = create("internvideo2_cat_small_patch14_224", frames=16)
    assert (cat.probe, cat.probe_norm, cat.head.in_features) == ("cls_avgN_proj", "LN", 768 * 18)
    assert create("internvideo2_ap_small_patch14_224").probe == "attentive_mlp"


def test_a_model_from_timm_runs():
    model = timm.create_model(
        "internvideo2_small_patch14_224", num_classes=5, frames=1, image_size=28
    )
    assert model(clip(1, 1, 28)).shape == (1, 5)


def test_misspelt_settings_are_refused():
    with pytest.raises(TypeError, match="num_frames"):
        create("internvideo2_small_patch14_224", num_frames=16)


def test_timm_has_no_weights_for_them():
    with pytest.raises(ValueError, match="timm has no weights for it; build it without pretrain"):
        create("internvideo2_small_patch14_224", pretrained=True)
