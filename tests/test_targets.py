import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from distill import draw
from distill.cache.codes import Codec
from distill.cache.record import record_fields
from distill.mask import Redraw, draw_kept, draw_tokens
from distill.objective import DistillObjective
from distill.recipe import Distill, Mask
from distill.students import create_student
from distill.students.vit import ViTSize, patchify
from distill.targets import CachedTargets, LiveTargets, view_records
from distill.teachers import create_teacher

WIDE = ViTSize(176, 5, 2, 48 / 11, pooled_width=48)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}
MASK = Mask(kind="attention", ratio=0.8)  # 64 - int(51.2) = 13 visible


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    teacher = create_teacher(
        WIDE, frames=4, image_size=56, num_layers=3, interval=1.34, random=True
    )
    for block in teacher.blocks:  # or the blocks would be next to nothing
        block.ls1.gamma.fill_(0.3)
        block.ls2.gamma.fill_(0.3)
    return teacher


def live_batch(count=3):
    stream = torch.Generator().manual_seed(1)
    return {
        "clip_id": torch.tensor([draw.key("clip", index) for index in range(count)]),
        "view": torch.tensor([1, 1, 0][:count]),
        "label": torch.tensor([-1] * count),
        "pixels": torch.randint(0, 256, (count, 3, 4, 56, 56), dtype=torch.uint8, generator=stream),
        "epoch": 5,
    }


def cached(records, codec, batch):
    """Records as `CachedBatches` would hand them out."""
    kept = {name: batch[name] for name in ("clip_id", "view", "epoch")}
    return {**kept, **record_fields(records, codec=codec)}


@pytest.mark.parametrize("kind", ["attention", "tube", "random"])
def test_a_record_is_the_teachers_features_at_the_visible_tokens(teacher, kind):
    batch, mask = live_batch(), Mask(kind=kind, ratio=0.8)
    records = view_records(teacher, batch, mask=mask, seed=4)
    features = teacher(batch["pixels"])
    tokens = draw_tokens(
        mask,
        clip_ids=batch["clip_id"],
        view=batch["view"],
        seed=4,
        grid=(4, 4, 4),
        attention=features.attention,
    )
    assert_close(records["tokens"], tokens)
    patches = patchify(batch["pixels"])
    for clip in range(3):
        assert_close(records["patches"][clip], patches[clip, tokens[clip]])
        assert_close(records["middle"][:, clip, 0], features.middle[:, clip, 0], **TOLERANCE)
        rows = features.middle[:, clip, 1 + tokens[clip]]
        assert_close(records["middle"][:, clip, 1:], rows, **TOLERANCE)
    assert_close(records["pooled"], features.pooled, **TOLERANCE)
    assert_close(records["attention"], features.attention, **TOLERANCE)
    assert records["patches"].dtype == torch.uint8
    assert records["middle"].dtype == records["pooled"].dtype == torch.float32
    lengths = records["middle"].norm(dim=-1)
    assert_close(lengths, torch.ones_like(lengths))


def test_a_clips_record_does_not_depend_on_its_neighbours(teacher):
    batch = live_batch()
    together = view_records(teacher, batch, mask=MASK, seed=4)
    for row in range(3):
        one = {name: batch[name][row : row + 1] for name in ("clip_id", "view", "pixels")}
        alone = view_records(teacher, one, mask=MASK, seed=4)
        assert_close(alone["tokens"][0], together["tokens"][row])
        assert_close(alone["patches"][0], together["patches"][row])
        assert_close(alone["middle"][:, 0], together["middle"][:, row], **TOLERANCE)


def test_visible_rows_are_gathered_before_anything_is_normalised(teacher, monkeypatch):
    shapes, original = [], F.normalize

    def normalize(x, dim):
        shapes.append(tuple(x.shape))
        return original(x, dim=dim)

    monkeypatch.setattr(F, "normalize", normalize)
    view_records(teacher, live_batch(), mask=MASK, seed=4)
    assert shapes == [(3, 14, 176)] * 3 + [(3, 48)]


def test_precision_is_the_teachers_alone(teacher):
    batch = live_batch()
    exact = view_records(teacher, batch, mask=Mask(kind="random"), seed=4)
    half = view_records(teacher, batch, mask=Mask(kind="random"), seed=4, precision="bf16")
    assert half["middle"].dtype == torch.float32
    difference = (half["middle"] - exact["middle"]).norm(dim=-1).max().item()
    assert 1e-4 < difference < 0.05
    assert_close(half["middle"].norm(dim=-1), torch.ones(3, 3, 14))


def test_targets_go_into_a_loss_that_is_differentiated(teacher):
    student = create_student(
        ViTSize(96, 4, 3, pooled_width=48),
        frames=4,
        image_size=56,
        teacher_width=176,
        teacher_pooled=48,
        num_layers=3,
    )
    section = Distill(kind="distill", teacher={"size": "1B", "random": True})
    objective = DistillObjective(student, section, seed=0)
    batch = LiveTargets(teacher, MASK, 4)(live_batch())
    losses = objective(batch)
    losses["loss"].backward()
    assert 3.0 < losses["loss"].item() < 5.0, "about 4 at random init"
    assert float(student.patch_embed.proj.weight.grad.abs().max()) > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("kind", "error"),
    [("fp16", 3e-4), ("8bit", 0.01), ("4bit", 0.15), ("3bit", 0.3), ("2bit", 0.55)],
)
def test_cached_targets_are_the_live_ones_up_to_their_codes(teacher, kind, error):
    live = LiveTargets(teacher, MASK, 4)(live_batch())
    codec = Codec(kind, means=None if kind == "fp16" else live["middle"].mean((1, 2)))
    found = CachedTargets(codec)(cached(live, codec, live_batch()))
    assert set(found) == set(live)
    assert found["epoch"] == live["epoch"] == 5
    for name in ("clip_id", "tokens", "patches", "attention"):
        assert_close(found[name], live[name])
    assert found["middle"].shape == live["middle"].shape == (3, 3, 14, 176)
    assert found["pooled"].dtype == torch.float32
    difference = (found["middle"].float() - live["middle"]).norm(dim=-1).max().item()
    assert 0 < difference < error
    assert_close(found["pooled"], live["pooled"], rtol=0, atol=2e-4)


@pytest.mark.parametrize("pixels", ["visible", "full"])
@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("attention", "superset"), ("random", "superset"), ("attention", "all"), ("tube", "all")],
)
def test_an_epoch_sees_the_same_tokens_live_and_cached(teacher, kind, tokens, pixels):
    mask = Mask(kind=kind, ratio=0.8)
    redraw = Redraw(mask, teacher.grid, 7)
    records = view_records(teacher, live_batch(), mask=mask, seed=4, tokens=tokens, pixels=pixels)
    codec = Codec("8bit", means=records["middle"].mean((1, 2)))
    targets = CachedTargets(codec, redraw)
    live_targets = LiveTargets(teacher, mask, 4, tokens=tokens, redraw=redraw)
    seen = []
    for epoch in (0, 1):
        batch = {**live_batch(), "epoch": epoch}
        found, live = targets(cached(records, codec, batch)), live_targets(batch)
        assert set(found) == set(live)
        for name in ("clip_id", "tokens", "patches", "attention"):
            assert torch.equal(found[name], live[name])
        visible = 16 if kind == "tube" else 13
        assert found["tokens"].shape == (3, visible) and found["epoch"] == epoch
        assert found["middle"].shape == live["middle"].shape == (3, 3, 1 + visible, 176)
        difference = (found["middle"] - live["middle"]).norm(dim=-1).max().item()
        assert 0 < difference < 0.01, "the codes' error, and not other rows'"
        assert_close(found["pooled"], live["pooled"], rtol=0, atol=2e-4)
        seen.append(found["tokens"])
    assert bool((seen[0] != seen[1]).any(dim=1).all()), "other tokens in every clip"


def test_a_superset_record_has_the_rows_of_its_tokens(teacher):
    batch = live_batch()
    records = view_records(teacher, batch, mask=MASK, seed=4, tokens="superset")
    features = teacher(batch["pixels"])
    tokens, next_arrival = draw_kept(
        MASK,
        "superset",
        clip_ids=batch["clip_id"],
        view=batch["view"],
        seed=4,
        grid=(4, 4, 4),
        attention=features.attention,
    )
    assert torch.equal(records["tokens"], tokens) and tokens.shape == (3, 26)
    assert_close(records["next_arrival"], next_arrival)
    fixed = view_records(teacher, batch, mask=MASK, seed=4)
    assert "next_arrival" not in fixed
    for clip in range(3):
        rows = features.middle[:, clip, 1 + tokens[clip]]
        assert_close(records["middle"][:, clip, 1:], rows, **TOLERANCE)
        assert set(fixed["tokens"][clip].tolist()) < set(tokens[clip].tolist())


def test_whole_frames_are_kept_as_they_came(teacher):
    batch = live_batch()
    whole = view_records(teacher, batch, mask=MASK, seed=4, pixels="full")
    cut = view_records(teacher, batch, mask=MASK, seed=4)
    assert "patches" not in whole and torch.equal(whole["pixels"], batch["pixels"])
    codec = Codec("fp16")
    found, expected = (
        CachedTargets(codec)(cached(records, codec, batch)) for records in (whole, cut)
    )
    assert set(found) == set(expected)
    for name in ("tokens", "patches", "middle"):
        assert torch.equal(found[name], expected[name])


def test_live_targets_take_no_more_rows_than_an_epoch_sees(teacher, monkeypatch):
    shapes, original = [], F.normalize

    def normalize(x, dim):
        shapes.append(tuple(x.shape))
        return original(x, dim=dim)

    monkeypatch.setattr(F, "normalize", normalize)
    redraw = Redraw(MASK, teacher.grid, 0)
    LiveTargets(teacher, MASK, 4, tokens="all", redraw=redraw)(live_batch())
    assert shapes == [(3, 14, 176)] * 3 + [(3, 48)]


def test_records_and_redraws_that_do_not_go_together_are_refused(teacher):
    redraw, batch, codec = Redraw(MASK, teacher.grid, 0), live_batch(), Codec("fp16")
    with pytest.raises(ValueError, match="tokens 'all': masks are drawn anew only among more"):
        LiveTargets(teacher, MASK, 4, tokens="all")
    with pytest.raises(ValueError, match="tokens 'visible': masks are drawn anew only among more"):
        LiveTargets(teacher, MASK, 4, redraw=redraw)
    for tokens, wrong in (("visible", redraw), ("superset", None)):
        records = view_records(teacher, batch, mask=MASK, seed=4, tokens=tokens)
        with pytest.raises(ValueError, match="more than the visible tokens need a redraw"):
            CachedTargets(codec, wrong)(cached(records, codec, batch))
