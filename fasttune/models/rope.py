"""Rotary position embedding of tokens on a grid (arXiv 2104.09864), as FLUX.1 has it.

B batch, N tokens, H heads, E head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

THETA = 10000.0


def rope_table(
    height: int, width: int, num_text_tokens: int, *, axes: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, each (N, 1, E / 2) float32, text tokens first.

    Axis 0 is unused (zero for all tokens), axes 1 and 2 are the token's row and column; text
    tokens sit at the origin. All in float32, as MPS has no float64: the largest angle at 1024 px is
    63 rad, so the error of a table entry is below 1e-5. Made on the device, without a sync.
    """
    zero = torch.zeros(height, width, device=device)
    rows = torch.arange(height, dtype=torch.float32, device=device)[:, None] + zero
    columns = torch.arange(width, dtype=torch.float32, device=device)[None, :] + zero
    positions = F.pad(
        torch.stack([zero, rows, columns], -1).flatten(0, 1), (0, 0, num_text_tokens, 0)
    )
    angles = []
    for axis, axis_width in enumerate(axes):
        k = torch.arange(0, axis_width, 2, dtype=torch.float32, device=device)
        frequencies = torch.exp(k * (-math.log(THETA) / axis_width))
        angles.append(positions[:, axis, None] * frequencies)
    angle = torch.cat(angles, dim=-1)[:, None]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns neighbouring pairs of x (B, N, H, E) by the angles of (N, 1, E / 2) tables."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
