import pytest
import torch
from fill import TOLERANCE, clip, fill, golden, golden_keys, keys_of, visible_mask

from distill.students import ViTSize, create_student
from distill.students.vit import patchify, take_rows, visible_tokens

TINY = ViTSize(96, 4, 3, 4, 48)


def make_student(**changes):
    settings = {
        "frames": 4,
        "image_size": 56,
        "teacher_width": 176,
        "teacher_pooled": 48,
        "num_layers": 3,
        "activation": "gelu",
    }
    return fill(create_student(TINY, **{**settings, **changes}))


def record(x, mask):
    tokens = visible_tokens(mask)
    return {"patches": take_rows(patchify(x), tokens), "tokens": tokens}


def test_outputs_equal_the_reference():
    expected = golden("tiny_distill")
    student = make_student()
    mask = visible_mask(2, 64, 13)
    assert torch.equal(mask, expected["mask"])
    middle, pooled = student(clip(2, 4, 56), mask)
    torch.testing.assert_close(middle, expected["student_middle"], **TOLERANCE)
    torch.testing.assert_close(pooled, expected["student_final"], **TOLERANCE)


def test_losses_and_gradients_equal_the_reference():
    expected = golden("tiny_distill")
    student = make_student()
    mask = visible_mask(2, 64, 13)
    middle, pooled = student(clip(2, 4, 56), mask)
    teacher = expected["teacher_middle"][:, ~mask].unflatten(1, (2, 14))
    loss_middle = (2 - 2 * (middle * teacher).sum(-1)).mean()
    loss_final = (2 - 2 * (pooled * expected["teacher_final"]).sum(-1)).mean()
    torch.testing.assert_close(loss_middle.double(), expected["loss_middle"], **TOLERANCE)
    torch.testing.assert_close(loss_final.double(), expected["loss_final"], **TOLERANCE)
    (loss_middle + loss_final).backward()
    for name, parameter in {
        "grad_qkv0": student.blocks[0].attn.qkv.weight,
        "grad_qnorm3": student.blocks[3].attn.q_norm.weight,
        "grad_patch": student.patch_embed.proj.weight,
        "grad_decoder0": student.clip_decoder[0].head[0].weight,
        "grad_ls": student.blocks[2].ls2.gamma,
    }.items():
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-4, atol=min(1e-5, 1e-3 * largest), msg=name
        )


def test_position_tables_equal_the_reference():
    student = make_student()
    expected = golden("tiny_distill")["student_pos_embed"]
    torch.testing.assert_close(student.pos_embed.data, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(student.clip_pos_embed.data, expected, rtol=0, atol=1e-6)


def test_state_dict_is_the_references():
    assert keys_of(make_student()) == golden_keys("tiny_student")


@pytest.mark.parametrize(
    ("size", "decoder", "keys"), [("S14", "mlp", 217), ("B14", "linear", 203), ("L14", "mlp", 373)]
)
def test_published_students_have_the_published_number_of_keys(size, decoder, keys):
    with torch.device("meta"):
        assert len(create_student(size, decoder=decoder).state_dict()) == keys


def test_linear_decoders_have_upstreams_names():
    names = [k for k in keys_of(make_student(decoder="linear")) if "clip_decoder" in k[0]]
    assert names[:4] == [
        ("clip_decoder.0.head.weight", (176, 96)),
        ("clip_decoder.0.head.bias", (176,)),
        ("clip_decoder.0.norm.weight", (176,)),
        ("clip_decoder.0.norm.bias", (176,)),
    ]
    assert names[-4:] == [
        ("final_clip_decoder.head.weight", (48, 48)),
        ("final_clip_decoder.head.bias", (48,)),
        ("final_clip_decoder.norm.weight", (48,)),
        ("final_clip_decoder.norm.bias", (48,)),
    ]


def test_decoders_start_normal_and_not_xavier():
    torch.manual_seed(0)
    student = create_student("S14", num_layers=1)
    for linear in (student.clip_decoder[0].head[0], student.final_clip_decoder.head[2]):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert linear.bias.abs().max() == 0


@pytest.mark.parametrize(
    ("size", "layers"), [("S14", tuple(range(6, 12))), ("L14", tuple(range(18, 24)))]
)
def test_the_last_six_blocks_are_distilled(size, layers):
    with torch.device("meta"):
        assert create_student(size).return_layers == layers


def test_each_decoder_gets_its_blocks_state_plus_positions():
    student = make_student(num_layers=2)
    x, mask = clip(2, 4, 56), visible_mask(2, 64, 13)
    found = student.decoder_inputs(x, mask).states
    patches = record(x, mask)
    _, states = student.encode(**patches, collect=(2, 3))
    table = student.clip_pos_embed.data = torch.randn(1, 65, 96)
    found = student.decoder_inputs(x, mask).states
    for state, collected in zip(found, states, strict=True):
        rows = torch.stack([table[0, ~mask[b]] for b in range(2)])
        torch.testing.assert_close(state, collected + rows)


@pytest.mark.parametrize("settings", [{}, {"positions": "separable"}, {"decoder": "linear"}])
def test_a_records_patches_give_what_the_clip_and_mask_give(settings):
    student = make_student(**settings)
    pixels = torch.randint(0, 256, (2, 3, 4, 56, 56), dtype=torch.uint8)
    mask = visible_mask(2, 64, 13)
    from_clip = student(pixels, mask)
    from_record = student(**record(pixels, mask))
    assert torch.equal(from_record[0], from_clip[0])
    assert torch.equal(from_record[1], from_clip[1])


def test_a_records_patches_give_the_same_gradients():
    x, mask = clip(2, 4, 56), visible_mask(2, 64, 13)
    upstream = torch.randn(3, 2, 14, 176)
    gradients = []
    for arguments in ({"clip": x, "mask": mask}, record(x, mask)):
        student = make_student()
        middle, pooled = student(**arguments)
        ((middle * upstream).sum() + pooled[:, 0].sum()).backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_tokens_may_be_small_integers(dtype):
    student = make_student()
    x = record(clip(2, 4, 56), visible_mask(2, 64, 13))
    expected, _ = student(**x)
    found, _ = student(patches=x["patches"], tokens=x["tokens"].to(dtype))
    assert torch.equal(found, expected)


def test_one_clip_gives_what_it_gives_in_a_batch():
    student = make_student()
    x, mask = clip(2, 4, 56), visible_mask(2, 64, 13)
    both, _ = student(x, mask)
    one, _ = student(x[1:], mask[1:])
    torch.testing.assert_close(one, both[:, 1:], rtol=1e-5, atol=1e-6)


def test_without_a_mask_every_token_is_visible():
    student = make_student()
    x = clip(2, 4, 56)
    middle, _ = student(x)
    masked, _ = student(x, torch.zeros(2, 65, dtype=torch.bool))
    assert middle.shape == (3, 2, 65, 176)
    torch.testing.assert_close(middle, masked, rtol=1e-5, atol=1e-6)


def test_only_visible_patches_are_embedded():
    student = make_student()
    seen = []
    student.patch_embed.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    student(clip(2, 4, 56), visible_mask(2, 64, 13))
    assert seen == [13]


def test_tubelets_of_two_frames():
    student = make_student(tubelet=2)
    assert student.grid == (2, 4, 4)
    x, mask = clip(2, 4, 56), visible_mask(2, 32, 7)
    middle, _ = student(x, mask)
    tokens = visible_tokens(mask)
    patches = take_rows(patchify(x, tubelet=2), tokens)
    assert patches.shape == (2, 7, 3 * 2 * 196)
    assert torch.equal(student(patches=patches, tokens=tokens)[0], middle)


def test_without_a_pooled_teacher_the_final_decoder_is_the_identity():
    student = make_student(teacher_pooled=0)
    assert not any("final_clip_decoder" in name for name in student.state_dict())
    _, pooled = student(clip(2, 4, 56), visible_mask(2, 64, 13))
    assert pooled.shape == (2, 48)
    torch.testing.assert_close(pooled.norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize(
    "arguments",
    [(), ("clip", "patches"), ("clip", "tokens"), ("mask", "patches", "tokens")],
    ids=" ".join,
)
def test_a_mix_of_clip_and_record_is_refused(arguments):
    x, mask = clip(2, 4, 56), visible_mask(2, 64, 13)
    everything = {"clip": x, "mask": mask, **record(x, mask)}
    with pytest.raises(ValueError, match="give either clip and mask, or patches and tokens"):
        make_student()(**{name: everything[name] for name in arguments})


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="num_layers must be 1 to 4, got 5"):
        make_student(num_layers=5)
    with pytest.raises(ValueError, match="decoder must be 'mlp' or 'linear', got 'conv'"):
        make_student(decoder="conv")
