"""How a record keeps the teacher's middle layers: the one place that writes and reads codes.

    fp16   the values in half precision
    int8   a row's values in 255 steps, and a float32 scale per row

The int8 scale is |r|^2 / <q, r> for a row r and its code q, so that the decoded row has r's
length along r: the loss is linear in the target, hence what hurts is bias and not noise
(RaBitQ's correction; Gao and Long, 2024, arXiv:2405.12497).
"""

import torch
from torch import Tensor

INT8_STEPS = 127


def encode(kind: str, middle: Tensor) -> dict[str, Tensor]:
    """Fields of a record from rows [...,M,E] in float32: `codes`, and `scales` [...,M] for int8.

    A row of zeros decodes to zeros.
    """
    match kind:
        case "fp16":
            return {"codes": middle.half()}
        case "int8":
            largest = middle.abs().amax(dim=-1, keepdim=True)
            step = torch.where(largest > 0, largest / INT8_STEPS, 1.0)
            values = (middle / step).round().clamp(-INT8_STEPS, INT8_STEPS)
            along = (values * middle).sum(dim=-1)
            length = middle.square().sum(dim=-1)
            scales = torch.where(along > 0, length / along, 0.0)
            return {"codes": values.to(torch.int8), "scales": scales}
    raise ValueError(f"unknown codes {kind!r}; choose fp16 or int8")


def decode(values: Tensor, scales: Tensor | None = None) -> Tensor:
    """Rows [...,M,E]: half precision as kept, or int8 codes times their scales in float32."""
    if scales is None:
        return values
    return values.float() * scales[..., None]
