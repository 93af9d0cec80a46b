"""Which patch tokens a student sees: drawn per clip, view and seed, whatever batch it is in.

Drawing without replacement is an exponential race: patch i arrives at a time Exp(A_i), and the
first arrivals win (Efraimidis and Spirakis, 2006). A record may keep more of the first arrivals
than a student sees, and the time of the next one; given that time, the arrivals of those it
keeps are independent Exp(A_i) below it, so that they can be drawn anew, in every epoch, and the
first of them are again a draw without replacement from all patches.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from distill import draw
from distill.recipe import KeptTokens, Mask, Recipe, Views
from distill.students.vit import PATCH

_VIEW_STEP = -4658895280553007687  # odd, so that every view of a clip gets a key of its own
_SUPERSET = 2  # times the visible tokens


def token_grid(views: Views, *, tubelet: int = 1) -> tuple[int, int, int]:
    """Patch tokens (t, h, w) of a view."""
    side = views.image_size // PATCH
    return views.frames // tubelet, side, side


def num_visible(grid: tuple[int, int, int], mask: Mask) -> int:
    """How many of the patches of a token grid (t, h, w) stay visible.

    The product with the ratio is truncated as a binary double, per frame for tubes and
    attention per frame (OpenGVLab/InternVideo2, single_modality/datasets/masking_generator.py
    and engines/engine_for_pretraining.py), so at least one patch stays.
    """
    t, h, w = grid
    if mask.kind in ("tube", "attention-per-frame"):
        return t * (h * w - int(h * w * mask.ratio))
    return t * h * w - int(t * h * w * mask.ratio)


def num_races(grid: tuple[int, int, int], mask: Mask) -> int:
    """How many races decide a mask: one of all patches, or one of each frame's."""
    return grid[0] if mask.kind == "attention-per-frame" else 1


def num_kept(grid: tuple[int, int, int], mask: Mask, tokens: KeptTokens) -> int:
    """How many patches a record keeps; raises ValueError for a superset of a tube mask."""
    t, h, w = grid
    visible = num_visible(grid, mask)
    match tokens:
        case "visible":
            return visible
        case "superset" if mask.kind == "tube":
            raise ValueError("a tube mask has no superset: keep its visible tokens, or all")
        case "superset":
            return min(_SUPERSET * visible, t * h * w)  # as much of every race
        case "all":
            return t * h * w


def draw_tokens(
    mask: Mask,
    *,
    clip_ids: Tensor,
    view: Tensor | int,
    seed: int,
    grid: tuple[int, int, int],
    attention: Tensor | None = None,
) -> Tensor:
    """Visible patch indices int64 [B,M-1], ascending, without replacement.

    Attention masks draw in proportion to `attention` [B,N], those per frame as many of each
    frame, random ones uniformly, tubes uniformly over the places of a frame and alike in all. A
    clip's draw depends on its int64 id, its view and the seed, and on nothing else of the batch.
    Raises ValueError when an attention mask gets no attention of the right shape.
    """
    tokens, _ = draw_kept(
        mask, "visible", clip_ids=clip_ids, view=view, seed=seed, grid=grid, attention=attention
    )
    return tokens


def draw_kept(
    mask: Mask,
    tokens: KeptTokens,
    *,
    clip_ids: Tensor,
    view: Tensor | int,
    seed: int,
    grid: tuple[int, int, int],
    attention: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What a record keeps: patch indices int64 [B,S], ascending, and the next arrivals [B,R].

    The indices are the first S of the race that `draw_tokens` takes its own from, or the first
    S/R of each frame's, and the next arrivals the logarithms of their times, float32, infinite
    where none is left (and for tubes). A race is run in the log domain: minus the log of a time
    Exp(A) is log A plus Gumbel noise (Kool et al., 2019, arXiv:1903.06059, section 2), here in
    float32.
    """
    t, h, w = grid
    count = num_kept(grid, mask, tokens)
    keys = clip_ids + torch.as_tensor(view, device=clip_ids.device) * _VIEW_STEP  # wraps
    races = num_races(grid, mask)
    none_left = torch.full((len(keys), races), torch.inf, device=keys.device)
    if count == t * h * w:
        return torch.arange(count, device=keys.device).repeat(len(keys), 1), none_left
    if mask.kind == "tube":
        return _draw_tube(mask, draw.gumbel(keys, "mask", seed, count=h * w), grid), none_left
    scores = draw.gumbel(keys, "mask", seed, count=t * h * w)  # [B,N]
    if mask.kind != "random":
        scores = scores + _rates(attention, scores.shape).log()
    scores, count = _by_race(scores, races), count // races
    order = _descending(scores)
    following = scores.gather(1, order[:, count : count + 1])
    kept = _of_clips(order[:, :count].sort(dim=1).values, races, size=t * h * w // races)
    return kept, rearrange(-following, "(b r) 1 -> b r", r=races)


@dataclass(frozen=True)
class Redraw:
    """Masks drawn anew in every epoch among the tokens that records keep, from a run's seed."""

    mask: Mask
    grid: tuple[int, int, int]
    seed: int

    def places(
        self,
        *,
        clip_ids: Tensor,
        epoch: int,
        tokens: Tensor,
        next_arrival: Tensor,
        attention: Tensor | None,
    ) -> Tensor:
        """Which of `draw_kept`'s tokens [B,S] an epoch sees: places int64 [B,M-1], ascending.

        A function of each clip's record, its id, the epoch and the seed. `attention` [B,N] is of
        all patches, `next_arrival` [B,R] as drawn. Tubes are drawn directly, from all tokens.
        """
        t, h, w = self.grid
        names = ("redraw", self.seed, epoch)
        if self.mask.kind == "tube":
            return _draw_tube(self.mask, draw.gumbel(clip_ids, *names, count=h * w), self.grid)
        kept = tokens.shape[1]
        # Middles of the cells that draws fall into: neither 0 nor 1.
        uniform = draw.uniform(clip_ids, *names, count=kept).double() + 2.0**-25
        races = num_races(self.grid, self.mask)
        arrivals = _truncated_arrivals(
            _by_race(uniform, races),
            _by_race(self._kept_rates(tokens, attention), races),
            _by_race(next_arrival, races),
        )
        visible = num_visible(self.grid, self.mask) // races
        places = _descending(-arrivals)[:, :visible].sort(dim=1).values
        return _of_clips(places, races, size=kept // races)

    def _kept_rates(self, tokens: Tensor, attention: Tensor | None) -> Tensor:
        if self.mask.kind == "random":
            return torch.ones_like(tokens, dtype=torch.float64)
        t, h, w = self.grid
        rates = _rates(attention, torch.Size((len(tokens), t * h * w)))
        return rates.gather(1, tokens).double()


def make_redraw(recipe: Recipe) -> Redraw | None:
    """How a distillation's masks are drawn anew; None where each view has its own for good."""
    section = recipe.objective
    if section.cache is None or section.cache.tokens == "visible":
        return None
    grid = token_grid(recipe.data.views, tubelet=recipe.model.tubelet)
    return Redraw(section.mask, grid, recipe.run.seed)


def _by_race(table: Tensor, races: int) -> Tensor:
    """Entries [B,R*n] of clips as those of their races, [B*R,n]: tokens are in order of frames."""
    return rearrange(table, "b (r n) -> (b r) n", r=races)


def _of_clips(places: Tensor, races: int, *, size: int) -> Tensor:
    """Places [B*R,m] in races of `size` as places [B,R*m] in clips."""
    start = torch.arange(races, device=places.device) * size
    return rearrange(
        rearrange(places, "(b r) m -> b r m", r=races) + start[:, None], "b r m -> b (r m)"
    )


def _truncated_arrivals(uniform: Tensor, rates: Tensor, next_arrival: Tensor) -> Tensor:
    """Times Exp(rate) below the next arrival's, float64, by the inverse of their distribution."""
    end = next_arrival.double().exp()
    return -torch.log1p(uniform * torch.expm1(-rates * end)) / rates


def _rates(attention: Tensor | None, shape: torch.Size) -> Tensor:
    """Attention [B,N] in float32 with weights that have underflowed taken last, not never."""
    if attention is None or attention.shape != shape:
        found = "none" if attention is None else list(attention.shape)
        raise ValueError(f"an attention mask needs attention {list(shape)}, got {found}")
    return attention.float().clamp(min=torch.finfo(torch.float32).tiny)


def _draw_tube(mask: Mask, scores: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """The best places by their scores [B,h*w], in every frame: [B,t*m]."""
    t, h, w = grid
    places = _descending(scores)[:, : num_visible(grid, mask) // t].sort(dim=1).values  # [B,m]
    start = torch.arange(t, device=scores.device) * (h * w)
    return (start[:, None] + places[:, None]).flatten(1)


def _descending(scores: Tensor) -> Tensor:
    """Places from the largest score down; the earlier one wins a tie, on every device."""
    return scores.sort(dim=1, descending=True, stable=True).indices
