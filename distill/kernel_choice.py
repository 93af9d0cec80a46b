"""Which operations a run takes on a GPU, `run.kernels`: this project's kernels or torch's."""

import functools
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from distill.dist import exchange
from distill.engines.plain import AUTOCAST
from distill.errors import InputError, StateError
from distill.kernels import jit
from distill.kernels.self_check import self_check
from distill.recipe import Distill, Recipe

logger = logging.getLogger(__name__)


@contextmanager
def using_kernels(recipes: Sequence[Recipe], device: torch.device) -> Iterator[None]:
    """Take recipes' kernels for as long as their run lasts, and say on a GPU which they are.

    Recipes that run together agree on them. A run within a run, such as a build of the cache that
    training lacks, keeps what "auto" has found for the whole, and does not say it again.
    """
    wanted, before = recipes[0].run.kernels, jit.chosen()
    if device.type == "cuda" and wanted == "triton" and jit.triton is None:
        raise InputError(
            "run.kernels is 'triton', but Triton is not installed; install it, or set "
            "run.kernels=torch"
        )
    found = ""
    if wanted == "auto":
        wanted = before or "torch"
        if before is None and device.type == "cuda":
            wanted, found = _proven(device, precisions(recipes))
    jit.choose(wanted)
    if device.type == "cuda" and before != wanted:
        logger.info("kernels on %s: %s%s", device, wanted, found)
    try:
        yield
    finally:
        jit.choose(before)


def precisions(recipes: Sequence[Recipe]) -> tuple[str, ...]:
    """All that the recipes' students and teachers run in, sorted."""
    found = set()
    for recipe in recipes:
        found.add(recipe.optim.precision)
        if isinstance(recipe.objective, Distill):
            found |= {teacher.precision for teacher in recipe.objective.teachers.values()}
    return tuple(sorted(found))


@functools.cache
def _proven(device: torch.device, precisions: tuple[str, ...]) -> tuple[jit.Kernels, str]:
    """Triton where its kernels pass their check in every joined process, and how that was found.

    Once for a process; elsewhere torch, with a warning that says what failed. Raises StateError
    where a kernel has made the device useless.
    """
    start, wrong = time.monotonic(), {}
    if jit.triton is None:
        wrong = {"triton": "is not installed"}
    else:
        for precision in precisions:
            try:
                wrong |= self_check(device, AUTOCAST.get(precision, torch.float32))
            except RuntimeError as error:
                raise StateError(str(error)) from error
    failed = [rank for rank, (count,) in enumerate(exchange(len(wrong))) if count]
    if not failed:
        seconds = time.monotonic() - start
        return "triton", f" (right in {', '.join(precisions)} by a check of {seconds:.0f} s)"
    reasons = [f"{kernel} {reason}" for kernel, reason in wrong.items()]
    logger.warning(
        "kernels on %s: torch's operations are taken, since this project's fail their check: %s; "
        "run.kernels=torch takes them without a check",
        device,
        "; ".join(reasons) or f"in the process of rank {failed[0]}, which says why",
    )
    return "torch", ""
