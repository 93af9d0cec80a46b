"""Whole steps by kernels, in Triton's interpreter: against torch's, and by torch.compile."""

import pytest
import torch
from interpret import interpret
from steps import train_losses
from torch.testing import assert_close

STEPS = 4
EAGER = {"backend": "aot_eager"}  # traces and takes apart as other backends, makes no new kernels


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    calls = {
        "eager": ("applied.step", ("fp16",), {"is_coded": True}),
        "compiled": ("applied.step", ("fp16",), {"is_coded": True, "compiled": EAGER}),
        "operations": ("applied.checked_operations", (["fp32", "fp16"],), {}),
    }
    for precision in ("fp32", "fp16"):
        calls[precision] = ("applied.losses", (precision, STEPS), {})
    return interpret(calls, tmp_path_factory.mktemp("interpreter"))


def test_a_compiled_step_is_one_graph_with_the_bits_of_an_eager_one(interpreted):
    eager, compiled = interpreted["eager"], interpreted["compiled"]
    assert len(eager) > 30 and "student.blocks.0.attn.q_norm.weight" in eager
    assert_close(compiled, eager, rtol=0, atol=0)


def test_every_operation_is_what_its_schema_and_its_fake_say(interpreted):
    names = torch._C._dispatch_get_all_op_names()
    registered = {name.split("::")[1] for name in names if name.startswith("distill::")}
    assert interpreted["operations"] == sorted(registered)


def test_steps_by_kernels_go_where_torchs_go(interpreted):
    exact = train_losses("fp32", STEPS)
    assert_close(interpreted["fp32"], exact, rtol=1e-4, atol=1e-4)
    by_torch = (train_losses("fp16", STEPS) - exact).abs().amax(0)
    by_kernels = (interpreted["fp16"] - exact).abs().amax(0)
    assert (by_kernels <= 2 * by_torch).all(), f"{by_kernels.tolist()}, torch {by_torch.tolist()}"
