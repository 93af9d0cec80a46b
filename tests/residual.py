"""Inputs of the residual norm in all its forms, and what comes of them with gradients."""

import torch
from formulas import rmsnorm_formula

INPUTS = ("x", "weight", "branch", "gamma", "keep")
LEAVES = ("x", "weight", "branch", "gamma")  # keep is a draw, without a gradient
FORMS = {
    "all": INPUTS,
    "no drop path": ("x", "weight", "branch", "gamma"),
    "no norm": ("x", "branch", "gamma", "keep"),
    "norm": ("x", "weight"),
}


def inputs(shape, form, types, *, device="cpu"):
    """Also the upstream gradients of what there is; the drop path factors hold a 0.

    `types` are those of x, of the branch and of the parameters.
    """
    stream = torch.Generator(device).manual_seed(sum(shape))
    draw = lambda *size: torch.randn(size, generator=stream, device=device)  # noqa: E731
    of_x, of_branch, of_gains = (getattr(torch, name) for name in types)
    found = {
        "x": draw(*shape).to(of_x),
        "weight": (1 + 0.3 * draw(shape[-1])).to(of_gains),
        "branch": draw(*shape).to(of_branch),
        "gamma": (0.5 + 0.3 * draw(shape[-1])).to(of_gains),
        "keep": (torch.arange(shape[0], device=device) % 3) / 1.5,
    }
    found = {name: tensor for name, tensor in found.items() if name in FORMS[form]}
    if "branch" in found:
        found["d_h"] = draw(*shape).to(of_x)
    if "weight" in found:
        found["d_out"] = draw(*shape).to(of_x)
    return found


def with_gradients(call, tensors):
    """h where it is a sum, out, and the gradients of LEAVES by name."""
    leaves = {
        name: tensor.detach().clone().requires_grad_()
        for name, tensor in tensors.items()
        if name in LEAVES
    }
    h, out = call(**leaves, keep=tensors.get("keep"))
    made = {"h": h if "branch" in leaves else None, "out": out}
    made = {name: tensor for name, tensor in made.items() if tensor is not None}
    upstream = [tensors[f"d_{name}"].to(tensor.dtype) for name, tensor in made.items()]
    gradients = torch.autograd.grad(list(made.values()), list(leaves.values()), upstream)
    found = {name: tensor.detach() for name, tensor in made.items()}
    return found | {f"d_{name}": d for name, d in zip(leaves, gradients, strict=True)}


def exact(tensors):
    def call(x, weight=None, branch=None, gamma=None, keep=None):
        return rmsnorm_formula(x, weight, branch, gamma, keep)

    return with_gradients(call, {name: tensor.double() for name, tensor in tensors.items()})
