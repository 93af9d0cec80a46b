"""What finetuning does to a batch on its way into the model: erased boxes, mixup and CutMix.

What is random about it was drawn where the batch was read, so nothing here waits for the device.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from distill.data.augment import NOISE_STEPS, NOISE_ZERO
from distill.students.vit import IMAGENET_MEAN, IMAGENET_STD


def augmented_inputs(batch: dict, *, num_classes: int) -> dict:
    """Do what a batch of `ClipBatches` says is to be done to its pixels and labels.

    With `erased` or `mix` in it, the pixels become float32, normalised; with `mix`, `target`
    [B,V] takes the place of the labels. A batch with neither stays as it is.
    """
    if "erased" not in batch and "mix" not in batch:
        return batch
    pixels = normalise(batch["pixels"], erased=batch.get("erased"))
    if "mix" not in batch:
        return {**batch, "pixels": pixels}
    target = F.one_hot(batch["label"], num_classes).float()
    pixels, target = mix(pixels, target, draws=batch["mix"][0])
    return {**batch, "pixels": pixels, "target": target}


def normalise(pixels: Tensor, *, erased: Tensor | None = None) -> Tensor:
    """Clips uint8 [B,3,T,S,S] to float32 with ImageNet statistics.

    In the boxes `erased` [B,4] (x, y, width, height) are codes of noise instead; see
    `distill.data.augment.erase`.
    """
    statistics = zip(pixels.unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    normal = torch.stack([(channel / 255 - mean) / std for channel, mean, std in statistics], 1)
    if erased is None:
        return normal
    inside = rearrange(in_boxes(erased, size=pixels.shape[-1]), "b h w -> b 1 1 h w")
    return torch.where(inside, (pixels.float() - NOISE_ZERO) / NOISE_STEPS, normal)


def mix(pixels: Tensor, target: Tensor, *, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Mix clips [B,3,T,S,S] and targets [B,V] with those of the reversed batch.

    `draws` are what `draw_mixing` gave for the first view of the batch, as it was cut up for the
    device. The middle clip of an odd batch is its own partner and stays as it is.
    """
    share, box = draws[0], draws[1:]
    inside = in_boxes(box[None], size=pixels.shape[-1])  # [1,S,S]
    is_cutmix = box[2] * box[3] > 0
    own = torch.where(is_cutmix, (~inside).float(), share)[:, None, None]  # [1,1,1,S,S]
    pixels = own * pixels + (1 - own) * pixels.flip(0)
    return pixels, share * target + (1 - share) * target.flip(0)


def in_boxes(boxes: Tensor, *, size: int) -> Tensor:
    """Which pixels [B,S,S] of a square lie in the boxes [B,4] (x, y, width, height)."""
    places = torch.arange(size, device=boxes.device)
    x, y, width, height = (column[:, None] for column in boxes.unbind(1))
    across = (places >= x) & (places < x + width)  # [B,S]
    down = (places >= y) & (places < y + height)
    return down[:, :, None] & across[:, None, :]
