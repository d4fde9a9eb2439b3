"""The matrix products of lora_linear, by PyTorch and by our kernels, forward and backward."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttune_kernels.dispatch import arch, runs_triton
from fasttune_kernels.lora_linear_launches import (
    MERGED_RANK,
    LinearConfig,
    has_own_product,
    launch_gradient,
    launch_linear,
)

_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B1, 0x7FEB352D, 0x846CA68B


def dropout_mask(seed: Tensor, rows: int, begin: int, end: int, dropout: float) -> Tensor:
    """(rows, end - begin) bool: which channels of which tokens are kept. seed (1,) int64.

    A hash of 32 bits (lowbias32, https://nullprogram.com/blog/2018/07/31/) of the channel with two keys
    of the row and the seed, compared with the probability. No generator has to be set, so that nothing
    waits for a seed on the device, and the kernels compute the same bits.
    """
    low, high = seed.view(torch.int32).unbind()
    key = _mixed(_mixed(low ^ _signed(_GOLDEN)) ^ high)
    row = _mixed(torch.arange(rows, dtype=torch.int32, device=seed.device) + key)
    column = torch.arange(begin, end, dtype=torch.int32, device=seed.device)
    bits = (column * _signed(_GOLDEN)) ^ row[:, None]
    return _mixed(bits, _mixed(row ^ key)[:, None]) >= mask_threshold(dropout)


def mask_threshold(dropout: float) -> int:
    """The int32 from which on a hash keeps its element."""
    return min(round(dropout * 2**32), 2**32 - 1) - 2**31


def _mixed(bits: Tensor, key: Tensor | int = 0) -> Tensor:
    bits = (bits ^ ((bits >> 16) & 0xFFFF)).mul_(_MIX_1).add_(key)
    bits = bits.bitwise_xor_((bits >> 15) & 0x1FFFF).mul_(_signed(_MIX_2))
    return bits.bitwise_xor_((bits >> 16) & 0xFFFF)


def _signed(bits: int) -> int:
    return bits - (bits >> 31 << 32)


def pairs(slices: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(slices[::2], slices[1::2], strict=True))


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def as_matrix(x: Tensor) -> Tensor:
    """(..., D) as (M, D) with rows that do not overlap: a view where strides allow it."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride() == (max(x.stride(0), x.shape[1]), 1) else x.contiguous()


def base_product(x: Tensor, x2: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[x | x2] W^T + b of matrices, by the vendor. With `base_product_backward` all that reads the base
    weights, but for `linear_kernel`, so these two are what other forms of the weights replace."""
    width = x.shape[1]
    first = weight if x2 is None else weight[:, :width]
    y = torch.mm(x, first.t()) if bias is None else torch.addmm(bias, x, first.t())
    return y if x2 is None else y.addmm_(x2, weight[:, width:].t())


def base_product_backward(
    dy: Tensor,
    weight: Tensor,
    begin: int,
    end: int,
    residual: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """dy W + residual, for the input channels from begin to end; in `out` if given."""
    weight = weight[:, begin:end]
    if residual is None:
        return torch.mm(dy, weight, out=out)
    return torch.addmm(residual, dy, weight, out=out)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapters:
    A: Tensor  # (R, K)
    B: Tensor  # (P, r)
    slices: list[int]
    scale: float
    dropout: float
    seed: Tensor | None

    @property
    def keep(self) -> float:
        return 1.0 if self.seed is None else 1 - self.dropout

    def targets(self) -> list[tuple[int, int, slice, slice]]:
        """Outputs of each target, from begin to end, its columns of low and its rows of B."""
        found, row, rank = [], 0, self.B.shape[1]
        for target, (begin, end) in enumerate(pairs(self.slices)):
            ranks = slice(target * rank, (target + 1) * rank)
            found.append((begin, end, ranks, slice(row, row + end - begin)))
            row += end - begin
        return found

    def kernel_slices(self, outputs: int) -> tuple[int, ...]:
        """As the kernels, which are compiled for them, have slices: none for all outputs."""
        return () if self.slices == [0, outputs] else tuple(self.slices)

    def kernel_dropout(self) -> dict[str, Any]:
        return {"seed": self.seed, "threshold": mask_threshold(self.dropout)}

    def dropped(self, x: Tensor, begin: int, end: int) -> Tensor:
        """x (M, end - begin) with zeros where the mask has them, not yet divided by `keep`."""
        if self.seed is None:
            return x
        kept = dropout_mask(self.seed, len(x), begin, end, self.dropout)
        return x.masked_fill(kept.logical_not_(), 0)


def adapters_of(
    A: Tensor | None, B: Tensor | None, slices: list[int], scale: float, dropout: float, seed: Any
) -> Adapters | None:
    if A is None or B is None:
        return None
    return Adapters(
        A=A.contiguous(), B=B.contiguous(), slices=slices, scale=scale, dropout=dropout,
        seed=seed if dropout > 0 else None,
    )  # fmt: skip


def buffers_of(x: Tensor, x2: Tensor | None) -> list[tuple[Tensor, int, int]]:
    """Each matrix of the input with its channels."""
    width = x.shape[-1]
    return [(x, 0, width)] + ([] if x2 is None else [(x2, width, width + x2.shape[-1])])


def launches_kernels(x: Tensor) -> bool:
    """Not in float32, whose products no matrix instruction does in full: that is for the vendor, and on
    the CPU for tests with the interpreter."""
    allowed = x.element_size() == 2 or (x.dtype is torch.float32 and x.device.type == "cpu")
    return runs_triton(x) and allowed and x.numel() > 0


def forward_by_torch(
    x: Tensor, x2: Tensor | None, weight: Tensor, bias: Tensor | None, adapters: Adapters
) -> tuple[Tensor, Tensor]:
    y = base_product(x, x2, weight, bias)
    low = x.new_empty(len(x), len(adapters.A))
    for buffer, begin, end in buffers_of(x, x2):
        A, beta = adapters.A[:, begin:end].t(), 1 if begin else 0
        dropped = adapters.dropped(buffer, begin, end)
        torch.addmm(low, dropped, A, beta=beta, alpha=1 / adapters.keep, out=low)
    for begin, end, ranks, rows in adapters.targets():
        y[:, begin:end].addmm_(low[:, ranks], adapters.B[rows].t(), alpha=adapters.scale)
    return y, low


def forward_by_triton(
    x: Tensor, x2: Tensor | None, weight: Tensor, bias: Tensor | None, adapters: Adapters
) -> tuple[Tensor, Tensor]:
    target, outputs = arch(x.device), len(weight)
    low = x.new_empty(len(x), len(adapters.A))
    launch_linear(
        low, LinearConfig.of_low(low.shape[1], target), x=x, x2=x2, weight=adapters.A,
        scale=1 / adapters.keep, drops_input=adapters.seed is not None, **adapters.kernel_dropout(),
    )  # fmt: skip
    slices = adapters.kernel_slices(outputs)
    product: dict[str, Any] = {
        "low": low,
        "up": adapters.B,
        "scale": adapters.scale,
        "slices": slices,
    }
    if has_own_product(x):
        y = x.new_empty(len(x), outputs)
        config = LinearConfig.from_heuristic(len(x), outputs, target)
        launch_linear(y, config, x=x, x2=x2, weight=weight, bias=bias, **product)
    else:
        y = base_product(x, x2, weight, bias)
        launch_linear(y, LinearConfig.of_update(target), residual=y, **product)
    return y, low


def gradients_by_torch(
    dy: Tensor, buffers: list[tuple[Tensor, int, int]], low: Tensor, adapters: Adapters
) -> tuple[Tensor, Tensor, Tensor]:
    dlow, dA, dB = (torch.empty_like(like) for like in (low, adapters.A, adapters.B))
    for begin, end, ranks, rows in adapters.targets():
        part = dy[:, begin:end]
        torch.mm(part, adapters.B[rows], out=dlow[:, ranks])
        _scaled_product(part.t(), low[:, ranks], adapters.scale, dB[rows])
    for buffer, begin, end in buffers:
        dropped = adapters.dropped(buffer, begin, end)
        _scaled_product(dlow.t(), dropped, adapters.scale / adapters.keep, dA[:, begin:end])
    return dlow, dA.to(wide_dtype(dy)), dB.to(wide_dtype(dy))


def _scaled_product(a: Tensor, b: Tensor, scale: float, out: Tensor) -> None:
    """out = scale a b, scaled before it is rounded."""
    torch.addmm(out, a, b, beta=0, alpha=scale, out=out)


def gradients_by_triton(
    dy: Tensor, buffers: list[tuple[Tensor, int, int]], low: Tensor, adapters: Adapters
) -> tuple[Tensor, Tensor, Tensor]:
    rank, scale = adapters.B.shape[1], adapters.scale
    dB, dlow = launch_gradient(
        dy, low, rank, up=adapters.B if rank <= MERGED_RANK else None,
        slices=adapters.kernel_slices(dy.shape[1]), scale=scale,
    )  # fmt: skip
    if dlow is None:
        dlow = torch.empty_like(low)
        for begin, end, ranks, rows in adapters.targets():
            torch.mm(dy[:, begin:end], adapters.B[rows], out=dlow[:, ranks])
    parts = [
        launch_gradient(
            buffer, dlow, len(adapters.A), transposed=True, scale=scale / adapters.keep,
            offset=begin, **adapters.kernel_dropout(),
        )[0]
        for buffer, begin, _ in buffers
    ]  # fmt: skip
    return dlow, parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), dB


def input_gradient(
    dy: Tensor,
    weight: Tensor,
    dlow: Tensor | None,
    adapters: Adapters | None,
    residual: Tensor | None,
    begin: int,
    end: int,
    out: Tensor | None = None,
) -> Tensor:
    """dy W + dlow A + residual for the input channels from begin to end; in `out`, contiguous, if given."""
    if adapters is None or dlow is None:
        return base_product_backward(dy, weight, begin, end, residual, out)
    A, scale = adapters.A[:, begin:end], adapters.scale / adapters.keep
    if not launches_kernels(dy):
        dx = base_product_backward(dy, weight, begin, end, residual, out)
        if adapters.seed is None:
            return dx.addmm_(dlow, A, alpha=scale)
        return dx.add_(adapters.dropped(torch.mm(dlow, A), begin, end), alpha=scale)
    target = arch(dy.device)
    product: dict[str, Any] = {"low": dlow, "up": A.t(), "scale": scale, "offset": begin}
    product |= adapters.kernel_dropout()
    if has_own_product(dy):
        dx = dy.new_empty(len(dy), end - begin) if out is None else out
        config = LinearConfig.from_heuristic(len(dy), end - begin, target)
        base = weight[:, begin:end].t()
        launch_linear(dx, config, x=dy, weight=base, residual=residual, **product)
    else:
        dx = base_product_backward(dy, weight, begin, end, residual, out)
        launch_linear(dx, LinearConfig.of_update(target), residual=dx, **product)
    return dx
