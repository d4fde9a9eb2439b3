"""What kind of launch an operation is.

One operation is counted as one launch. That is not exact (a GPU runs two kernels for a group
norm, up to three for the backward of a convolution, and splits long lists of `_foreach_` operations;
what fasttune's own operations launch, own_launches.py finds), but it moves whenever the number of
kernels does, and needs no GPU.
"""

from typing import Literal

import torch
from torch._ops import OpOverload

Kind = Literal["gemm", "attention", "custom", "pointwise", "copy", "view"]
LAUNCHED: tuple[Kind, ...] = ("gemm", "attention", "custom", "pointwise", "copy")
"""The kinds that start work on the device; a view does not."""

_GEMM = frozenset(
    """
    mm addmm addmm_ bmm baddbmm baddbmm_ addbmm mv addmv dot vdot matmul linear linear_backward
    _addmm_activation _int_mm _scaled_mm _scaled_mm_v2 _grouped_mm _scaled_grouped_mm _foreach_mm
    _weight_int4pack_mm _weight_int8pack_mm mkldnn_linear
    convolution _convolution convolution_backward convolution_overrideable conv1d conv2d conv3d
    convolution_backward_overrideable cudnn_convolution miopen_convolution mkldnn_convolution
    _mps_convolution mps_convolution_backward thnn_conv2d _conv_depthwise2d _convolution_pointwise _linear_pointwise
    """.split()
)
_ATTENTION = ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention")
_COPY = frozenset(
    """
    copy copy_ split_copy clone _to_copy to contiguous cat stack constant_pad_nd pixel_shuffle pixel_unshuffle
    repeat roll flip channel_shuffle _pin_memory _foreach_copy _foreach_copy_ _local_scalar_dense
    slice_backward select_backward slice_scatter select_scatter diagonal_scatter as_strided_scatter
    """.split()
)
"""What moves values, or converts their dtype, and computes nothing."""
_NO_LAUNCH = frozenset(
    """
    _unsafe_view _reshape_alias reshape empty empty_like empty_strided new_empty new_empty_strided
    empty_permuted lift lift_fresh set_ resize_ resize_as_ detach_ requires_grad_
    """.split()
)
"""Views whose schema does not say so, and allocations."""

_LAUNCHED_FOR_NO_TENSOR = frozenset({"aten::equal", "aten::is_nonzero", "aten::_assert_async"})


KERNELS = ("fasttune", "fasttune_kernels")
"""Namespaces of our kernels; what stands in for torch's own has another."""
_PRODUCTS: dict[str, Kind] = {
    "lora_linear_forward": "gemm",
    "lora_linear_backward": "gemm",
    "lora_linear_backward_into": "gemm",
    "attention_forward": "attention",
    "attention_backward": "attention",
}
"""Operations of ours that are a product above all, whoever's kernel computes it."""


def is_own(func: OpOverload) -> bool:
    """Whether the operation is of fasttune's own."""
    return func.namespace in KERNELS


def kind_of(func: OpOverload) -> Kind:
    """The kind of an operation, as a dispatch mode or a graph of aten operations shows it.

    gemm: matrix products and convolutions, forward and backward. attention: fused attention. custom:
    other operations of fasttune's own. copy: data moved without arithmetic. view: no launch, which is
    views, allocations and questions about metadata. pointwise: all others, reductions and norms included.
    """
    name = func._schema.name.partition("::")[2]
    if is_own(func):
        return _PRODUCTS.get(name, "custom")
    if name in _GEMM:
        return "gemm"
    if any(part in name for part in _ATTENTION):
        return "attention"
    if name in _COPY or torch.Tag.view_copy in func.tags:
        return "copy"
    if name in _NO_LAUNCH or torch.Tag.inplace_view in func.tags or _is_view(func):
        return "view"
    return "pointwise"


def _is_view(func: OpOverload) -> bool:
    """Whether the outputs are all views of inputs that are not written, or no tensors at all."""
    schema = func._schema
    if any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
        return False
    tensors = [r for r in schema.returns if "Tensor" in str(r.type)]
    if not tensors:  # sizes, strides, devices; but a comparison of values runs on the device
        return schema.name not in _LAUNCHED_FOR_NO_TENSOR
    return all(r.alias_info is not None for r in tensors)
