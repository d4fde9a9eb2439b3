"""Public operations of fasttune_kernels, forward alone and with their backward.

Their inputs are those of `fasttune bench gpu`, which checks the same operations and times them
beside others: in bf16 at the first size of a real model on a GPU; on the CPU, where PyTorch computes
them, in float32 at the first of the odd sizes, which is tiny. What the networks' modules take without
these kernels is in test_layers.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.libraries import outputs_of
from benchmarks.gpu.operation import Draw
from benchmarks.gpu.operations import OPERATIONS

NAMES = ("norm modulate", "gated residual", "gated residual norm", "qk norm rope", "gelu tanh")
NAMES += ("geglu", "group norm silu channels last", "lora linear", "flow loss", "quantize rows")
CHOSEN = {operation.name: operation for operation in OPERATIONS if operation.name in NAMES}
CASES = [
    (name, passes)
    for name, operation in CHOSEN.items()
    for passes in (("forward", "both") if operation.trained else ("forward",))
]


@pytest.mark.parametrize(("name", "passes"), CASES)
def test_operation(benchmark: Any, device: torch.device, name: str, passes: str) -> None:
    operation, on_cpu = CHOSEN[name], device.type == "cpu"
    draw = Draw(torch.Generator(device).manual_seed(0), torch.float32 if on_cpu else torch.bfloat16)
    inputs = operation.make(operation.odd[0] if on_cpu else operation.sizes[0], draw)
    wanted = [inputs[key].requires_grad_() for key in operation.trained]
    function = operation.ours(**inputs)
    outputs = outputs_of(function())
    benchmark.extra_info["shapes"] = {key: list(t.shape) for key, t in inputs.items()}
    benchmark.extra_info["dtype"] = str(draw.dtype)
    if passes == "forward":
        benchmark(function)
        return
    incoming = [torch.randn_like(t) for t in outputs]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs_of(function()), wanted, incoming)

    both()  # a slow first call would be taken for the operation's time, and few rounds chosen
    grads = benchmark(both)
    assert all(bool(g.isfinite().all()) for g in grads)
