"""Operations of the trained networks, one file each, behind one public function each.

Networks call these and never a backend: which kernel runs is decided here, by device and shape.
"""

from fasttune_kernels.arena import Arena
from fasttune_kernels.attention import attention
from fasttune_kernels.diffusion_loss import diffusion_loss
from fasttune_kernels.ema_step import ema_step_
from fasttune_kernels.gated_residual import gated_residual, gated_residual_norm_modulate
from fasttune_kernels.geglu import geglu
from fasttune_kernels.gelu_tanh import gelu_tanh
from fasttune_kernels.gradient_norm import gradient_norm
from fasttune_kernels.group_norm_silu import group_norm_silu
from fasttune_kernels.lora_linear import lora_linear
from fasttune_kernels.norm_modulate import norm_modulate
from fasttune_kernels.optimizer_step import optimizer_step_
from fasttune_kernels.qk_norm_rope import qk_norm_rope

__all__ = [
    "Arena",
    "attention",
    "diffusion_loss",
    "ema_step_",
    "gated_residual",
    "gated_residual_norm_modulate",
    "geglu",
    "gelu_tanh",
    "gradient_norm",
    "group_norm_silu",
    "lora_linear",
    "norm_modulate",
    "optimizer_step_",
    "qk_norm_rope",
]
