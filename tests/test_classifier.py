import math

import pytest
import torch
import torch.nn.functional as F
from fill import TOLERANCE, clip, fill, golden, golden_keys, golden_sections, keys_of

from distill.students import ViTSize, create_classifier

TINY = ViTSize(96, 4, 3, 4, 48)


def make_classifier(**changes):
    settings = {"num_classes": 7, "frames": 4, "image_size": 56, "activation": "gelu"}
    return create_classifier(TINY, **{**settings, **changes})


def probe_settings(title):
    probe, _, norm = title.partition("-")
    return {"probe": probe, **({"probe_norm": norm} if norm else {})}


PROBES = ["attentive_mlp", "cls_avg1-LN", "cls_avgN-BN", "cls_avgN_proj-LN"]


def test_logits_equal_the_reference():
    expected = golden("tiny_finetune")
    model = fill(make_classifier())
    torch.testing.assert_close(model(clip(2, 4, 56)), expected["logits"], **TOLERANCE)
    torch.testing.assert_close(model.pos_embed.data, expected["pos_embed"], rtol=0, atol=1e-6)


def test_state_dict_is_the_references():
    assert keys_of(make_classifier()) == golden_keys("tiny_finetune")


@pytest.mark.parametrize("title", PROBES)
def test_probe_logits_equal_the_reference(title):
    model = fill(make_classifier(**probe_settings(title))).eval()
    expected = golden("tiny_probes")[title]
    torch.testing.assert_close(model(clip(2, 4, 56)), expected, **TOLERANCE)


@pytest.mark.parametrize("title", PROBES)
def test_probe_state_dict_is_the_references(title):
    model = make_classifier(**probe_settings(title))
    assert keys_of(model) == golden_sections("tiny_probes")[title]


@pytest.mark.parametrize(
    ("size", "settings", "keys"),
    [
        ("S14", {}, 178),
        ("L14", {}, 334),
        ("1B", {}, 542),
        ("6B", {}, 646),
        ("S14", {"probe": "attentive_mlp"}, 184),
        ("L14", {"probe": "attentive_mlp"}, 340),
        ("1B", {"probe": "attentive_mlp"}, 548),
        ("6B", {"probe": "attentive_mlp"}, 652),
    ],
)
def test_published_models_have_the_published_number_of_keys(size, settings, keys):
    with torch.device("meta"):
        model = create_classifier(size, num_classes=400, **settings)
    assert len(model.state_dict()) == keys


@pytest.mark.parametrize(("size", "expected"), [("1B", 1_028_451_502), ("6B", 5_953_148_078)])
def test_attentive_probes_have_the_published_parameters(size, expected):
    with torch.device("meta"):
        model = create_classifier(size, num_classes=174, frames=16, probe="attentive_mlp")
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert sum(parameter.numel() for parameter in model.extra_mlp.parameters()) == 4_723_968


@pytest.mark.parametrize(
    ("probe", "features"),
    [
        (None, 768),
        ("cls_avg1", 2 * 384),
        ("cls_avgN", 768 * 9),
        ("cls_avg1_proj", 2 * 384 + 768),
        ("cls_avgN_proj", 768 * 10),
    ],
)
def test_heads_see_the_published_number_of_features(probe, features):
    with torch.device("meta"):
        model = create_classifier("S14", num_classes=174, probe=probe)
    assert model.head.in_features == features


def test_kaiming_batch_norm_has_no_gains_and_eps_1e_6():
    model = make_classifier(probe="cls_avg1_proj", probe_norm="kaiming_BN")
    names = [name for name in model.state_dict() if name.startswith("down")]
    assert names == [
        "down_norm.running_mean",
        "down_norm.running_var",
        "down_norm.num_batches_tracked",
    ]
    model.down_norm.running_mean.fill_(0.5)
    model.down_norm.running_var.fill_(1e-6)
    model = fill(model).eval()
    x = clip(2, 4, 56)
    h, _ = model.encode(model.select_patches(x, None)[0])
    merged = torch.stack([h[:, 0], h[:, 1:].mean(1)], dim=1)  # [B,2,D]
    merged = (merged - 0.5) / math.sqrt(2e-6)
    pooled = model.fc_norm(model.clip_projector(h)[0])
    # channel-major: the class token's and the mean's value of channel 0 stand side by side
    features = torch.cat([merged.transpose(1, 2).flatten(1), pooled], dim=1)
    torch.testing.assert_close(model(x), model.head(features), rtol=1e-4, atol=1e-3)


def test_batch_norm_probe_learns_its_statistics_over_clips_and_tokens():
    model = fill(make_classifier(probe="cls_avgN", probe_norm="BN")).train()
    x = clip(2, 4, 56)
    h, _ = model.encode(model.select_patches(x, None)[0])
    means = h[:, 1:].unflatten(1, (4, 16)).mean(2)
    merged = F.gelu(model.down[0](torch.cat([h[:, :1], means], dim=1)))
    model(x)
    expected = 0.1 * merged.mean((0, 1))
    torch.testing.assert_close(model.down_norm.running_mean, expected, rtol=1e-4, atol=1e-6)


def test_fc_norm_and_probe_norms_have_eps_1e_5():
    model = make_classifier(probe="attentive_mlp")
    merge = make_classifier(probe="cls_avgN")
    x = torch.tensor([1e-3, -1e-3]).repeat(24)
    for norm in (model.fc_norm, model.extra_mlp[0], merge.down_norm):
        torch.testing.assert_close(norm(x), x / math.sqrt(1e-6 + 1e-5))
    assert make_classifier(probe="cls_avg1", probe_norm="BN").down_norm.eps == 1e-5


def test_head_starts_a_thousand_times_smaller():
    torch.manual_seed(0)
    head = create_classifier(TINY, num_classes=400, frames=2, image_size=28).head
    assert head.weight.std().item() == pytest.approx(0.02 * 0.001, rel=0.02)
    assert head.bias.abs().max() == 0


def test_attentive_mlp_starts_as_the_identity():
    model = make_classifier(probe="attentive_mlp")
    plain = make_classifier()
    plain.load_state_dict(model.state_dict(), strict=False)
    x = clip(2, 4, 56)
    assert torch.equal(model(x), plain(x))
    assert model.extra_mlp[1].fc2.weight.abs().max() == 0
    assert model.extra_mlp[1].fc2.bias.abs().max() == 0
    assert model.extra_mlp[1].fc1.weight.abs().max() > 0


def test_fc_drop_acts_before_the_head_in_training_alone():
    model, plain = fill(make_classifier(fc_drop=1.0)), fill(make_classifier())
    x = clip(2, 4, 56)
    torch.testing.assert_close(model.train()(x), model.head.bias.expand(2, 7))
    torch.testing.assert_close(model.eval()(x), plain(x))


@pytest.mark.parametrize("probe", [None, "attentive_mlp", "cls_avg1_proj"])
def test_head_drop_path_drops_the_pooled_vector_in_training_alone(probe):
    model, plain = (
        fill(make_classifier(head_drop_path=rate, probe=probe)).train() for rate in (0.2, 0.0)
    )
    x = clip(2, 4, 56)
    found = model(x, head_keep=torch.tensor([0.0, 1.25]))
    with torch.no_grad():
        summary = plain.summary(plain.hidden(x)["hidden"])
        pooled = summary["pooled"] * torch.tensor([[0.0], [1.25]])
        expected = plain(features={**summary, "pooled": pooled})
    torch.testing.assert_close(found, expected)
    assert float((found - plain(x)).detach().abs().max()) > 1e-4
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))
    torch.testing.assert_close(
        model.head_keep(torch.tensor([0.1, 0.2, 0.9])), torch.tensor([0.0, 1.25, 1.25])
    )


def test_head_drop_path_is_a_rate():
    with pytest.raises(ValueError, match="head_drop_path must be at least 0 and below 1, got 1"):
        make_classifier(head_drop_path=1)


def test_drop_path_factors_reach_the_blocks():
    model = fill(make_classifier())
    x, keep = clip(2, 4, 56), torch.rand(8, 2)
    h, _ = model.encode(model.select_patches(x, None)[0], keep=keep)
    expected = model.head(model.fc_norm(model.clip_projector(h)[0]))
    torch.testing.assert_close(model(x, keep=keep), expected)


def test_uint8_clip_gives_logits_and_gradients():
    model = fill(make_classifier())
    model(torch.full((1, 3, 4, 56, 56), 255, dtype=torch.uint8))[0, 0].backward()
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0


def test_unknown_probes_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="unknown probe 'mean'; choose one of attentive_mlp, cls"):
        make_classifier(probe="mean")
    with pytest.raises(ValueError, match="unknown probe_norm 'GN'; choose one of LN, BN, kaim"):
        make_classifier(probe="cls_avg1", probe_norm="GN")
