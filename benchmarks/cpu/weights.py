"""Weights of the shapes that real networks have, for optimizers, averages and checkpoints."""

import torch
from torch import nn

from fasttune.adapters.lora import apply_lora
from fasttune.models.unet import TransformerBlock
from fasttune.seeds import generator_for

RANK = 16
TEXT_WIDTH = 2048

Named = list[tuple[str, nn.Parameter]]


def adapter_weights(quick: bool) -> Named:
    """A LoRA of rank 16 on the attention of SDXL's blocks of width 1280, a third of the network's:
    many small tensors. float32, on the CPU."""
    with torch.device("meta"):
        blocks = _blocks(1280, 2 if quick else 20)
    apply_lora(blocks, targets=("*.to_q", "*.to_k", "*.to_v", "*.to_out.0"), rank=RANK, alpha=RANK)
    return _drawn(blocks, torch.float32)


def network_weights(quick: bool, dtype: torch.dtype = torch.float32) -> Named:
    """Two of SDXL's blocks of width 640 (quick: one of width 64): few tensors, most of them large."""
    with torch.device("meta"):
        blocks = _blocks(64, 1) if quick else _blocks(640, 2)
    return _drawn(blocks, dtype)


def set_gradients(named: Named) -> None:
    """Gradients that repeat."""
    g = generator_for(0, "gradients")
    for _, p in named:
        p.grad = (0.01 * torch.randn(p.shape, generator=g)).to(p.device, p.dtype)


def num_weights(named: Named) -> int:
    """Elements of all."""
    return sum(p.numel() for _, p in named)


def _blocks(width: int, count: int) -> nn.ModuleList:
    blocks = [TransformerBlock(width, TEXT_WIDTH, max(1, width // 64)) for _ in range(count)]
    return nn.ModuleList(blocks)


def _drawn(network: nn.Module, dtype: torch.dtype) -> Named:
    g = generator_for(0, "weights")
    return [
        (name, nn.Parameter((0.02 * torch.randn(p.shape, generator=g)).to(dtype)))
        for name, p in network.named_parameters()
        if p.requires_grad
    ]
