"""Operations of the networks' modules, without our kernels but for attention, and a block of Flux with
and without them; forward alone and with their backward.

On a GPU in bf16 at the size of FLUX.1 and SDXL at 1024 pixels and batch 1; on the CPU in float32 and small.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttune.adapters.lora import adapted_modules, apply_lora
from fasttune.flow_matching import FlowMatching
from fasttune.models.flux import AdaptiveNorm, SingleBlock
from fasttune.models.formulas import FORMULAS
from fasttune.models.fused import fuse
from fasttune.models.layers import GroupNorm, Linear
from fasttune.models.rope import rope_table, rotate
from fasttune.models.unet import GegluProjection
from fasttune_kernels import attention

pytestmark = pytest.mark.parametrize("passes", ["forward", "both"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A transformer on tokens, and a level of a U-Net."""

    grid: int
    """Side of the grid of image tokens."""
    text: int
    heads: int
    head_width: int
    rank: int
    channels: int
    side: int
    """Of the U-Net's feature map, and of the latents."""
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        return self.grid**2 + self.text

    @property
    def width(self) -> int:
        return self.heads * self.head_width


REAL = Size(
    grid=64,
    text=512,
    heads=24,
    head_width=128,
    rank=16,
    channels=320,
    side=128,
    dtype=torch.bfloat16,
)
SMALL = Size(
    grid=8, text=16, heads=2, head_width=64, rank=4, channels=32, side=16, dtype=torch.float32
)


@pytest.fixture
def size(device: torch.device) -> Size:
    return SMALL if device.type == "cpu" else REAL


@pytest.fixture
def draw(device: torch.device, size: Size) -> Callable[..., Tensor]:
    """draw(*shape): a trainable tensor, the same in each run."""
    g = torch.Generator(device).manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device, dtype=size.dtype).requires_grad_()

    return make


@pytest.fixture
def run(benchmark: Any, passes: str) -> Callable[..., None]:
    """run(function, inputs): benchmarks `function()`, and the gradients of `inputs` if asked."""

    def measure(function: Callable[[], Tensor], inputs: Sequence[Tensor]) -> None:
        out = function()
        benchmark.extra_info["shapes"] = [list(t.shape) for t in inputs]
        benchmark.extra_info["dtype"] = str(inputs[0].dtype)
        if passes == "forward":
            benchmark(function)
            return
        grad = torch.randn_like(out)

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(function(), inputs, grad)

        both()  # a slow first call would be taken for the operation's time, and few rounds chosen
        grads = benchmark(both)
        assert all(bool(g.isfinite().all()) for g in grads)

    return measure


Draw = Callable[..., Tensor]
Run = Callable[..., None]


def test_attention(run: Run, draw: Draw, size: Size) -> None:
    q, k, v = (draw(1, size.tokens, size.heads, size.head_width) for _ in range(3))
    run(lambda: attention(q, k, v), (q, k, v))


def test_norm_modulate(run: Run, draw: Draw, size: Size, device: torch.device) -> None:
    """LayerNorm, scale and shift of FLUX.1, with the projection that makes them."""
    norm = _frozen(AdaptiveNorm(size.width, 3), size, device)
    x, vector = draw(1, size.tokens, size.width), draw(1, size.width)
    run(lambda: norm(x, vector)[0], (x, vector))


def test_rope(run: Run, draw: Draw, size: Size, device: torch.device) -> None:
    axes = (size.head_width // 8, *[size.head_width * 7 // 16] * 2)
    cos, sin = rope_table(size.grid, size.grid, size.text, axes=axes, device=device)
    x = draw(1, size.tokens, size.heads, size.head_width)
    run(lambda: rotate(x, cos, sin), (x,))


def test_geglu(run: Run, draw: Draw, size: Size, device: torch.device) -> None:
    """SDXL's gated unit at its level of 640 channels, projection included."""
    width = 2 * size.channels
    layer = _frozen(GegluProjection(width, 4 * width), size, device)
    x = draw(1, (size.side // 2) ** 2, width)
    run(lambda: layer(x), (x,))


def test_group_norm_silu(run: Run, draw: Draw, size: Size, device: torch.device) -> None:
    norm = _frozen(GroupNorm(32, size.channels), size, device)
    x = draw(1, size.channels, size.side, size.side)
    run(lambda: F.silu(norm(x)), (x,))


def test_lora_linear(run: Run, draw: Draw, size: Size, device: torch.device) -> None:
    network = _frozen(nn.Sequential(Linear(size.width, size.width)), size, device)
    apply_lora(network, targets=("*",), rank=size.rank, alpha=1.0)
    module = adapted_modules(network)["0"]
    x = draw(1, size.tokens, size.width)
    run(lambda: network(x), (x, module.lora_A, module.lora_B))


@pytest.mark.parametrize("way", ["plain", "fused"])
def test_flux_single_block(
    run: Run, draw: Draw, size: Size, device: torch.device, way: str
) -> None:
    """With adapters on all its linear layers; by its formula where it is fused, not compiled."""
    block = SingleBlock(size.width, size.heads)
    network = _frozen(nn.Sequential(block), size, device)
    apply_lora(network, targets=("*",), rank=size.rank, alpha=1.0)
    if way == "fused":
        assert "plain" not in fuse(network, FORMULAS)
    adapters = [p for p in network.parameters() if p.requires_grad]
    x, vector = draw(1, size.tokens, size.width), draw(1, size.width).detach()
    axes = (size.head_width // 8, *[size.head_width * 7 // 16] * 2)
    cos, sin = rope_table(size.grid, size.grid, size.text, axes=axes, device=device)
    run(lambda: block(x, vector, cos, sin, None), (x, *adapters))


def test_loss(run: Run, draw: Draw, size: Size, device: torch.device) -> None:
    """Noising and loss of flow matching around a network that returns its parameter."""
    clean, noise, prediction = (draw(4, 16, size.side, size.side) for _ in range(3))
    clean, noise = clean.detach().float(), noise.detach().float()
    objective = FlowMatching(timestep_sampling="uniform", shift=1.0)
    t = torch.linspace(0.1, 0.9, len(clean), device=device)
    run(lambda: objective.loss(lambda noisy, t: prediction, clean, noise, t).mean(), (prediction,))


def _frozen(module: nn.Module, size: Size, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return module.to(device, size.dtype).requires_grad_(False)
