"""Linear layers with adapters: one target, several that share an input, an input in two buffers, dropout.

B batch, N tokens, r rank.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import libraries
from benchmarks.gpu.libraries import Bind, Inputs
from benchmarks.gpu.names import OURS
from benchmarks.gpu.operation import FLUX_TOKENS, Draw, Operation, Sizes, bound
from fasttune_kernels import lora_linear, lora_linear_products
from fasttune_kernels.lora_linear import lora_linear_backward, lora_linear_forward
from fasttune_kernels.lora_linear_products import dropout_mask

RANK = 16
_DROPOUT = 0.25


def _lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    A: Tensor,
    B: Tensor,
    x2: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """Of as many targets, of equal widths, as A has ranks."""
    whole = x if x2 is None else torch.cat([x, x2], dim=-1)
    dropped = whole
    if seed is not None:
        mask = dropout_mask(seed, x[..., 0].numel(), 0, x.shape[-1], _DROPOUT)
        dropped = whole * mask.view_as(whole) / (1 - _DROPOUT)
    low = F.linear(dropped, A.to(x.dtype)).split(B.shape[1], dim=-1)
    ups = B.to(x.dtype).chunk(len(low))
    updates = [F.linear(part, up) for part, up in zip(low, ups, strict=True)]
    return F.linear(whole, weight, bias) + torch.cat(updates, dim=-1)


def _ours(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    A: Tensor,
    B: Tensor,
    x2: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """With the casts that a projection makes of its adapters."""
    return lora_linear(
        *(x, weight, bias, A.to(x.dtype), B.to(x.dtype)),
        slices=_slices(A, B),
        x2=x2,
        seed=seed,
        dropout=0.0 if seed is None else _DROPOUT,
    )


def _slices(A: Tensor, B: Tensor) -> list[int]:
    targets = len(A) // B.shape[1]
    width = len(B) // targets
    return [edge for i in range(targets) for edge in (i * width, (i + 1) * width)]


# --- the base product by either way, so that the table that chooses can be corrected


def _chosen(own: bool) -> AbstractContextManager[Any]:
    """Within, the base product is our kernel's or the vendor's. Around each call, as the backward
    runs in a thread and at a time of its own."""
    return patch.object(lora_linear_products, "has_own_product", lambda x: own)


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        own: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        A: Tensor,
        B: Tensor,
        x2: Tensor | None,
    ) -> Tensor:
        slices = _slices(A, B)
        with _chosen(own):
            y, low = lora_linear_forward(x, x2, weight, bias, A, B, slices, 1.0, 0.0, None)
        ctx.own = own
        ctx.save_for_backward(x, x2, weight, A, B, low)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, x2, weight, A, B, low = ctx.saved_tensors
        with _chosen(ctx.own):
            dx, dx2, _, _, dA, dB = lora_linear_backward(
                *(dy, x, x2, weight, A, B, low, _slices(A, B), 1.0, 0.0, None, None),
                *(True, False, False),
            )
        return None, dx, None, None, dA.to(A.dtype), dB.to(B.dtype), None if x2 is None else dx2


def _by(own: bool) -> Bind:
    def bind(
        x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor, x2: Tensor | None = None
    ) -> Callable[[], Any]:
        def run() -> Any:
            adapters = A.to(x.dtype), B.to(x.dtype)
            return _Chosen.apply(own, x, weight, bias, *adapters, x2)  # type: ignore[no-untyped-call]

        return run

    return bind


_VARIANTS = {f"{OURS} own product": _by(True), f"{OURS} vendor product": _by(False)}


# --- inputs


def _inputs(sizes: Sizes, draw: Draw) -> Inputs:
    """(B, N, in, out). The adapter is in float32, as it is trained."""
    return _joint_inputs((*sizes, 1), draw)


def _joint_inputs(sizes: Sizes, draw: Draw) -> Inputs:
    """(B, N, in, out, targets); out is that of all targets together."""
    batch, tokens, ins, outs, targets = sizes
    rank, wide = min(RANK, ins, outs), torch.promote_types(draw.dtype, torch.float32)
    return {
        "x": draw(batch, tokens, ins),
        "weight": draw(outs, ins, scale=ins**-0.5),
        "bias": draw(outs, scale=0.1),
        "A": draw(targets * rank, ins, scale=ins**-0.5, dtype=wide),
        "B": draw(outs, rank, scale=rank**-0.5, dtype=wide),
    }


def _split_inputs(sizes: Sizes, draw: Draw) -> Inputs:
    """(B, N, in, in of the second buffer, out)."""
    batch, tokens, first, second, outs = sizes
    found = _inputs((batch, tokens, first + second, outs), draw)
    x, x2 = found["x"].split([first, second], dim=-1)
    return {**found, "x": x.contiguous(), "x2": x2.contiguous()}


def _dropped_inputs(sizes: Sizes, draw: Draw) -> Inputs:
    seed = torch.tensor([1234], device=draw.generator.device)
    return {**_inputs(sizes, draw), "seed": seed}


def _flops(sizes: Sizes) -> int:
    batch, tokens, ins, outs, *targets = sizes
    rank = RANK * (targets[0] if targets else 1)
    return 2 * batch * tokens * (ins * outs + rank * ins + RANK * outs)


def _split_flops(sizes: Sizes) -> int:
    batch, tokens, first, second, outs = sizes
    return _flops((batch, tokens, first + second, outs))


_lora = partial(
    Operation,
    plain=_lora_linear,
    ours=bound(_ours),
    trained=("x", "A", "B"),
    checked=("weight", "bias"),
    flops=_flops,
    backward_flops=1.0,  # the base is frozen: one product back, and those of the adapter
)

LORA_OPERATIONS: tuple[Operation, ...] = (
    _lora(
        name="lora linear",
        make=_inputs,
        variants=_VARIANTS,
        libraries=libraries.LORA_LINEAR,
        sizes=(
            (1, FLUX_TOKENS, 3072, 3072),
            (1, FLUX_TOKENS, 3072, 12288),
            (1, 4096, 640, 640),
            (1, 1024, 1280, 1280),
            (1, 1024, 1280, 10240),
        ),
        odd=((1, 7, 33, 65), (3, 21, 64, 40)),
    ),
    _lora(
        name="lora linear, three targets",
        make=_joint_inputs,
        variants=_VARIANTS,
        sizes=((1, FLUX_TOKENS, 3072, 9216, 3),),
        odd=((1, 7, 33, 63, 3), (3, 21, 64, 120, 3)),
    ),
    _lora(
        name="lora linear, two buffers",
        make=_split_inputs,
        variants=_VARIANTS,
        trained=("x", "x2", "A", "B"),
        sizes=((1, FLUX_TOKENS, 3072, 12288, 3072),),
        odd=((1, 7, 33, 20, 65), (3, 21, 64, 128, 40)),
        flops=_split_flops,
    ),
    _lora(
        name="lora linear, dropout",
        make=_dropped_inputs,
        odd=((1, 7, 33, 65), (3, 21, 64, 40)),
    ),
)
