"""The check that a run's default choice of kernels rests on, on a CUDA device."""

import pytest
import torch

from distill.kernels import attention, jit
from distill.kernels.self_check import self_check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_runs_check_passes(dtype):
    assert self_check(torch.device("cuda"), dtype) == {}
    assert jit.chosen() == "triton"  # as this folder's tests choose


def test_a_runs_check_names_a_kernel_that_is_wrong(monkeypatch):
    monkeypatch.setattr(attention, "LOG2E", 1.0)
    wrong = self_check(torch.device("cuda"), torch.bfloat16)
    assert set(wrong) == {"attention"} and wrong["attention"].startswith("is off by")
