"""Runs Triton kernels in Triton's interpreter: python tests/interpret.py IN OUT.

A process of its own, since the interpreter has to be chosen before Triton is imported. IN holds
tensors `CASE.NAME` and, in its metadata, the kernel and settings of each case; OUT gets the
`CASE.NAME` that the kernel wrote. Memory that nothing has written holds NaN.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distill.kernels.attention import _attention_bwd, _attention_fwd, pack
from distill.kernels.codes import _decode_codes_fwd
from distill.kernels.rmsnorm import _rmsnorm_bwd, _rmsnorm_fwd


def interpret(
    folder: Path, kernel: str, cases: dict[str, tuple[dict[str, torch.Tensor], dict]]
) -> dict[str, torch.Tensor]:
    """`CASE.NAME` of what `kernel`, a row of KERNELS, makes of every case's tensors and settings.

    Tensors that are None are left out.
    """
    tensors = {
        f"{case}.{name}": tensor
        for case, (inputs, _) in cases.items()
        for name, tensor in inputs.items()
        if tensor is not None
    }
    settings = {case: [kernel, values] for case, (_, values) in cases.items()}
    save_file(tensors, folder / "in", metadata={"cases": json.dumps(settings)})
    subprocess.run([sys.executable, __file__, folder / "in", folder / "out"], check=True)
    return load_file(folder / "out")


def _codes(inputs: dict, *, width: int, dtype: str) -> dict:
    return {"rows": _decode_codes_fwd(**inputs, width=width, dtype=getattr(torch, dtype))}


def _attention(inputs: dict, *, heads: int) -> dict:
    packing = pack(inputs.pop("cumulative"), device=torch.device("cpu"))
    d_out = inputs.pop("d_out")
    settings = {"heads": heads, "longest": packing.longest}
    out, lse, rstd = _attention_fwd(**inputs, tiles=packing.tiles, **settings)
    grads = _attention_bwd(
        d_out, **inputs, out=out, lse=lse, rstd=rstd, tiles=packing.tiles, **settings
    )
    names = ("out", "qkv", "q_gain", "k_gain")  # the output, then gradients
    return dict(zip(names, (out, *grads), strict=True))


def _rmsnorm(inputs: dict, *, dtype: str) -> dict:
    names = ("x", "branch", "gamma", "keep", "weight")
    x, *others = (inputs.get(name) for name in names)
    h, out, rstd = _rmsnorm_fwd(x, *others, getattr(torch, dtype))
    grads = _rmsnorm_bwd(
        inputs.get("d_h"), inputs.get("d_out"), x if h is None else h, rstd, *others, x.dtype
    )
    found = {"h": h, "out": out}
    found |= dict(zip(("d_x", "d_branch", "d_gamma", "d_weight"), grads, strict=True))
    return {name: tensor for name, tensor in found.items() if tensor is not None}


KERNELS = {"codes": _codes, "attention": _attention, "rmsnorm": _rmsnorm}


def main() -> None:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
    with safe_open(sys.argv[1], framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        cases = json.loads(file.metadata()["cases"])
    found = {}
    for case, (kernel, settings) in cases.items():
        start = f"{case}."
        inputs = {
            # The interpreter knows memory by its address, which an empty tensor here has not alone.
            name.removeprefix(start): tensor.clone()
            for name, tensor in tensors.items()
            if name.startswith(start)
        }
        made = KERNELS[kernel](inputs, **settings)
        found |= {start + name: tensor.clone() for name, tensor in made.items()}
    save_file(found, sys.argv[2])


if __name__ == "__main__":
    main()
