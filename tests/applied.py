"""Operations with their gradients, for Triton's interpreter (see interpret.py)."""

import contextlib
from unittest.mock import patch

import steps
import torch
from coded import coded_targets
from interpret import find
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from distill.kernels import alignment, linear_alignment, self_check
from distill.kernels.coded_targets import decode_targets
from distill.kernels.codes import decode_codes


def gradients(place: str, arguments: tuple, settings: dict, upstream: list[Tensor]) -> tuple:
    """Outputs of what stands at `place`, and gradients of the arguments that want one."""
    leaves = [x for x in tree_leaves((arguments, settings)) if wants_gradient(x)]
    made = tree_leaves(find(place)(*arguments, **settings))
    outputs = [x for x in made if wants_gradient(x) and not x.is_leaf]
    found = torch.autograd.grad(outputs, leaves, upstream)
    return [x.detach() for x in outputs], list(found)


def without_gradients(place: str, arguments: tuple, settings: dict):
    with torch.no_grad():
        return find(place)(*arguments, **settings)


def wants_gradient(x) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def second_backward(place: str, arguments: tuple, settings: dict) -> str:
    """What a second backward pass over the sum of losses says."""
    leaves = [x for x in tree_leaves(arguments) if wants_gradient(x)]
    total = find(place)(*arguments, **settings).sum()
    torch.autograd.grad(total, leaves, retain_graph=True)
    try:
        torch.autograd.grad(total, leaves)
    except RuntimeError as error:
        return str(error)
    return ""


def clip_by_clip(place: str, arguments: tuple, settings: dict):
    """What is returned where a GPU's cache holds the decoded targets of one clip."""
    module = alignment if place.startswith("alignment.") else linear_alignment
    before, module.DECODED_BYTES = module.DECODED_BYTES, 1
    try:
        return find(place)(*arguments, **settings)
    finally:
        module.DECODED_BYTES = before


def scaled(gradients: Tensor, ratio: Tensor) -> Tensor:
    alignment._alignment_bwd(gradients, ratio)
    return gradients


def step(precision: str, **settings) -> dict[str, Tensor]:
    return steps.whole_step(precision, **settings)


def losses(precision: str, num_steps: int) -> Tensor:
    return steps.train_losses(precision, num_steps)


def checked_operations(precisions: list[str]) -> list[str]:
    """Names of the operations that steps on coded targets take, each checked by PyTorch.

    What it checks: that nothing is written or shared but what the schema says, and that outputs
    have the shapes, strides and dtypes that the compiler is told.
    """
    calls = {}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "distill":
                copied = tree_map_only(Tensor, Tensor.clone, (args, kwargs or {}))
                arity = tuple(x is None for x in tree_leaves(copied))  # of each form, one
                calls.setdefault((function, arity), copied)
            return function(*args, **kwargs or {})

    is_compiling, torch.compiler.is_compiling = torch.compiler.is_compiling, lambda: True
    try:
        with Record():
            for precision in precisions:
                steps.whole_step(precision, is_coded=True)
            # Other operations take these two as part of themselves.
            targets = coded_targets(4, 96)
            decode_targets(targets, torch.float16)
            decode_codes(*targets[:3], width=96)
    finally:
        torch.compiler.is_compiling = is_compiling
    for (function, _), (args, kwargs) in calls.items():
        torch.library.opcheck(function, args, kwargs, test_utils=("test_schema", "test_faketensor"))
    return sorted({function.__name__.removesuffix(".default") for function, _ in calls})


def embedding(
    patches: Tensor, weight: Tensor, bias: Tensor, upstream: Tensor, **statistics
) -> tuple:
    """Embeddings and the gradients of weight and bias, made while autocast is on."""
    arguments = (patches, weight, bias, *statistics.values(), weight.dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return gradients("patch_embed._PatchEmbed.apply", arguments, {}, [upstream])


def where(changes: dict, place: str, arguments: tuple, settings: dict):
    """What is returned with attributes of modules changed, by their places."""
    with contextlib.ExitStack() as stack:
        for name, value in changes.items():
            module, attribute = name.rsplit(".", 1)
            stack.enter_context(patch.object(find(module), attribute, value))
        return find(place)(*arguments, **settings)


def self_checked(dtype: str, kernels: tuple[str, ...], changes: dict) -> dict[str, str]:
    """What the check of some kernels says on the CPU, with attributes of their modules changed.

    Small: 176 wide in place of 1408, and rows of a few.
    """
    small = {"TEACHER": 176, "LEFT": 16, "CLIPS": 2, "TOKENS": 5, "LENGTHS": (1, 0, 17)}
    small |= {"BITS": (3,), "ODD": 13}
    changes = {f"self_check.{name}": value for name, value in small.items()} | changes
    cases = self_check.cases

    def some(*arguments):
        return (case for case in cases(*arguments) if not kernels or case.kernel in kernels)

    arguments = (torch.device("cpu"), getattr(torch, dtype))
    return where({**changes, "self_check.cases": some}, "self_check.self_check", arguments, {})
