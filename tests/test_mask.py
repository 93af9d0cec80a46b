import itertools

import pytest
import torch
from torch.testing import assert_close

from distill import draw
from distill.mask import draw_tokens, num_visible
from distill.recipe import Mask

GRID = (8, 16, 16)
PINNED = {
    "attention": [7, 12, 13, 15, 20, 23],
    "tube": [7, 9, 10, 19, 21, 22],
    "random": [7, 12, 13, 15, 20, 23],
}


def ids(count):
    return torch.tensor([draw.key("clip", index) for index in range(count)])


@pytest.mark.parametrize(
    ("ratio", "kind", "expected"),
    [
        (0.8, "attention", 410),
        (0.8, "random", 410),
        (0.8, "tube", 416),
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


@pytest.mark.parametrize("kind", ["attention", "tube", "random"])
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
        for kind in ("attention", "tube", "random")
    }
    assert found == PINNED


def test_attention_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"needs attention \[2, 2048\], got none"):
        draw_tokens(Mask(), clip_ids=ids(2), view=0, seed=0, grid=GRID)
