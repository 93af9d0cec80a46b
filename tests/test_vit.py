import math

import pytest
import torch
import torch.nn.functional as F
from fill import clip, fill
from torch import nn

from distill.kernels.patch_embed import normalize_patches
from distill.students import SIZES, ViTSize, create_classifier, create_student
from distill.students.vit import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MLP,
    Block,
    LayerScale,
    VideoViT,
    patchify,
    resolve_size,
    separable_tables,
    sincos_table,
    take_rows,
    visible_tokens,
)
from distill.teachers import create_teacher

TINY = ViTSize(96, 4, 3, 4, 48)


def make_vit(size=TINY, *, frames=2, image_size=28, **settings):
    vit = VideoViT(size, frames=frames, image_size=image_size, **settings)
    vit.init_weights()
    return vit


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def build_meta(build, *args, **settings):
    with torch.device("meta"):
        return build(*args, **settings)


# The published sizes

BACKBONES = {
    "S14": (23_043_840, 174),
    "B14": (89_438_976, 174),
    "L14": (308_929_280, 330),
    "1B": (1_020_708_608, 538),
    "6B": (5_941_735_168, 642),
}


@pytest.mark.parametrize("size", BACKBONES)
def test_backbone_has_the_published_parameters_and_keys(size):
    teacher = build_meta(create_teacher, size, num_layers=1, random=True)
    assert (count(teacher), len(teacher.state_dict())) == BACKBONES[size]


PARTS = {  # one block, patch embedding, class token and positions, attention pool
    "S14": (1_774_080, 226_176, 787_200, 741_504),
    "B14": (7_087_104, 452_352, 1_574_400, 2_366_976),
    "L14": (12_595_200, 603_136, 2_099_200, 3_942_144),
    "1B": (25_248_768, 829_312, 2_886_400, 7_042_176),
    "6B": (122_918_400, 1_884_800, 6_560_000, 33_207_168),
}


@pytest.mark.parametrize("size", PARTS)
def test_every_part_has_the_published_parameters(size):
    vit = build_meta(VideoViT, SIZES[size], frames=8, image_size=224)
    embeddings = vit.cls_token.numel() + vit.pos_embed.numel()
    parts = (count(vit.blocks[0]), count(vit.patch_embed), embeddings, count(vit.clip_projector))
    assert parts == PARTS[size]


@pytest.mark.parametrize(
    ("size", "classes", "frames", "expected"),
    [
        ("S14", 400, 8, 23_352_976),
        ("B14", 400, 8, 89_748_112),
        ("L14", 400, 8, 309_238_416),
        ("1B", 400, 8, 1_021_017_744),
        ("6B", 400, 8, 5_942_044_304),
        ("S14", 710, 8, 23_591_366),
        ("B14", 710, 8, 89_986_502),
        ("L14", 710, 8, 309_476_806),
        ("1B", 710, 8, 1_021_256_134),
        ("6B", 710, 8, 5_942_282_694),
        ("S14", 400, 16, 24_139_408),
        ("B14", 400, 16, 91_320_976),
        ("L14", 400, 16, 311_335_568),
        ("1B", 400, 16, 1_023_901_328),
        ("6B", 400, 16, 5_948_597_904),
    ],
)
def test_classifier_has_the_published_parameters(size, classes, frames, expected):
    model = build_meta(create_classifier, size, num_classes=classes, frames=frames)
    assert count(model) == expected


@pytest.mark.parametrize(
    ("size", "total", "middle", "final", "table"),
    [
        ("S14", 29_169_792, 4_156_416, 1_182_720, 786_816),
        ("B14", 102_252_288, 10_056_960, 1_182_720, 1_573_632),
        ("L14", 327_183_872, 14_973_696, 1_182_720, 2_098_176),
    ],
)
def test_student_has_the_published_parameters(size, total, middle, final, table):
    student = build_meta(create_student, size)
    parts = (
        count(student),
        count(student.clip_decoder),
        count(student.final_clip_decoder),
        student.clip_pos_embed.numel(),
    )
    assert parts == (total, middle, final, table)
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize(
    ("size", "heads", "head_width", "hidden"),
    [
        ("S14", 6, 64, 1536),
        ("B14", 12, 64, 3072),
        ("L14", 16, 64, 4096),
        ("1B", 16, 88, 6144),
        ("6B", 25, 128, 12800),
    ],
)
def test_heads_and_hidden_widths_are_the_published_ones(size, heads, head_width, hidden):
    block = build_meta(Block, SIZES[size], activation="gelu_tanh")
    assert (block.attn.heads, SIZES[size].width // heads) == (heads, head_width)
    assert block.mlp.fc1.out_features == hidden


def test_unknown_size_lists_the_names():
    with pytest.raises(ValueError, match="unknown model size 'M14'; choose one of S14, B14, L14"):
        resolve_size("M14")


def test_width_must_divide_into_heads():
    with pytest.raises(ValueError, match="width 96 must be divisible by 16 and by the number of"):
        ViTSize(96, 4, 5)


# Patches


@pytest.mark.parametrize("tubelet", [1, 2])
def test_patchify_feeds_the_linear_form_of_the_convolution(tubelet):
    x = clip(2, 4, 28)
    conv = nn.Conv3d(3, 8, (tubelet, 14, 14), stride=(tubelet, 14, 14))
    expected = conv(x).flatten(2).transpose(1, 2)
    found = F.linear(patchify(x, tubelet=tubelet), conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(found, expected)


def test_uint8_is_normalised_with_imagenet_statistics():
    pixels = torch.randint(0, 256, (2, 3, 2, 28, 28), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)
    expected = patchify((pixels / 255 - mean) / std)
    torch.testing.assert_close(
        normalize_patches(patchify(pixels), IMAGENET_MEAN, IMAGENET_STD), expected
    )


@pytest.mark.parametrize("tubelet", [1, 2])
def test_uint8_clip_gives_what_its_normalised_clip_gives(tubelet):
    vit = fill(make_vit(tubelet=tubelet))
    pixels = torch.randint(0, 256, (2, 3, 2, 28, 28), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)
    found, _ = vit.encode(vit.select_patches(pixels, None)[0])
    expected, _ = vit.encode(vit.select_patches((pixels / 255 - mean) / std, None)[0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_visible_tokens_are_ascending_patch_indices():
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 0] = False
    mask[0, [3, 1]] = False
    mask[1, [6, 2]] = False
    assert visible_tokens(mask).tolist() == [[0, 2], [1, 5]]


@pytest.mark.parametrize("dropped", [(0, 0), (1, 3)], ids=["class token", "uneven"])
def test_mask_that_drops_the_class_token_or_is_uneven_is_refused(dropped):
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[dropped] = True
    with pytest.raises(ValueError, match="keep the class token and equally many patches"):
        visible_tokens(mask)


def test_take_rows_gathers_from_shared_and_own_tables():
    table = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
    index = torch.tensor([[3, 0], [1, 1]])
    own = torch.stack([table[0, [3, 0]], table[1, [1, 1]]])
    shared = torch.stack([table[0, [3, 0]], table[0, [1, 1]]])
    assert torch.equal(take_rows(table, index), own)
    assert torch.equal(take_rows(table[:1], index), shared)
    assert torch.equal(take_rows(table[:1], index[:1]), shared[:1])


def test_wrong_clip_and_patches_are_refused_with_both_shapes():
    vit = make_vit()
    with pytest.raises(ValueError, match=r"expected a clip \[B,3, 2, 28, 28\], got \[1, 3, 4, 28"):
        vit.select_patches(clip(1, 4, 28), None)
    with pytest.raises(ValueError, match=r"expected patches \[B,8,588\], got \[1, 5, 588\]"):
        vit.encode(torch.zeros(1, 5, 588))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 30}, "2 frames of 30 px do not divide"),
        ({"frames": 3, "tubelet": 2}, "3 frames of 28 px do not divide into tubelets of 2"),
        ({"drop_path": 1.0}, "drop_path must be at least 0 and below 1, got 1.0"),
        ({"activation": "relu"}, "activation must be one of gelu_tanh, gelu"),
        ({"positions": "split"}, "positions one of joint, separable, got 'gelu_tanh' and 'split'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_vit(**settings)


# Positions


def test_joint_table_holds_the_published_check_values():
    table = sincos_table(384, (8, 16, 16))[0]
    assert table.shape == (2049, 384)
    assert table[0].abs().max() == 0
    assert table[1 + 256, 0].item() == pytest.approx(math.sin(1), abs=1e-7)  # frame 1
    assert table[1 + 1, 96].item() == pytest.approx(math.sin(1), abs=1e-7)  # column 1
    assert table[1 + 16, 240].item() == pytest.approx(math.sin(1), abs=1e-7)  # row 1
    assert table[1, [0, 96, 240]].abs().max() == 0


@pytest.mark.parametrize("width", [96, 1408])
def test_joint_table_follows_the_formula_everywhere(width):
    def code(position, d):
        angles = [position * 10000 ** (-k / (d / 2)) for k in range(d // 2)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

    table = sincos_table(width, (3, 2, 5))[0, 1:]
    for index, (t, row, column) in enumerate(
        (t, row, column) for t in range(3) for row in range(2) for column in range(5)
    ):
        third = 3 * width // 8
        expected = torch.tensor(code(t, width // 4) + code(column, third) + code(row, third))
        torch.testing.assert_close(table[index], expected, rtol=0, atol=1e-6)


def test_separable_tables_follow_the_formula():
    tables = separable_tables(96, (3, 4, 4))
    assert {name: tuple(table.shape) for name, table in tables.items()} == {
        "spatial": (1, 16, 96),
        "temporal": (1, 3, 96),
        "cls": (1, 1, 96),
    }
    assert list(tables) == ["spatial", "temporal", "cls"]
    spatial, temporal = tables["spatial"][0], tables["temporal"][0]
    assert spatial[1, 0].item() == pytest.approx(math.sin(1), abs=1e-7)  # column 1
    assert spatial[4, 48].item() == pytest.approx(math.sin(1), abs=1e-7)  # row 1
    assert spatial[4, 0].item() == 0
    assert temporal[2, 0].item() == pytest.approx(math.sin(2), abs=1e-7)
    assert temporal[2, 48].item() == pytest.approx(math.cos(2), abs=1e-7)
    assert tables["cls"].abs().max() == 0


def test_separable_model_equals_the_joint_model_of_the_summed_table():
    separable = fill(make_vit(positions="separable"), positions=True)
    joint = fill(make_vit())
    spatial, temporal = separable.pos_embed_spatial[0], separable.pos_embed_temporal[0]
    rows = [separable.pos_embed_cls[0, 0]]
    rows += [temporal[t] + spatial[s] for t in range(2) for s in range(4)]
    joint.pos_embed.data = torch.stack(rows)[None].detach()
    patches = patchify(clip(2, 2, 28))
    torch.testing.assert_close(separable.encode(patches)[0], joint.encode(patches)[0])


def test_the_class_token_has_a_position_too():
    vit = fill(make_vit())
    patches, keep = patchify(clip(1, 2, 28)), torch.zeros(8, 1)  # no block changes anything
    assert torch.equal(vit.encode(patches, keep=keep)[0][:, 0], vit.cls_token[0])
    vit.pos_embed.data[0, 0] = 1.0
    assert torch.equal(vit.encode(patches, keep=keep)[0][:, 0], vit.cls_token[0] + 1)


def test_separable_tables_stand_where_upstream_has_them():
    student = create_student(TINY, frames=2, image_size=28, num_layers=2, positions="separable")
    assert list(student.state_dict())[:8] == [
        "cls_token",
        "pos_embed_spatial",
        "pos_embed_temporal",
        "pos_embed_cls",
        "clip_pos_embed_spatial",
        "clip_pos_embed_temporal",
        "clip_pos_embed_cls",
        "patch_embed.proj.weight",
    ]


def test_336_pixels_get_a_24_grid():
    vit = build_meta(VideoViT, SIZES["S14"], frames=8, image_size=336)
    assert vit.grid == (8, 24, 24)
    assert vit.pos_embed.shape == (1, 4609, 384)


@pytest.mark.parametrize("settings", [{"image_size": 42}, {"frames": 6, "tubelet": 3}])
def test_any_clip_size_runs_through_all_blocks(settings):
    vit = make_vit(**settings)
    x = torch.randn(1, 3, vit.frames, vit.image_size, vit.image_size)
    h, states = vit.encode(vit.select_patches(x, None)[0], collect=(0, 3))
    assert h.shape == (1, 1 + vit.num_patches, 96)
    assert torch.equal(states[1], h)


# The block


def reference_block(block, h):
    """The block written from the formula, head by head, in float64."""
    p = {name: value.double() for name, value in block.state_dict().items()}

    def rms(x, gain):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    h = h.double()
    width, heads = h.shape[-1], block.attn.heads
    d = width // heads
    q, k, v = (rms(h, p["norm1.weight"]) @ p["attn.qkv.weight"].T).split(width, dim=-1)
    q, k = rms(q, p["attn.q_norm.weight"]), rms(k, p["attn.k_norm.weight"])
    out = []
    for i in range(heads):
        one = slice(i * d, (i + 1) * d)
        scores = q[..., one] @ k[..., one].transpose(1, 2) / math.sqrt(d)
        out.append(scores.softmax(-1) @ v[..., one])
    attn = torch.cat(out, -1) @ p["attn.proj.weight"].T + p["attn.proj.bias"]
    h = h + attn * p["ls1.gamma"]
    x = rms(h, p["norm2.weight"]) @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
    x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return h + (x @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]) * p["ls2.gamma"]


@pytest.mark.parametrize("tokens", [1, 13])
def test_block_follows_the_formula_with_gradients(tokens):
    block = fill(Block(TINY, activation="gelu_tanh"))
    h = torch.randn(2, tokens, 96, requires_grad=True)
    upstream = torch.randn(2, tokens, 96)
    found = block(h)
    (gradient,) = torch.autograd.grad(found, h, upstream)
    expected = reference_block(block, h)
    (expected_gradient,) = torch.autograd.grad(expected, h, upstream.double())
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient.float(), rtol=1e-4, atol=1e-5)


def test_blocks_use_tanh_gelu_unless_asked():
    x = torch.linspace(-4, 4, 96)[None]
    for settings, approximate in (({}, "tanh"), ({"activation": "gelu"}, "none")):
        mlp = make_vit(**settings).blocks[0].mlp
        expected = mlp.fc2(F.gelu(mlp.fc1(x), approximate=approximate))
        torch.testing.assert_close(mlp(x), expected, rtol=0, atol=0)
    assert MLP(96, hidden=96, activation="gelu").act(torch.tensor(2.0)).item() == pytest.approx(
        1.9544997, abs=1e-6
    )
    assert MLP(96, hidden=96, activation="gelu_tanh").act(
        torch.tensor(2.0)
    ).item() == pytest.approx(1.9545977, abs=1e-6)


def test_every_rms_norm_has_eps_1e_6():
    block = make_vit().blocks[0]
    x = torch.full((1, 96), 1e-3)  # its mean square is eps: the norm halves the square
    for norm in (block.norm1, block.norm2, block.attn.q_norm, block.attn.k_norm):
        torch.testing.assert_close(norm(x), torch.full((1, 96), math.sqrt(0.5)))


def test_layer_scale_multiplies_in_float32():
    scale = LayerScale(96, init=1e-5).bfloat16()
    scale.gamma.data.normal_()
    x = torch.randn(4, 96).bfloat16()
    found = scale(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (x.float() * scale.gamma.float()).bfloat16())
    assert scale.float()(x).dtype == torch.bfloat16  # a narrower branch stays as it came


# Precision


def test_autocast_keeps_the_residual_stream_in_float32():
    vit = fill(make_vit())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, states = vit.encode(patchify(clip(1, 2, 28)), collect=(0, 1, 2, 3))
        pooled, weights = vit.clip_projector(h)
    assert [state.dtype for state in states] == [torch.float32] * 4
    assert pooled.dtype == torch.bfloat16
    assert weights.dtype == torch.float32


def test_bf16_parameters_keep_the_residual_stream_in_bf16():
    vit = fill(make_vit())
    expected, _ = vit.encode(patchify(clip(1, 2, 28)))
    vit = vit.bfloat16()
    h, states = vit.encode(patchify(clip(1, 2, 28)), collect=(0,))
    assert (h.dtype, states[0].dtype) == (torch.bfloat16, torch.bfloat16)
    error = (h.float() - expected).norm() / expected.norm()
    assert error < 0.02


def test_bf16_norms_reduce_in_float32():
    norm = make_vit().blocks[0].norm1.bfloat16()
    x = torch.randn(64, 96).bfloat16()
    expected = F.rms_norm(x.float(), (96,), eps=1e-6)
    torch.testing.assert_close(norm(x).float(), expected, rtol=2**-8, atol=0)


# Initialisation


def test_weights_are_drawn_by_upstreams_rules():
    torch.manual_seed(0)
    vit = make_vit(ViTSize(384, 3, 6), frames=8, image_size=224)
    for index, block in enumerate(vit.blocks, start=1):
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
        scaled = 0.02 / math.sqrt(2 * index)
        assert block.attn.proj.weight.std().item() == pytest.approx(scaled, rel=0.02)
        assert block.mlp.fc2.weight.std().item() == pytest.approx(scaled, rel=0.02)
        assert torch.equal(block.ls1.gamma, torch.full((384,), 1e-5))
        assert torch.equal(block.ls2.gamma, torch.full((384,), 1e-5))
    pool = vit.clip_projector.cross_attn
    for weight in (pool.q.weight, pool.k.weight, pool.v.weight, pool.proj.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.1)
    for name, parameter in vit.named_parameters():
        if name.endswith("norm.weight") or ".norm" in name and name.endswith(".weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif "bias" in name and not name.startswith("patch_embed"):
            assert parameter.abs().max() == 0, name


def test_a_size_of_ones_own_sets_its_initial_scale():
    torch.manual_seed(0)
    vit = make_vit(ViTSize(192, 2, 3, init_std=0.05, layer_scale=0.1))
    assert vit.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.05, rel=0.02)
    for scale in (vit.blocks[1].ls1, vit.blocks[1].ls2):
        assert torch.equal(scale.gamma, torch.full((192,), 0.1))


def test_patch_convolution_keeps_the_frameworks_uniform_init():
    bound = 1 / math.sqrt(588)
    conv = make_vit(SIZES["S14"], frames=1, image_size=14).patch_embed.proj
    for values in (conv.weight, conv.bias):
        assert values.abs().max().item() == pytest.approx(bound, rel=0.02)
        assert values.abs().max().item() <= bound
        assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


# Drop path and checkpointing


def test_drop_path_rates_grow_linearly_with_depth():
    vit = make_vit(drop_path=0.3)
    assert vit.drop_path_rates == pytest.approx((0.0, 0.1, 0.2, 0.3))
    uniform = torch.tensor([0.05, 0.15, 0.25, 0.35])[:, None].repeat_interleave(2, 0)
    found = vit.drop_path_keep(uniform)[:, 0]
    factors = torch.tensor([1.0, 1 / 0.9, 1 / 0.8, 1 / 0.7]).repeat_interleave(2)
    torch.testing.assert_close(found, factors)
    nothing = vit.drop_path_keep(torch.zeros(8, 1))[:, 0]
    assert nothing.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_drop_path_factors_scale_each_branch_of_each_clip():
    vit = fill(make_vit())
    h = torch.randn(2, 5, 96)
    block = vit.blocks[1]
    attn = block.ls1(block.attn(block.norm1(h)))
    keep = torch.tensor([[0.0, 1.5], [1.0, 0.0]])
    found = block(h, keep)
    middle = h + attn * torch.tensor([0.0, 1.5])[:, None, None]
    mlp = block.ls2(block.mlp(block.norm2(middle)))
    expected = middle + mlp * torch.tensor([1.0, 0.0])[:, None, None]
    torch.testing.assert_close(found, expected)


def test_encode_gives_every_block_its_two_rows():
    vit = fill(make_vit())
    patches = patchify(clip(2, 2, 28))
    keep = torch.rand(8, 2)
    h = vit.encode(patches, keep=torch.zeros(8, 2))[0]  # what enters the first block
    for index, block in enumerate(vit.blocks):
        h = block(h, keep[2 * index : 2 * index + 2])
    torch.testing.assert_close(vit.encode(patches, keep=keep)[0], h)


def test_drop_path_acts_in_training_alone():
    vit = fill(make_vit(drop_path=0.9))
    patches = patchify(clip(4, 2, 28))
    plain = fill(make_vit()).encode(patches)[0]
    torch.manual_seed(0)
    first, second = vit.train().encode(patches)[0], vit.encode(patches)[0]
    assert not torch.allclose(first, second)
    torch.testing.assert_close(vit.eval().encode(patches)[0], plain)


@pytest.mark.parametrize("blocks", [2, 4])
def test_recomputed_blocks_give_the_same_gradients(blocks):
    patches, keep = patchify(clip(2, 2, 28)), torch.rand(8, 2) + 0.5
    gradients = []
    for checkpoint_blocks in (0, blocks):
        vit = fill(make_vit(checkpoint_blocks=checkpoint_blocks)).train()
        calls = []
        vit.blocks[1].mlp.fc1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        h, states = vit.encode(patches, keep=keep, collect=(1,))
        (h.pow(2).mean() + states[0].mean()).backward()
        assert len(calls) == (2 if checkpoint_blocks else 1)  # it really was recomputed
        gradients.append({n: p.grad for n, p in vit.named_parameters() if p.grad is not None})
    assert list(gradients[0]) == list(gradients[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)
