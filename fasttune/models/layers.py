"""Layers of the trained networks, and recomputation of their blocks.

Storage dtype and compute dtype are separate in the layer itself: weights are cast to the dtype of
the input in the forward, which is a no-op when the two are equal. float32 weights with bfloat16
activations therefore need no autocast. Statistics of the norms are taken in float32 for 16-bit
inputs (torch's kernels do so inside, without a float32 copy of the input).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def _cast(weight: Tensor | None, x: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(x.dtype)


class Linear(nn.Linear):
    """(..., in) -> (..., out) in the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), _cast(self.bias, x))


class Conv2d(nn.Conv2d):
    """(B, C, H, W) -> (B, C', H', W') in the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.to(x.dtype), _cast(self.bias, x))


class LayerNorm(nn.LayerNorm):
    """Over the last dimension, in the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        shape = self.normalized_shape
        return F.layer_norm(x, shape, _cast(self.weight, x), _cast(self.bias, x), self.eps)


class GroupNorm(nn.GroupNorm):
    """Over groups of channels of (B, C, ...), in the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(
            x, self.num_groups, _cast(self.weight, x), _cast(self.bias, x), self.eps
        )


class RMSNorm(nn.RMSNorm):
    """Over the last dimension, in the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, _cast(self.weight, x), self.eps)


class EmbeddingMLP(nn.Module):
    """Linear, SiLU, Linear on a conditioning vector: (B, in) -> (B, out)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear_1 = Linear(in_features, out_features)
        self.linear_2 = Linear(out_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear_1(x)
        return self.linear_2(F.silu(x))


def sinusoid(
    t: Tensor, width: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0
) -> Tensor:
    """Sinusoidal embedding of numbers: (B,) -> (B, width) float32.

    width is even; periods go geometrically from 2 pi to 2 pi * 10000. The cosines come first when
    flip_sin_to_cos. DDPM (arXiv 2006.11239), after Vaswani et al. (arXiv 1706.03762).
    """
    half = width // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(k * (-math.log(10000.0) / (half - freq_shift)))
    sin, cos = angles.sin(), angles.cos()
    return torch.cat([cos, sin] if flip_sin_to_cos else [sin, cos], dim=-1)


class Block(nn.Module):
    """A repeated block: the unit of recomputation. Networks call blocks through `run_block`."""

    recompute: bool = False
    """Keep the inputs alone and run the block again in the backward."""


def run_block(block: nn.Module, *args: Tensor | None) -> Any:
    """`block(*args)` of a `Block`, recomputed in the backward if it says so and gradients are on.

    The RNG state is kept and restored around the second run, so that dropout inside the block
    draws the same mask; beside the recomputation its cost cannot be measured.
    """
    if block.recompute and block.training and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=True)
    return block(*args)


def set_channels_last(denoiser: nn.Module) -> None:
    """Lays the weights of convolutions out with channels innermost; their outputs then are so, too.

    Tensor cores want it, and a feature map is a sequence of tokens without a copy. The parameters stay."""
    for module in denoiser.modules():
        if isinstance(module, nn.Conv2d):
            for p in module.parameters():
                if p.ndim == 4:
                    p.data = p.data.contiguous(memory_format=torch.channels_last)


def set_recompute(denoiser: nn.Module, enabled: bool) -> None:
    """Turns recomputation of every block on or off, for modules of diffusers as well."""
    blocks = [module for module in denoiser.modules() if isinstance(module, Block)]
    for block in blocks:
        block.recompute = enabled
    if not blocks:  # a network of diffusers has its own switch, and raises where it has none
        name = "enable_gradient_checkpointing" if enabled else "disable_gradient_checkpointing"
        getattr(denoiser, name)()
