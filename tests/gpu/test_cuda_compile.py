"""Compiled steps, plain and as CUDA graphs, train as steps do as they are written."""

import pytest
import torch
from steps import tiny_batch, tiny_engine

from distill.objective import compile_losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = (4, 4, 4, 4, 2, 4)  # in pieces of three and one, and of two


def losses_of(mode: str) -> torch.Tensor:
    one = tiny_engine("cuda", micro_batch=3)
    compile_losses(one.objective, mode, torch.device("cuda"))
    found = [
        one.step(tiny_batch(seed=number, clips=clips), step=number + 1, lr=1e-3)
        for number, clips in enumerate(SIZES)
    ]
    one.check()
    return torch.stack([torch.stack([x["loss"], x["layer_00"], x["grad_norm"]]) for x in found])


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_have_the_losses_of_eager_ones(mode):
    torch.testing.assert_close(losses_of(mode), losses_of("none"), rtol=1e-3, atol=1e-4)
