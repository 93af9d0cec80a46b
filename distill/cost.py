"""What a step costs in FLOPs and bytes, by formulas.

FLOPs are those of matrix products, two for each multiply and add; a test holds the formulas
against a FLOP counter.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from distill.cache.codes import row_bytes
from distill.mask import num_kept, num_races, num_visible, token_grid
from distill.models import build_model, meta_teacher, teacher_shape
from distill.recipe import MAIN, Distill, Recipe, of_teacher, vit_size
from distill.students.classifier import MERGES
from distill.students.vit import PATCH, VideoViT, ViTSize, resolve_size
from distill.teachers import Teacher

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


def decoder_macs(recipe: Recipe) -> int:
    """Of the projectors to the teachers' middle layers and to the main one's pooled vector."""
    section, size = recipe.objective, resolve_size(vit_size(recipe.model.size))
    visible = num_tokens(recipe)[1]
    macs = 0
    for name, teacher in section.teachers.items():
        shape = teacher_shape(recipe, name)
        tokens = visible + shape.has_cls
        own = size.width if _decoder(section, name) == "mlp" else 0
        macs += teacher.layers * tokens * size.width * (own + shape.width)
    pooled, own = teacher_shape(recipe).pooled_width, size.pooled_width
    if pooled:
        macs += own * (pooled + (own if section.decoder == "mlp" else 0))
    return macs


def _decoder(section: Distill, name: str) -> str:
    return section.others[name].decoder if name else section.decoder


def teacher_macs(recipe: Recipe, name: str = MAIN) -> int:
    """Of a teacher's forward on all tokens of a clip."""
    teacher = recipe.objective.teachers[name]
    grid = token_grid(recipe.data.views)
    patches = math.prod(grid)
    if teacher.kind == "timm":
        return count_macs(meta_teacher(recipe, name))
    size = resolve_size(vit_size(teacher.size))
    embed = embed_macs(size, patches, tubelet=(teacher.frames or grid[0]) // grid[0])
    match teacher.kind:
        case "internvideo2":
            return embed + size.depth * block_macs(size, patches + 1) + pool_macs(size, patches + 1)
        case "internvl":  # every frame has a class token and a pool of its own
            tokens = patches // grid[0] + 1
            return embed + grid[0] * (
                size.depth * block_macs(size, tokens) + pool_macs(size, tokens)
            )
        case "videomae":
            return embed + size.depth * block_macs(size, patches)


def count_macs(teacher: Teacher) -> int:
    """Of a teacher without memory on a clip, as PyTorch counts them."""
    clip = torch.empty(1, 3, teacher.frames, teacher.image_size, teacher.image_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        teacher.hidden(clip)
    return counter.get_total_flops() // 2


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
    gradient to; checkpointed blocks run forward twice. What is frozen only runs forward, and not
    in a step at all where its features are cached; of a sweep every setting trains its own.
    """
    if recipe.model.timm:
        return _counted_student(recipe)
    size = resolve_size(vit_size(recipe.model.size))
    tubelet, objective = recipe.model.tubelet, recipe.objective
    patches, visible = num_tokens(recipe)
    embed = embed_macs(size, patches if embed_all else visible, tubelet=tubelet)
    blocks = size.depth * block_macs(size, visible + 1)
    pool = pool_macs(size, visible + 1)
    if isinstance(objective, Distill):
        heads, trainable = decoder_macs(recipe), "all"
    else:
        heads, trainable = size.pooled_width * objective.num_classes, objective.trainable
    forward = embed + blocks + pool + heads
    match trainable:
        case "all":
            recomputed = min(recipe.model.checkpoint_blocks, size.depth) * blocks // size.depth
            step = 3 * forward - embed + recomputed
        case "pool" | "head":
            trained = pool + heads if trainable == "pool" else heads
            sweep = objective.sweep
            settings = len(sweep.lrs) * len(sweep.weight_decays) if sweep else 1
            step = 3 * trained * settings
            if objective.features is None:
                step += forward - trained
    return StepCost(forward=2e-12 * forward, step=2e-12 * step)


def _counted_student(recipe: Recipe) -> StepCost:
    """Of a model of timm's, as PyTorch counts it; the backward takes twice the forward."""
    forward, heads = counted_student(recipe)[:2]
    is_probe = not isinstance(recipe.objective, Distill) and recipe.objective.trainable == "head"
    step = forward + 2 * heads if is_probe else 3 * forward
    return StepCost(forward=1e-12 * forward, step=1e-12 * step)


def counted_student(recipe: Recipe) -> tuple[int, int, int]:
    """FLOPs of a forward and of its heads' part, and bytes that its backward wants, of a clip."""
    with torch.device("meta"):
        model = build_model(recipe)
        views = recipe.data.views
        clip = torch.empty(1, 3, views.frames, views.image_size, views.image_size)
        tokens = torch.empty(1, num_tokens(recipe)[1], dtype=torch.int64)
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        if not isinstance(tensor, torch.nn.Parameter):
            kept += tensor.numel() * tensor.element_size()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks:
        if isinstance(recipe.objective, Distill):
            inputs = model.decoder_inputs(clip, tokens=tokens)
            before = counter.get_total_flops()
            for name in recipe.objective.teachers:
                decoders = model.get_submodule(f"{name or 'clip'}_decoder")
                states = inputs.others[name] if name else inputs.states
                for decode, state in zip(decoders, states, strict=True):
                    decode(state)
            model.final_clip_decoder(inputs.pooled)
        else:
            features = model.hidden(clip)
            before = counter.get_total_flops()
            model(features=features)
    flops = counter.get_total_flops()
    return flops, flops - before, kept


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
    main = teacher_shape(recipe)
    patches, kept = num_tokens(recipe)[0], record_tokens(recipe)
    fields = {"tokens": (2 if main.has_attention and patches <= 2**15 else 4) * kept}
    if section.cache.tokens != "visible":
        fields["next_arrival"] = 4 * num_races(token_grid(views), section.mask)
    if section.cache.pixels == "full":
        fields["pixels"] = 3 * views.frames * views.image_size**2
    else:
        fields["patches"] = kept * 3 * PATCH**2
    for name, teacher in section.teachers.items():
        shape = teacher_shape(recipe, name)
        rows = teacher.layers * (kept + shape.has_cls)
        codes = rows * row_bytes(section.cache.codes, shape.width)
        fields[of_teacher("codes", name)] = codes
        if section.cache.codes != "fp16":
            fields[of_teacher("scales", name)] = 2 * rows
    if main.pooled_width:
        fields["pooled"] = 2 * main.pooled_width
    if main.has_attention:
        fields["attention"] = 4 * patches
    return fields


def feature_bytes(recipe: Recipe) -> dict[str, int]:
    """Bytes of the fields of one view's cached features; frame numbers and the like come on top."""
    section, size = recipe.objective, resolve_size(vit_size(recipe.model.size))
    fields = {"pixels_hash": 8}
    if section.trainable == "pool":
        return {**fields, "hidden": 2 * (num_tokens(recipe)[0] + 1) * size.width}
    per_frame, with_pooled = MERGES.get(section.probe, (None, True))
    if per_frame is not None:
        steps = recipe.data.views.frames // recipe.model.tubelet if per_frame else 1
        fields["tokens"] = 2 * (1 + steps) * size.width
    return {**fields, "pooled": 2 * size.pooled_width} if with_pooled else fields


def activation_bytes(recipe: Recipe) -> int:
    """Bytes per clip that a student's forward keeps for its backward; an estimate.

    Of a block with fused norms, as on a GPU: its input, its middle, both LayerScale inputs and,
    in half precision, q and k before their norms, all in float32; and in the compute precision
    what the linears, GELU and attention take.
    """
    if recipe.model.timm:
        kept = counted_student(recipe)[2]
        return kept if recipe.optim.precision == "fp32" else kept // 2
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
    for name, teacher in section.teachers.items():
        own = width * (4 + byte * 3) if _decoder(section, name) == "mlp" else 4 * width
        per_token += teacher.layers * (own + teacher_shape(recipe, name).width * (byte + 5 * 4))
    return tokens * per_token


def teacher_bytes(recipe: Recipe, *, batch_size: int) -> int:
    """Bytes of the teachers' weights (float32) and of their forward on a batch; an estimate.

    They look one after another: the largest counts. Of each, the states of the distilled layers
    and of the block at hand in float32, the block's products in the compute precision, and the
    rows that are kept, before and after they are normalised.
    """
    objective = recipe.objective
    patches, visible = num_tokens(recipe)
    kept = visible if objective.targets == "live" else record_tokens(recipe)
    weights, at_work, held = 0, 0, 0
    for name, section in objective.teachers.items():
        byte, width = 4 if section.precision == "fp32" else 2, teacher_shape(recipe, name).width
        hidden = (
            4 * width
            if section.kind == "timm"
            else int(width * resolve_size(vit_size(section.size)).mlp_ratio)
        )
        per_token = 4 * width * (section.layers + 3) + byte * (hidden + 4 * width)
        rows = 4 * width * section.layers * (kept + 1)
        weights += 4 * teacher_parameters(recipe, name)
        at_work = max(at_work, (patches + 1) * per_token + rows)
        held += rows
    return weights + batch_size * (at_work + held)


def teacher_parameters(recipe: Recipe, name: str = MAIN) -> int:
    """Parameters of one of a distillation's teachers."""
    return sum(parameter.numel() for parameter in meta_teacher(recipe, name).parameters())


def count_parameters(build: Callable[[], VideoViT]) -> int:
    """Parameters of what `build` makes, without making room for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())
