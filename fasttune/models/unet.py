"""The U-Net of Stable Diffusion 1.x, 2.x and SDXL: one code, other numbers.

Module and parameter names are those of the diffusers checkpoint (UNet2DConditionModel).

B batch, C channels of a level, H x W its size, L = H * W image tokens, T text tokens, D text
width, E width of the time embedding.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttune.models.layers import (
    Block,
    Conv2d,
    EmbeddingMLP,
    GroupNorm,
    LayerNorm,
    Linear,
    run_block,
    sinusoid,
)
from fasttune.models.unet_config import UNetConfig, read_unet_config
from fasttune_kernels import attention, group_norm_silu


class ResnetBlock(Block):
    """GroupNorm, SiLU, convolution, twice, with the time embedding added between."""

    def __init__(self, in_channels: int, out_channels: int, time_width: int, c: UNetConfig) -> None:
        super().__init__()
        self.norm1 = GroupNorm(c.num_groups, in_channels, eps=c.norm_eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = Linear(time_width, out_channels)
        self.norm2 = GroupNorm(c.num_groups, out_channels, eps=c.norm_eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), emb (B, E) after SiLU -> (B, C', H, W); a skip joins x's channels."""
        if skip is not None:  # joined here, so that recomputation does not keep the joint copy
            x = torch.cat([x, skip], dim=1)
        y = self.conv1(F.silu(self.norm1(x)))
        y = y + self.time_emb_proj(emb)[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    def __init__(self, width: int, context_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(context_width, width, bias=False)
        self.to_v = Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([Linear(width, width)])

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # (B, L, heads, width / heads)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Queries from x (B, L, C), keys and values from context (B, T, D)."""
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out[0](attention(self.heads(q), self.heads(k), self.heads(v)).flatten(2))


class GegluProjection(nn.Module):
    """GELU-gated linear unit (arXiv 2002.05202)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = Linear(in_features, 2 * out_features)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.proj(x).chunk(2, dim=-1)
        return y * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # the identity holds the place of diffusers' dropout: the second Linear is net.2
        self.net = nn.ModuleList(
            [GegluProjection(width, 4 * width), nn.Identity(), Linear(4 * width, width)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(Block):
    """Self-attention, cross-attention to the text, feed-forward."""

    def __init__(self, width: int, text_width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, width, num_heads)
        self.norm2 = LayerNorm(width)
        self.attn2 = Attention(width, text_width, num_heads)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map."""

    def __init__(self, level: int, c: UNetConfig) -> None:
        super().__init__()
        width = c.channels[level]
        self.is_linear = c.linear_projection
        self.norm = GroupNorm(c.num_groups, width, eps=1e-6)
        self.proj_in = Linear(width, width) if self.is_linear else Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, c.text_width[level], c.num_heads[level])
            for _ in range(c.num_transformer_blocks[level])
        )
        self.proj_out = Linear(width, width) if self.is_linear else Conv2d(width, width, 1)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x (B, C, H, W), text (B, T, D) -> (B, C, H, W)."""
        size = x.shape[2:]
        n = self.norm
        y = group_norm_silu(x, n.weight, n.bias, groups=n.num_groups, eps=n.eps, silu=False)
        if self.is_linear:
            y = self.proj_in(y.flatten(2).transpose(1, 2))  # (B, L, C)
        else:
            y = self.proj_in(y).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            y = run_block(block, y, text)
        if self.is_linear:
            return x + self.proj_out(y).transpose(1, 2).unflatten(2, size)
        return x + self.proj_out(y.transpose(1, 2).unflatten(2, size))


class Resample(nn.Module):
    """Holds the convolution of a change of size under diffusers' name."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Level(nn.Module):
    """Resnets of one size, each followed by a transformer where the level has attention."""

    def __init__(
        self,
        in_channels: list[int],
        level: int,
        time_width: int,
        c: UNetConfig,
        *,
        num_transformers: int,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        width = c.channels[level]
        self.resnets = nn.ModuleList(ResnetBlock(n, width, time_width, c) for n in in_channels)
        if num_transformers:
            self.attentions = nn.ModuleList(
                SpatialTransformer(level, c) for _ in range(num_transformers)
            )
        if downsample:
            self.downsamplers = nn.ModuleList([Resample(width, stride=2)])
        if upsample:
            self.upsamplers = nn.ModuleList([Resample(width, stride=1)])
        self.has_attention = num_transformers > 0
        self.has_downsample = downsample
        self.has_upsample = upsample


class DownLevel(Level):
    def forward(self, x: Tensor, emb: Tensor, text: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x (B, C, H, W) -> the next level's input, and the outputs that the up path joins."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = run_block(resnet, x, emb)
            if self.has_attention:
                x = self.attentions[i](x, text)
            skips.append(x)
        if self.has_downsample:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidLevel(Level):
    def forward(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        """(B, C, H, W) -> the same, through resnet, transformer and resnet."""
        x = run_block(self.resnets[0], x, emb)
        x = self.attentions[0](x, text)
        return run_block(self.resnets[1], x, emb)


class UpLevel(Level):
    def forward(
        self, x: Tensor, emb: Tensor, text: Tensor, skips: list[Tensor], size: torch.Size | None
    ) -> Tensor:
        """x (B, C, H, W) and one skip a resnet -> (B, C', *size), the next level's input.

        size comes from the next level's skips rather than from doubling, so that sizes which were
        odd on the way down come back.
        """
        for i, resnet in enumerate(self.resnets):
            x = run_block(resnet, x, emb, skips[i])
            if self.has_attention:
                x = self.attentions[i](x, text)
        if self.has_upsample:
            x = self.upsamplers[0](F.interpolate(x, size=size, mode="nearest"))
        return x


class UNet(nn.Module):
    """The whole network."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = c = config
        channels, last = c.channels, len(c.channels) - 1
        time_width = 4 * channels[0]
        self.conv_in = Conv2d(c.in_channels, channels[0], 3, padding=1)
        self.time_embedding = EmbeddingMLP(channels[0], time_width)
        self.add_embedding = None if c.added_in is None else EmbeddingMLP(c.added_in, time_width)
        self.encoder_hid_proj = (
            None if c.text_projection_in is None else Linear(c.text_projection_in, c.text_width[0])
        )

        self.down_blocks = nn.ModuleList()
        skips = [channels[0]]  # widths of what the up path joins, in order of production
        for level, width in enumerate(channels):
            count = c.num_resnets[level]
            self.down_blocks.append(
                DownLevel(
                    [skips[-1], *[width] * (count - 1)],
                    level,
                    time_width,
                    c,
                    num_transformers=count if c.has_attention_down[level] else 0,
                    downsample=level != last,
                )
            )
            skips += [width] * (count + (level != last))

        self.mid_block = MidLevel([channels[-1]] * 2, last, time_width, c, num_transformers=1)

        self.up_blocks = nn.ModuleList()
        width = channels[-1]
        for level, has_attention in zip(range(last, -1, -1), c.has_attention_up, strict=True):
            count = c.num_resnets[level] + 1
            joined = [width, *[channels[level]] * (count - 1)]
            self.up_blocks.append(
                UpLevel(
                    [n + skips.pop() for n in joined],
                    level,
                    time_width,
                    c,
                    num_transformers=count if has_attention else 0,
                    upsample=level != 0,
                )
            )
            width = channels[level]

        self.conv_norm_out = GroupNorm(c.num_groups, channels[0], eps=c.norm_eps)
        self.conv_out = Conv2d(channels[0], c.out_channels, 3, padding=1)

    def forward(
        self,
        noisy_latents: Tensor,  # (B, in_channels, H, W)
        timestep: Tensor,  # (B,), [0, 999]
        text_embeddings: Tensor,  # (B, T, D)
        pooled_text_embeddings: Tensor | None = None,  # (B, P), with add_embedding alone
        sizes: Tensor | None = None,  # (B, numbers), likewise; pixels
    ) -> Tensor:  # (B, out_channels, H, W)
        c, dtype = self.config, noisy_latents.dtype

        def embed(numbers: Tensor, width: int) -> Tensor:
            return sinusoid(
                numbers, width, flip_sin_to_cos=c.flip_sin_to_cos, freq_shift=c.freq_shift
            )

        emb = self.time_embedding(embed(timestep, c.channels[0]).to(dtype))
        if self.add_embedding is not None:
            assert pooled_text_embeddings is not None and sizes is not None
            size_emb = embed(sizes.flatten(), c.size_width).unflatten(0, sizes.shape).flatten(1)
            added = torch.cat([pooled_text_embeddings.to(dtype), size_emb.to(dtype)], dim=-1)
            emb = emb + self.add_embedding(added)
        emb = F.silu(emb)
        text = text_embeddings
        if self.encoder_hid_proj is not None:
            text = self.encoder_hid_proj(text)

        x = self.conv_in(noisy_latents)
        skips = [x]
        for block in self.down_blocks:
            x, new_skips = block(x, emb, text)
            skips += new_skips
        x = self.mid_block(x, emb, text)
        for block in self.up_blocks:
            assert isinstance(block, UpLevel)
            joined = [skips.pop() for _ in range(len(block.resnets))]
            x = block(x, emb, text, joined, skips[-1].shape[2:] if skips else None)
        n = self.conv_norm_out
        return self.conv_out(group_norm_silu(x, n.weight, n.bias, groups=n.num_groups, eps=n.eps))


def build_unet(config: Mapping[str, Any]) -> UNet:
    """The network of a config.json; call under torch.device("meta")."""
    return UNet(read_unet_config(config))
