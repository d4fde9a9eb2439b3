"""Operations that launch kernels in ways that no list has, for test_recorded_launches.py: run in a process
of its own, which does not interpret kernels. Prints JSON."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from codegen_kernels import LAUNCHES, matmul, row_norm
from torch import Tensor

from benchmarks.static import codegen
from benchmarks.static import recorded_launches as recorded
from fasttune_kernels import dispatch

OPTIONS: dict[str, Any] = {}
"""What `planted` launches with beside what its own config says."""


@dispatch.custom_op("fasttune::planted")
def planted(a: Tensor, b: Tensor) -> Tensor:
    """The product of whole tiles."""
    c = a.new_empty(len(a), b.shape[1])
    blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "PRECISION": None}
    is_nvidia = dispatch.arch(a.device).startswith("sm_")
    config = {"num_warps": 4, "num_stages": 2 if is_nvidia else 1}
    matmul[(1,)](a, b, c, len(a), b.shape[1], b.shape[0], **(blocks | config | OPTIONS))
    return c


@planted.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(len(a), b.shape[1])


@dispatch.custom_op("fasttune::planted_norm")
def planted_norm(a: Tensor, b: Tensor) -> Tensor:
    """Of the rows of the product, which another operation makes."""
    x = planted(a, b)
    y = torch.empty_like(x)
    row_norm[(len(x),)](x, y, x.shape[1], 1e-6, BLOCK=64, num_warps=1, num_stages=1)
    return y


@planted_norm.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(len(a), b.shape[1])


def launches(offset: int = 0, inner: int = 512, listed: Any = (), **options: Any) -> list[Any]:
    """Of a step that has the operation, whose first tensor begins `offset` elements into its memory."""
    OPTIONS.clear()
    OPTIONS.update(options)
    flat = torch.empty(256 * inner + offset, dtype=torch.bfloat16, device="meta")
    with recorded._Calls() as found:
        planted_norm(
            flat[offset:].view(256, inner), flat.new_empty(inner, 1).expand(-1, 256).contiguous()
        )
    return recorded.launches_of_calls(list(found.calls), listed)


def told(found: list[Any]) -> dict[str, Any]:
    return {x.name: [recorded.described(x), x.targets, x.matrix] for x in found}


def rows(found: list[Any], folder: Path) -> list[Any]:
    given: dict[str, Any] = {"op_files": [], "cuda_files": folder, "allowed": {}, "cache": folder}
    return list(codegen.inspect([], in_steps=found, **given))


def main() -> None:
    folder = Path(sys.argv[1])
    on_sm_89 = [replace(x, targets=("sm_89",)) for x in LAUNCHES if x.name == "sound"]
    found = {
        "as it is": told(launches()),
        "again": told(launches()),
        "listed": told(launches(listed=on_sm_89)),
        "constexpr": told(launches(BLOCK_K=64)),
        "warps": told(launches(num_warps=8)),
        "unaligned": told(launches(offset=4)),
        "odd size": told(launches(inner=500)),
        "large": told(launches(inner=1 << 23)),
        "rows": rows(launches(), folder),
        "spilling rows": rows(launches(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64), folder),
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
