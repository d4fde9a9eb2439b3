"""8-bit state in blocks of 256, https://arxiv.org/abs/2110.02861: a code for one of 256 values an element
and the largest magnitude of its block."""

from functools import cache

import torch
from torch import Tensor

from fasttune_kernels.arena import QUANTUM


@cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """(256,) float32, increasing: the values of 8-bit state over its block's largest magnitude, as
    bitsandbytes' create_dynamic_map. Seven decades, each with twice as many equal steps as the one
    below it, whose centres are the values; 0; and 1.
    """
    positive: list[float] = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1)
        positive += (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    negative = [-value for value in reversed(positive)] if signed else []
    return torch.tensor([*negative, 0.0, *positive, 1.0], device=device)


@cache
def _middles(signed: bool, device: torch.device) -> Tensor:
    values = dynamic_map(signed, device)
    return (values[1:] + values[:-1]) / 2


def quantize_blockwise(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(n,) float32, n a multiple of 256 -> (n,) uint8 codes of the nearest values, and (n / 256,)
    float32 largest magnitudes. A block of zeros is zeros."""
    rows = x.view(-1, QUANTUM)
    absmax = rows.abs().amax(dim=1)
    scaled = rows / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(scaled, _middles(signed, x.device))
    return codes.to(torch.uint8).view(-1), absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """(n,) uint8 and (n / 256,) -> (n,) float32."""
    values = dynamic_map(signed, codes.device)[codes.int()]
    return values.view(-1, QUANTUM).mul_(absmax[:, None]).view(-1)
