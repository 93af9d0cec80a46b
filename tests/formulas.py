"""Kernels' formulas in float64, written down from their docstrings, and errors against them."""

import torch
from torch import Tensor


def attention_formula(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, *, lengths: list[int], heads: int
) -> Tensor:
    """One sequence after another, one head after another."""
    qkv, q_gain, k_gain = qkv.double(), q_gain.double(), k_gain.double()
    width = len(q_gain)
    d = width // heads
    found = []
    for part in qkv.split(lengths):
        q, k, v = part[:, :width], part[:, width : 2 * width], part[:, 2 * width :]
        q = q / (q.pow(2).sum(1, keepdim=True) / width + 1e-6).sqrt() * q_gain
        k = k / (k.pow(2).sum(1, keepdim=True) / width + 1e-6).sqrt() * k_gain
        each = []
        for one in (slice(start, start + d) for start in range(0, width, d)):
            scores = q[:, one] @ k[:, one].T / d**0.5
            weights = (
                (scores - scores.amax(1, keepdim=True).detach()).exp() if len(part) else scores
            )
            each.append(weights @ v[:, one] / weights.sum(1, keepdim=True))
        found.append(torch.cat(each, dim=1))
    return torch.cat(found)


def rmsnorm_formula(
    x: Tensor,
    weight: Tensor | None,
    branch: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    h = x.double()
    if branch is not None:
        factor = torch.ones(len(x)) if keep is None else keep
        h = h + torch.einsum(
            "b,c,b...c->b...c",
            factor.double().to(x.device),
            *map(torch.Tensor.double, (gamma, branch)),
        )
    if weight is None:
        return h, None
    return h, h / (h.pow(2).sum(-1, keepdim=True) / h.shape[-1] + 1e-6).sqrt() * weight.double()


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The root of the squared differences' sum, over that of the squares' sum."""
    return float((found.double() - exact).norm() / exact.norm())
