"""What a step costs in FLOPs and bytes, by formulas.

FLOPs are those of matrix products, two for each multiply and add; a test holds the formulas
against a FLOP counter.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from distill.cache.codes import row_bytes
from distill.mask import num_kept, num_visible, token_grid
from distill.recipe import Distill, Recipe, vit_size
from distill.students.vit import PATCH, VideoViT, ViTSize, resolve_size

PARAMETER_BYTES = 16  # float32 weight, gradient and AdamW's two moments


def block_macs(size: ViTSize, tokens: int) -> int:
    """Multiply-adds of one block's forward: four projections, the MLP, scores and their sum."""
    hidden = int(size.width * size.mlp_ratio)
    return tokens * (4 * size.width**2 + 2 * size.width * hidden + 2 * tokens * size.width)


def pool_macs(size: ViTSize, tokens: int) -> int:
    """Of the attention pool: one query over all tokens."""
    width = size.width
    keys_values = 2 * tokens * width**2 + 2 * tokens * width
    return keys_values + width**2 + width * size.pooled_width


def embed_macs(size: ViTSize, patches: int, *, tubelet: int = 1) -> int:
    """Of the patch embedding."""
    return patches * 3 * tubelet * PATCH**2 * size.width


def decoder_macs(size: ViTSize, tokens: int, *, teacher: ViTSize, layers: int, decoder: str) -> int:
    """Of the projectors to a teacher's middle layers and to its pooled vector."""
    pooled = size.pooled_width
    own = size.width if decoder == "mlp" else 0
    own_pooled = pooled if decoder == "mlp" else 0
    middle = layers * tokens * size.width * (own + teacher.width)
    return middle + pooled * (own_pooled + teacher.pooled_width)


def forward_macs(size: ViTSize, patches: int, *, embedded: int | None = None) -> int:
    """Of a backbone with its pool on `patches` tokens and the class token.

    `embedded` is how many patches are embedded where that is more than the visible ones.
    """
    blocks = size.depth * block_macs(size, patches + 1)
    return embed_macs(size, embedded or patches) + blocks + pool_macs(size, patches + 1)


@dataclass(frozen=True)
class StepCost:
    """TFLOP per clip of a student's forward and of a whole training step."""

    forward: float
    step: float


def student_cost(recipe: Recipe, *, embed_all: bool = False) -> StepCost:
    """What a training step costs as executed, or were all patches embedded and then masked.

    The backward takes twice the forward, except that the patch embedding has no input to pass a
    gradient to; checkpointed blocks run forward twice.
    """
    size = resolve_size(vit_size(recipe.model.size))
    tubelet, objective = recipe.model.tubelet, recipe.objective
    patches, visible = num_tokens(recipe)
    embed = embed_macs(size, patches if embed_all else visible, tubelet=tubelet)
    blocks = size.depth * block_macs(size, visible + 1)
    pool = pool_macs(size, visible + 1)
    if isinstance(objective, Distill):
        heads = decoder_macs(
            size,
            visible + 1,
            teacher=resolve_size(vit_size(objective.teacher.size)),
            layers=objective.teacher.layers,
            decoder=objective.decoder,
        )
        trainable = "all"
    else:
        heads, trainable = size.pooled_width * objective.num_classes, objective.trainable
    forward = embed + blocks + pool + heads
    match trainable:
        case "all":
            recomputed = min(recipe.model.checkpoint_blocks, size.depth) * blocks // size.depth
            step = 3 * forward - embed + recomputed
        case "pool":
            step = forward + 2 * (pool + heads)
        case "head":
            step = forward + 2 * heads
    return StepCost(forward=2e-12 * forward, step=2e-12 * step)


def num_tokens(recipe: Recipe) -> tuple[int, int]:
    """Patch tokens of a clip, and how many of them the student sees."""
    grid = token_grid(recipe.data.views, tubelet=recipe.model.tubelet)
    patches = math.prod(grid)
    if not isinstance(recipe.objective, Distill):
        return patches, patches
    return patches, num_visible(grid, recipe.objective.mask)


def record_tokens(recipe: Recipe) -> int:
    """How many of a clip's patch tokens one cached view keeps."""
    section = recipe.objective
    grid = token_grid(recipe.data.views, tubelet=recipe.model.tubelet)
    return num_kept(grid, section.mask, section.cache.tokens)


def record_bytes(recipe: Recipe) -> dict[str, int]:
    """Bytes of the fields of one cached view; frame numbers, crop and the like come on top."""
    section, views = recipe.objective, recipe.data.views
    teacher = resolve_size(vit_size(section.teacher.size))
    patches, kept = num_tokens(recipe)[0], record_tokens(recipe)
    rows = section.teacher.layers * (kept + 1)
    fields = {"tokens": (2 if patches <= 2**15 else 4) * kept}
    if section.cache.tokens != "visible":
        fields["next_arrival"] = 4
    if section.cache.pixels == "full":
        fields["pixels"] = 3 * views.frames * views.image_size**2
    else:
        fields["patches"] = kept * 3 * PATCH**2
    fields["codes"] = rows * row_bytes(section.cache.codes, teacher.width)
    if section.cache.codes != "fp16":
        fields["scales"] = 2 * rows
    return {**fields, "pooled": 2 * teacher.pooled_width, "attention": 4 * patches}


def activation_bytes(recipe: Recipe) -> int:
    """Bytes per clip that a student's forward keeps for its backward; an estimate.

    Of a block with fused norms, as on a GPU: its input, its middle, both LayerScale inputs and,
    in half precision, q and k before their norms, all in float32; and in the compute precision
    what the linears, GELU and attention take.
    """
    size = resolve_size(vit_size(recipe.model.size))
    width, hidden = size.width, int(size.width * size.mlp_ratio)
    byte = 4 if recipe.optim.precision == "fp32" else 2
    tokens = num_tokens(recipe)[1] + 1
    section = recipe.objective
    kept = max(size.depth - recipe.model.checkpoint_blocks, 0)
    float32 = 4 if byte == 4 else 6
    per_token = kept * (4 * float32 * width + byte * (8 * width + 2 * hidden))
    per_token += (size.depth - kept) * 4 * width
    if not isinstance(section, Distill):
        return tokens * per_token if section.trainable == "all" else 0
    own = width * (4 + byte * 3) if section.decoder == "mlp" else 4 * width
    teacher = resolve_size(vit_size(section.teacher.size)).width
    return tokens * (per_token + section.teacher.layers * (own + teacher * (byte + 5 * 4)))


def teacher_bytes(recipe: Recipe, *, batch_size: int) -> int:
    """Bytes of a teacher's weights (float32) and of its forward on a batch; an estimate.

    The states of the distilled layers and of the block at hand in float32, the block's products
    in the compute precision, and the rows that are kept, before and after they are normalised.
    """
    objective, section = recipe.objective, recipe.objective.teacher
    size = resolve_size(vit_size(section.size))
    byte = 4 if section.precision == "fp32" else 2
    hidden = int(size.width * size.mlp_ratio)
    per_token = 4 * size.width * (section.layers + 3) + byte * (hidden + 4 * size.width)
    patches, visible = num_tokens(recipe)
    kept = visible if objective.targets == "live" else record_tokens(recipe)
    rows = 2 * 4 * size.width * section.layers * (kept + 1)
    return 4 * teacher_parameters(recipe) + batch_size * ((patches + 1) * per_token + rows)


def teacher_parameters(recipe: Recipe) -> int:
    """Parameters of a distillation's teacher, which is a bare backbone."""
    views = recipe.data.views
    size = resolve_size(vit_size(recipe.objective.teacher.size))
    return count_parameters(
        lambda: VideoViT(size, frames=views.frames, image_size=views.image_size)
    )


def count_parameters(build: Callable[[], VideoViT]) -> int:
    """Parameters of what `build` makes, without making room for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())
