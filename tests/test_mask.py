import itertools
import re

import pytest
import torch
from torch.testing import assert_close

from distill import draw
from distill.errors import InputError
from distill.mask import Redraw, draw_kept, draw_tokens, num_kept, num_visible
from distill.recipe import Mask
from distill.recipe_file import load_recipe

GRID = (8, 16, 16)
PINNED = {
    "attention-per-frame": [0, 7, 9, 12, 13, 23],
    "attention": [7, 12, 13, 15, 20, 23],
    "tube": [7, 9, 10, 19, 21, 22],
    "random": [7, 12, 13, 15, 20, 23],
}


PINNED_KEPT = {
    "attention": ([0, 3, 4, 7, 9, 10, 11, 12, 13, 15, 20, 23], "0.3258", [0, 1, 2, 4, 8, 9]),
    "random": ([3, 7, 8, 9, 10, 11, 12, 13, 15, 16, 20, 23], "0.0049", [0, 1, 2, 4, 8, 9]),
}
SIX = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0375, 0.025])
CHI_SQUARE_14 = 59.0  # of 14 degrees of freedom, exceeded with probability 2e-7


def ids(count):
    return torch.tensor([draw.key("clip", index) for index in range(count)])


@pytest.mark.parametrize(
    ("ratio", "kind", "expected"),
    [
        (0.8, "attention", 410),
        (0.8, "random", 410),
        (0.8, "tube", 416),
        (0.8, "attention-per-frame", 416),
        (0.9, "attention-per-frame", 208),
        (0.75, "attention", 512),
        (0.75, "random", 512),
        (0.75, "tube", 512),
        (0.9, "attention", 205),
        (0.9, "random", 205),
        (0.9, "tube", 208),
        (0.0, "random", 2048),
    ],
)
def test_counts_are_the_published_ones(ratio, kind, expected):
    mask = Mask(kind=kind, ratio=ratio)
    assert num_visible(GRID, mask) == expected
    tokens = draw_tokens(
        mask, clip_ids=ids(3), view=0, seed=1, grid=GRID, attention=torch.rand(3, 2048)
    )
    assert tokens.shape == (3, expected)
    assert tokens.dtype == torch.int64
    assert bool((tokens.diff(dim=1) > 0).all()), "ascending, hence without repeats"
    assert int(tokens.min()) >= 0 and int(tokens.max()) < 2048


def test_attention_draws_in_proportion_without_replacement():
    """Inclusion probabilities against all ordered draws, summed exactly."""
    weights = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05])
    grid, mask = (1, 1, 5), Mask(kind="attention", ratio=0.59)  # 5 - int(2.95) = 3 visible
    expected = torch.zeros(5, dtype=torch.float64)
    for order in itertools.permutations(range(5), 3):
        left, probability = 1.0, 1.0
        for place in order:
            probability *= weights[place].item() / left
            left -= weights[place].item()
        for place in order:
            expected[place] += probability

    count = 200_000
    tokens = draw_tokens(
        mask, clip_ids=ids(count), view=0, seed=3, grid=grid, attention=weights.expand(count, 5)
    )
    found = torch.bincount(tokens.flatten(), minlength=5).double() / count
    assert_close(expected.sum().item(), 3.0, rtol=0, atol=1e-6)
    deviation = (expected * (1 - expected) / count).sqrt()
    assert bool(((found - expected).abs() < 4.5 * deviation).all()), (found, expected)
    # A draw with replacement, or a top-k of the weights, would be far outside: 1 - (1-p)^3.
    assert float(((1 - (1 - weights.double()) ** 3) - expected).abs().max()) > 0.05


def test_random_draws_every_patch_alike():
    count = 40_000
    tokens = draw_tokens(
        Mask(kind="random", ratio=0.8), clip_ids=ids(count), view=0, seed=3, grid=(2, 3, 5)
    )
    found = torch.bincount(tokens.flatten(), minlength=30).double() / count
    assert tokens.shape[1] == 6
    assert float((found - 0.2).abs().max()) < 4.5 * (0.2 * 0.8 / count) ** 0.5


def test_tube_shows_the_same_places_in_every_frame():
    tokens = draw_tokens(
        Mask(kind="tube", ratio=0.8), clip_ids=ids(4), view=0, seed=1, grid=GRID
    ).reshape(4, 8, 52)
    places = tokens - torch.arange(8)[:, None] * 256
    assert_close(places, places[:, :1].expand_as(places))
    assert int(places.min()) >= 0 and int(places.max()) < 256


@pytest.mark.parametrize("kind", ["attention", "attention-per-frame", "tube", "random"])
def test_a_clips_mask_depends_on_nothing_else_in_the_batch(kind):
    clip_ids, attention = ids(7), torch.rand(7, 60)
    views = torch.tensor([0, 0, 1, 2, 1, 5, 0])
    mask = Mask(kind=kind, ratio=0.7)
    together = draw_tokens(
        mask, clip_ids=clip_ids, view=views, seed=9, grid=(3, 4, 5), attention=attention
    )
    order = torch.tensor([4, 1, 6, 0, 3, 5, 2])
    shuffled = draw_tokens(
        mask,
        clip_ids=clip_ids[order],
        view=views[order],
        seed=9,
        grid=(3, 4, 5),
        attention=attention[order],
    )
    assert_close(shuffled, together[order])
    for row in range(7):
        alone = draw_tokens(
            mask,
            clip_ids=clip_ids[row : row + 1],
            view=int(views[row]),
            seed=9,
            grid=(3, 4, 5),
            attention=attention[row : row + 1],
        )
        assert_close(alone, together[row : row + 1])


@pytest.mark.parametrize("change", [{"view": 1}, {"seed": 10}, {"clip_ids": ids(2)[1:]}])
def test_view_seed_and_clip_each_give_another_mask(change):
    settings = {"clip_ids": ids(1), "view": 0, "seed": 9, "grid": GRID}
    mask = Mask(kind="random")
    first, second = draw_tokens(mask, **settings), draw_tokens(mask, **{**settings, **change})
    shared = len(set(first[0].tolist()) & set(second[0].tolist()))
    # Hypergeometric: 410 * 410 / 2048 = 82 in the mean, standard deviation 7.3.
    assert 82 - 4.5 * 7.3 < shared < 82 + 4.5 * 7.3


def test_weights_that_underflowed_are_taken_last():
    attention = torch.zeros(1, 20)
    attention[0, [3, 8, 13]] = torch.tensor([1e-30, 0.5, 1e-38])
    tokens = draw_tokens(
        Mask(ratio=0.8), clip_ids=ids(1), view=0, seed=0, grid=(1, 4, 5), attention=attention
    )
    assert {3, 8} <= set(tokens[0].tolist())
    assert tokens.shape == (1, 4)


def test_a_masks_bytes_are_pinned():
    """Whoever changes these numbers raises the mask revision of distill/cache/identity.py."""
    attention = torch.linspace(1, 0.1, 24)[None]
    settings = {"clip_ids": torch.tensor([12345]), "view": 2, "seed": 7, "grid": (2, 3, 4)}
    found = {
        kind: draw_tokens(Mask(kind=kind, ratio=0.75), attention=attention, **settings)[0].tolist()
        for kind in PINNED
    }
    assert found == PINNED


def test_attention_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"needs attention \[2, 2048\], got none"):
        draw_tokens(Mask(), clip_ids=ids(2), view=0, seed=0, grid=GRID)


def two_stages(mask, tokens, attention, *, grid, epoch=3, seed=8, redraw=None):
    """Tokens [B,M-1] that clips see in an epoch: what records keep, and a draw among those."""
    settings = {"clip_ids": ids(len(attention)), "grid": grid, "attention": attention}
    kept, next_arrival = draw_kept(mask, tokens, view=1, seed=2, **settings)
    if redraw is not None:
        return kept.gather(1, redraw(attention.gather(1, kept)))
    places = Redraw(mask, grid, seed).places(
        clip_ids=settings["clip_ids"],
        epoch=epoch,
        tokens=kept,
        next_arrival=next_arrival,
        attention=attention,
    )
    return kept.gather(1, places)


def chi_square(tokens, weights):
    """Of drawn pairs against the probabilities of ordered draws: the draws' whole distribution."""
    count = len(weights)
    expected = torch.zeros(count, count, dtype=torch.float64)
    for first, second in itertools.permutations(range(count), 2):
        low, high = sorted((first, second))
        rest = 1 - weights[first].item()
        expected[low, high] += weights[first].item() * weights[second].item() / rest
    found = torch.bincount(tokens[:, 0] * count + tokens[:, 1], minlength=count**2)
    upper = torch.triu(torch.ones_like(expected), diagonal=1).bool()
    assert_close(expected[upper].sum().item(), 1.0, rtol=0, atol=1e-6)
    expected = expected[upper] * len(tokens)
    assert int(found.reshape(count, count)[upper].sum()) == len(tokens)
    return float(((found.reshape(count, count)[upper] - expected).square() / expected).sum())


@pytest.mark.parametrize("tokens", ["superset", "all"])
def test_two_stages_draw_as_one(tokens):
    """Two of six are seen and four or all kept: every pair has its exact probability."""
    mask, attention = Mask(kind="attention", ratio=0.7), SIX.expand(200_000, 6)
    seen = two_stages(mask, tokens, attention, grid=(1, 1, 6))
    assert chi_square(seen, SIX) < CHI_SQUARE_14


def pick_first(scores):
    return scores.sort(dim=1, descending=True).indices[:, :2].sort(dim=1).values


@pytest.mark.parametrize(
    "redraw",
    [
        lambda rates: pick_first(draw.uniform(ids(len(rates)), "other", count=4)),
        lambda rates: pick_first(draw.gumbel(ids(len(rates)), "other", count=4) + rates.log()),
        lambda rates: pick_first(rates),
    ],
    ids=["uniform", "weighted", "largest"],
)
def test_other_redraws_are_biased(redraw):
    """What the comparison above is worth: each of these is far outside of it."""
    mask, attention = Mask(kind="attention", ratio=0.7), SIX.expand(200_000, 6)
    seen = two_stages(mask, "superset", attention, grid=(1, 1, 6), redraw=redraw)
    assert chi_square(seen, SIX) > 20 * CHI_SQUARE_14


def test_two_stages_include_each_patch_and_pair_as_often_as_one():
    count, grid = 40_000, (1, 6, 8)
    mask = Mask(kind="attention", ratio=0.8)  # 48 - int(38.4) = 10 seen, 20 kept
    weights = torch.exp(2 * torch.randn(48, generator=torch.Generator().manual_seed(0)))
    attention = (weights / weights.sum()).expand(count, 48)
    one = draw_tokens(mask, clip_ids=ids(count), view=0, seed=3, grid=grid, attention=attention)
    two = two_stages(mask, "superset", attention, grid=grid)
    shares = []
    for tokens in (one, two):
        seen = torch.zeros(count, 48).scatter_(1, tokens, 1.0)
        shares.append((seen.T @ seen).double() / count)  # pairs, and patches on the diagonal
    both = (shares[0] + shares[1]) / 2
    deviation = (2 * both * (1 - both) / count).sqrt().clamp(min=1 / count)
    scores = (shares[0] - shares[1]) / deviation
    assert float(scores.abs().max()) < 5.5  # of 1,176: chance 4e-5
    assert float(scores[torch.triu_indices(48, 48).unbind()].square().mean()) < 1.5


def test_kept_tokens_are_the_first_arrivals_and_the_next_one_is_told():
    grid, attention = (2, 3, 4), torch.rand(5, 24, generator=torch.Generator().manual_seed(1))
    settings = {"clip_ids": ids(5), "view": 2, "seed": 7, "grid": grid, "attention": attention}
    kept, next_arrival = draw_kept(Mask(ratio=0.75), "superset", **settings)
    assert kept.shape == (5, 12) and kept.dtype == torch.int64
    assert_close(kept, draw_tokens(Mask(ratio=0.5), **settings))
    _, following = draw_kept(Mask(ratio=11 / 24), "visible", **settings)  # 13 arrivals
    thirteen = draw_tokens(Mask(ratio=11 / 24), **settings)
    assert thirteen.shape == (5, 13)
    for clip in range(5):
        (next_token,) = set(thirteen[clip].tolist()) - set(kept[clip].tolist())
        keys = settings["clip_ids"][clip : clip + 1] + torch.tensor(2) * -4658895280553007687
        noise = draw.gumbel(keys, "mask", 7, count=24)[0, next_token]
        arrival = -(noise + attention[clip, next_token].log())
        assert_close(next_arrival[clip, 0], arrival)
        assert following[clip, 0] > next_arrival[clip, 0]
    assert next_arrival.shape == (5, 1) and next_arrival.dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "ratio", "tokens", "expected"),
    [
        ("attention", 0.8, "visible", 410),
        ("attention", 0.8, "superset", 820),
        ("random", 0.6, "superset", 1640),
        ("random", 0.4, "superset", 2048),
        ("random", 0.8, "all", 2048),
        ("tube", 0.8, "all", 2048),
        ("tube", 0.8, "visible", 416),
        ("attention-per-frame", 0.8, "superset", 832),
        ("attention-per-frame", 0.4, "superset", 2048),
        ("attention-per-frame", 0.8, "all", 2048),
    ],
)
def test_how_many_tokens_are_kept(kind, ratio, tokens, expected):
    mask = Mask(kind=kind, ratio=ratio)
    assert num_kept(GRID, mask, tokens) == expected
    attention = torch.rand(2, 2048)
    kept, next_arrival = draw_kept(
        mask, tokens, clip_ids=ids(2), view=0, seed=1, grid=GRID, attention=attention
    )
    assert kept.shape == (2, expected) and bool((kept.diff(dim=1) > 0).all())
    has_more = expected < 2048 and kind != "tube"
    assert bool(next_arrival.isfinite().all()) == has_more
    if expected == 2048:
        places = Redraw(mask, GRID, 0).places(
            clip_ids=ids(2), epoch=0, tokens=kept, next_arrival=next_arrival, attention=attention
        )
        assert places.shape == (2, num_visible(GRID, mask))


FRAMES = torch.stack([SIX, SIX.flip(0), SIX.roll(2)])  # attention in three frames


@pytest.mark.parametrize("tokens", ["visible", "superset", "all"])
def test_every_frame_has_a_draw_of_its_own(tokens):
    """Two of six are seen in each frame, by its attention, however small that is as a whole."""
    count, grid = 60_000, (3, 1, 6)
    mask = Mask(kind="attention-per-frame", ratio=0.7)  # 6 - int(4.2) = 2
    scale = torch.tensor([1.0, 1e-6, 0.1])[:, None]
    attention = (FRAMES * scale).flatten().expand(count, 18)
    if tokens == "visible":
        seen = draw_tokens(
            mask, clip_ids=ids(count), view=0, seed=3, grid=grid, attention=attention
        )
    else:
        seen = two_stages(mask, tokens, attention, grid=grid)
    assert bool((seen.diff(dim=1) > 0).all())
    frames = seen.reshape(count, 3, 2)
    assert bool((frames // 6 == torch.arange(3)[:, None]).all())
    for frame in range(3):
        assert chi_square(frames[:, frame] - 6 * frame, FRAMES[frame]) < CHI_SQUARE_14
    one, two = (frames[:, frame, 0] - 6 * frame for frame in (0, 1))
    both = torch.bincount(one * 6 + two, minlength=36).reshape(6, 6).double() / count
    apart = both.sum(1, keepdim=True) * both.sum(0, keepdim=True)
    assert float((both - apart).abs().max()) < 4.5 * 0.5 / count**0.5, "frames are independent"


def test_kept_tokens_of_a_frame_are_its_first_arrivals():
    grid, mask = (2, 3, 4), Mask(kind="attention-per-frame", ratio=0.75)
    attention = torch.rand(5, 24, generator=torch.Generator().manual_seed(1))
    settings = {"clip_ids": ids(5), "view": 2, "seed": 7, "attention": attention}
    kept, next_arrival = draw_kept(mask, "superset", grid=grid, **settings)
    assert kept.shape == (5, 12) and next_arrival.shape == (5, 2)
    wider = Mask(kind="attention-per-frame", ratio=5 / 12)  # 7 of each frame
    seven = draw_tokens(wider, grid=grid, **settings)
    keys = settings["clip_ids"] + torch.tensor(2) * -4658895280553007687
    noise = draw.gumbel(keys, "mask", 7, count=24)
    for clip in range(5):
        more = sorted(set(seven[clip].tolist()) - set(kept[clip].tolist()))
        assert [token // 12 for token in more] == [0, 1]
        arrivals = [-(noise[clip, token] + attention[clip, token].log()) for token in more]
        assert_close(next_arrival[clip], torch.stack(arrivals))


def test_a_superset_of_tubes_is_refused():
    with pytest.raises(ValueError, match="a tube mask has no superset: keep its visible tokens"):
        num_kept(GRID, Mask(kind="tube"), "superset")


def test_a_recipe_with_a_superset_of_tubes_is_refused():
    tube, superset = "objective.mask.kind=tube", "objective.cache.tokens=superset"
    message = (
        "objective.cache.tokens=superset: a tube mask has no superset; set visible (the mask of a "
        "view stays) or all"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_recipe("S14", [tube, superset])
    for tokens in ("visible", "all"):
        load_recipe("S14", [tube, f"objective.cache.tokens={tokens}"])
    load_recipe("S14", [superset])


def test_tubes_are_drawn_anew_from_all_tokens():
    mask, attention = Mask(kind="tube", ratio=0.75), torch.ones(40_000, 24)
    epochs = [two_stages(mask, "all", attention, grid=(2, 3, 4), epoch=epoch) for epoch in range(2)]
    for tokens in epochs:
        assert tokens.shape == (40_000, 6)
        assert_close(tokens[:, 3:], tokens[:, :3] + 12)
        share = torch.bincount(tokens[:, :3].flatten(), minlength=12).double() / 40_000
        assert float((share - 0.25).abs().max()) < 4.5 * (0.25 * 0.75 / 40_000) ** 0.5
    same = (epochs[0] == epochs[1]).all(dim=1).double().mean().item()
    assert same == pytest.approx(1 / 220, abs=4.5 * (1 / 220 / 40_000) ** 0.5), "of 12 over 3"


@pytest.mark.parametrize("tokens", ["superset", "all"])
def test_weights_that_underflowed_stay_last_and_stay_even(tokens):
    """Three patches have all the weight, so that a fourth is any of the other seventeen."""
    attention = torch.zeros(20_000, 20)
    attention[:, [3, 8, 13]] = torch.tensor([1e-30, 0.5, 1e-20])
    seen = two_stages(Mask(ratio=0.8), tokens, attention, grid=(1, 4, 5))
    share = torch.bincount(seen.flatten(), minlength=20).double() / 20_000
    assert share[[3, 8, 13]].tolist() == [1.0, 1.0, 1.0]
    rest = share[[place for place in range(20) if place not in (3, 8, 13)]]
    assert float((rest - 1 / 17).abs().max()) < 4.5 * (1 / 17 / 20_000) ** 0.5


def test_ties_go_to_the_earlier_patch(monkeypatch):
    def level(clip_ids, *names, count):
        return torch.full((len(clip_ids), count), 0.5)

    monkeypatch.setattr(draw, "uniform", level)
    places = Redraw(Mask(kind="random", ratio=0.75), (2, 3, 4), 0).places(
        clip_ids=ids(2),
        epoch=0,
        tokens=torch.arange(12).repeat(2, 1),
        next_arrival=torch.zeros(2, 1),
        attention=torch.ones(2, 24),
    )
    assert places.tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_an_epochs_mask_depends_on_clip_epoch_and_seed_alone():
    mask, grid = Mask(ratio=0.75), (2, 8, 8)
    attention = torch.rand(6, 128, generator=torch.Generator().manual_seed(1))
    settings = {"clip_ids": ids(6), "attention": attention}
    tokens, next_arrival = draw_kept(mask, "superset", view=0, seed=1, grid=grid, **settings)
    record = {"tokens": tokens, "next_arrival": next_arrival, **settings}
    first = Redraw(mask, grid, 4).places(epoch=2, **record)
    assert_close(Redraw(mask, grid, 4).places(epoch=2, **record), first)
    order = torch.tensor([4, 1])
    alone = {name: value[order] for name, value in record.items()}
    assert_close(Redraw(mask, grid, 4).places(epoch=2, **alone), first[order])
    for other in (
        Redraw(mask, grid, 4).places(epoch=3, **record),
        Redraw(mask, grid, 5).places(epoch=2, **record),
        Redraw(mask, grid, 4).places(epoch=2, **{**record, "clip_ids": ids(12)[6:]}),
    ):
        shared = [len(set(a) & set(b)) for a, b in zip(first.tolist(), other.tolist(), strict=True)]
        assert max(shared) < 32 and min(shared) > 8, "some of the 32 are seen again"


@pytest.mark.parametrize("kind", ["attention", "random"])
def test_kept_tokens_and_redraws_are_pinned(kind):
    """Runs of released versions redraw these: whoever changes them changes every such run."""
    attention = torch.linspace(1, 0.1, 24)[None]
    mask, grid, clip_ids = Mask(kind=kind, ratio=0.75), (2, 3, 4), torch.tensor([12345])
    tokens, next_arrival = draw_kept(
        mask, "superset", clip_ids=clip_ids, view=2, seed=7, grid=grid, attention=attention
    )
    places = Redraw(mask, grid, 1).places(
        clip_ids=clip_ids, epoch=5, tokens=tokens, next_arrival=next_arrival, attention=attention
    )
    found = tokens[0].tolist(), f"{next_arrival.item():.4f}", places[0].tolist()
    assert found == PINNED_KEPT[kind]
