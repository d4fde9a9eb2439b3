"""Operations are told apart by what they start on the device."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fasttune_kernels.lora_linear  # noqa: F401  # with attention, operations that torch then knows
from benchmarks.static.kinds import kind_of

aten = torch.ops.aten


class Kinds(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[kind_of(func)] += 1
        return func(*args, **(kwargs or {}))


def counted(function: Any, *args: Any) -> dict[str, int]:
    with Kinds() as kinds:
        function(*args)
    return dict(kinds.counts)


@pytest.mark.parametrize(
    ("kind", "functions"),
    {
        "gemm": [
            aten.mm.default,
            aten.addmm.default,
            aten.bmm.default,
            aten.convolution.default,
            aten.convolution_backward.default,
            aten._int_mm.default,
        ],
        "attention": [
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_flash_attention_backward.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
            aten._scaled_dot_product_cudnn_attention.default,
        ],
        "copy": [
            aten.copy_.default,
            aten.clone.default,
            aten._to_copy.default,
            aten.cat.default,
            aten.constant_pad_nd.default,
            aten.split_copy.Tensor,
            aten.view_copy.default,
            aten._local_scalar_dense.default,
        ],
        "view": [
            aten.view.default,
            aten._unsafe_view.default,
            aten.t.default,
            aten.transpose.int,
            aten.expand.default,
            aten.slice.Tensor,
            aten.split.Tensor,
            aten.unbind.int,
            aten.detach.default,
            aten.unsqueeze_.default,
            aten.empty.memory_format,
            aten.is_same_size.default,
            aten.sym_size.int,
        ],
        "pointwise": [
            aten.add.Tensor,
            aten.add_.Tensor,
            aten.sum.dim_IntList,
            aten.native_layer_norm.default,
            aten.native_group_norm_backward.default,
            aten.zeros_like.default,
            aten.fill_.Scalar,
            aten._foreach_add_.Scalar,
            aten._foreach_norm.Scalar,
            aten._fused_adamw_.default,
            aten.equal.default,
            aten.normal_.default,
            aten.gather.default,
        ],
    }.items(),
)
def test_each_kind(kind: str, functions: list[Any]) -> None:
    assert {str(f): kind_of(f) for f in functions} == {str(f): kind for f in functions}


def test_own_operations_are_custom() -> None:
    library = torch.library.Library("fasttune", "FRAGMENT")
    library.define("same(Tensor x) -> Tensor")
    assert kind_of(torch.ops.fasttune.same.default) == "custom"
    assert kind_of(torch.ops.fasttune.attention_backward.default) == "attention"
    assert kind_of(torch.ops.fasttune.lora_linear_forward.default) == "gemm"


def test_a_linear_is_one_gemm_and_a_permuted_copy_one_copy() -> None:
    x, weight, bias = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    found = counted(lambda: F.linear(x, weight, bias).transpose(1, 2).contiguous())
    assert {k: n for k, n in found.items() if k != "view"} == {"gemm": 1, "copy": 1}


def test_an_operation_in_place_and_one_that_returns_nothing_are_launches() -> None:
    x = [torch.ones(3), torch.ones(4)]
    assert counted(torch._foreach_mul_, x, 2.0) == {"pointwise": 1}
    assert counted(x[0].add_, 1.0) == {"pointwise": 1}
    assert counted(x[0].view, 3, 1) == {"view": 1}


def test_attention_is_one_launch_in_each_direction() -> None:
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    found = counted(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    assert found["attention"] == 2
