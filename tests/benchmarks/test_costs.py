"""FLOPs, bytes and launches counted op by op, against arithmetic done by hand."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.static import step
from benchmarks.static.costs import Costs, CountCosts
from benchmarks.static.models import MODEL_FOLDERS, config_named
from fasttune.models import unet
from fasttune.models.layers import LayerNorm
from fasttune_kernels import attention

B, L, H, D = 2, 48, 3, 16


def counted(run: Callable[[], Any]) -> Costs:
    with CountCosts() as count:
        run()
    return count.costs


def test_a_linear_forward_and_backward() -> None:
    x, w = torch.randn(5, 7, requires_grad=True), torch.randn(11, 7, requires_grad=True)
    dy = torch.ones(5, 11)
    costs = counted(lambda: F.linear(x, w).backward(dy))
    assert costs.flops == 3 * 2 * 5 * 7 * 11
    assert costs.launches == {"gemm": 3}  # transposes are views
    # y = x w; dw = dy x, dx = dy w: each reads two of the three and writes the third
    assert costs.bytes == 3 * 4 * (5 * 7 + 11 * 7 + 5 * 11)


def test_attention_on_the_cpu_is_counted() -> None:
    q, k, v = (torch.randn(B, L, H, D, requires_grad=True) for _ in range(3))
    forward = counted(lambda: attention(q, k, v))
    product = 2 * B * H * L * L * D
    assert forward.flops == 2 * product and forward.launches["attention"] == 1
    both = counted(lambda: attention(q, k, v).sum().backward())
    # the backward recomputes the scores: five products beside the forward's two
    assert both.flops == 7 * product and both.launches["attention"] == 2


def test_views_cost_nothing_and_copies_what_they_move() -> None:
    x = torch.randn(4, 6)
    assert counted(lambda: x[1:].t().unsqueeze(0).expand(3, 6, 3)).launches.total() == 0
    assert counted(lambda: x.t().contiguous()).bytes == 2 * x.nbytes
    assert counted(lambda: torch.cat([x, x])).launches == {"copy": 1}
    # one float is read, whatever the shape
    expanded = torch.zeros(1).expand(1000)
    assert counted(lambda: expanded + 1).bytes == 4 + 4000


def test_a_multi_tensor_op_is_one_launch_over_all_its_bytes() -> None:
    xs = [torch.randn(8), torch.randn(24)]
    costs = counted(lambda: torch._foreach_mul_(xs, 2.0))
    assert costs.launches.total() == 1 and costs.bytes == 2 * 4 * 32


def test_sums_and_multiples() -> None:
    one = counted(lambda: torch.ones(3) @ torch.ones(3, 3))
    assert one.times(3) == one + one + one


def test_flux_has_the_flops_of_the_arithmetic() -> None:
    """74.4 TFLOP a forward at 4096 + 512 tokens: 59.5 in linear layers, 14.9 in attention."""
    config = config_named("flux-lora-32gb")
    config = replace(config, memory=replace(config.memory, activations="save"))
    folder, size = MODEL_FOLDERS["flux-dev"], (1024, 1024)
    with step.rehearsed(config, folder, micro_batches=1, size=size) as rehearsal:
        generator = torch.Generator()
        with CountCosts() as count, torch.no_grad():
            rehearsal.forward.loss(rehearsal.batch, generator)
    tokens, width, blocks = 4096 + 512, 3072, 19 + 38
    attention_flops = blocks * 4 * tokens**2 * width
    by_kind = {
        kind: sum(op.flops for op in count.costs.ops if op.kind == kind)
        for kind in ("gemm", "attention")
    }
    assert by_kind["attention"] == attention_flops
    assert count.costs.launches["attention"] == blocks
    # per token: 12 width^2 multiply-adds a block; the rest are modulation, LoRA, input and output
    assert by_kind["gemm"] == pytest.approx(2 * 12 * width**2 * tokens * blocks, rel=0.02)
    assert count.costs.flops == pytest.approx(74.4e12, rel=0.01)


def rows_with(patch: Any = None) -> dict[str, Any]:
    """The step's rows of a small U-Net, with something planted."""
    config = config_named("quickstart")
    (folder,) = [f for name, _, f in step.shipped_configs() if name == "quickstart"]
    with patch or nullcontext(), step.rehearsed(config, folder, micro_batches=1) as rehearsal:
        costs = step.costs_of_a_step(rehearsal, 1)
        flops = step.flops_row("x", rehearsal, costs)
    return {**flops, **step.launches_row("x", costs)}


def test_a_planted_copy_and_a_planted_upcast_change_the_rows() -> None:
    before = rows_with()
    assert rows_with() == before

    def copying(self: Any, x: Tensor, text: Tensor) -> Tensor:
        return plain(self, x.clone(), text)

    plain = unet.TransformerBlock.forward
    copied = rows_with(mock.patch.object(unet.TransformerBlock, "forward", copying))
    assert copied["copy"] > before["copy"] and copied["moved_gib"] > before["moved_gib"]
    assert copied["tflop"] == before["tflop"]

    def upcasting(self: Any, x: Tensor) -> Tensor:
        return normed(self, x.float()).to(x.dtype)

    normed = LayerNorm.forward
    upcast = rows_with(mock.patch.object(LayerNorm, "forward", upcasting))
    assert upcast["copy"] > before["copy"] and upcast["moved_gib"] > before["moved_gib"]
