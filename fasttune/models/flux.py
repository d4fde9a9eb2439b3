"""FLUX.1: a rectified-flow transformer of double-stream and single-stream blocks.

Module and parameter names are those of the diffusers checkpoint (FluxTransformer2DModel).

B batch, L image tokens, T text tokens, N = T + L, D model width, H heads, E head width,
C latent channels, h x w the token grid (half the latent's height and width).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttune.errors import ModelError
from fasttune.models.layers import (
    Block,
    EmbeddingMLP,
    LayerNorm,
    Linear,
    RMSNorm,
    run_block,
    sinusoid,
)
from fasttune.models.rope import rope_table, rotate
from fasttune.models.spec import Conditions, ModelSpec
from fasttune.models.text_encoders import merge_flux, open_flux, t5_positions
from fasttune_kernels import attention

PACK = 2  # side of the latent patch that makes a token
SINUSOID_WIDTH = 256
MAX_CACHED_TABLES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class FluxConfig:
    """The keys of transformer/config.json, with the values diffusers gives absent ones."""

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def token_width(self) -> int:
        """Channels of an output token."""
        return self.patch_size**2 * (self.out_channels or self.in_channels)


def read_flux_config(config: Mapping[str, Any]) -> FluxConfig:
    """Raises ModelError naming the key whose value the network does not implement."""
    values = {k: v for k, v in config.items() if k in FluxConfig.__dataclass_fields__}
    if "axes_dims_rope" in values:
        values["axes_dims_rope"] = tuple(values["axes_dims_rope"])
    result = FluxConfig(**values)
    axes = result.axes_dims_rope
    if len(axes) != 3 or any(width % 2 for width in axes):
        raise ModelError(f"transformer/config.json: axes_dims_rope = {axes}; three even numbers")
    if sum(axes) != result.attention_head_dim:
        raise ModelError(
            f"transformer/config.json: axes_dims_rope = {axes} must add up to"
            f" attention_head_dim = {result.attention_head_dim}"
        )
    return result


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


def _clip_fp16(x: Tensor) -> Tensor:
    """The residual stream of the released weights leaves float16's range."""
    return x.clamp(-65504, 65504) if x.dtype == torch.float16 else x


class AdaptiveNorm(nn.Module):
    """LayerNorm without weights, and the projection that gives its shift, scale and gate."""

    def __init__(self, width: int, num_vectors: int) -> None:
        super().__init__()
        self.linear = Linear(width, num_vectors * width)
        self.norm = LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.num_vectors = num_vectors

    def forward(self, x: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
        """x (B, N, D), vector (B, D) after SiLU -> modulated x and the vectors beyond the second."""
        shift, scale, *rest = self.linear(vector).chunk(self.num_vectors, dim=-1)
        return _modulate(self.norm(x), shift, scale), *rest


class OutputNorm(AdaptiveNorm):
    """As AdaptiveNorm; the checkpoint has the scale before the shift here."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 2)

    def forward(self, x: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
        scale, shift = self.linear(vector).chunk(2, dim=-1)
        return (_modulate(self.norm(x), shift, scale),)


class GeluProjection(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # the identity holds the place of diffusers' dropout: the second Linear is net.2
        self.net = nn.ModuleList(
            [GeluProjection(width, 4 * width), nn.Identity(), Linear(4 * width, width)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class Projections(nn.Module):
    """Queries, keys and values of (B, N, D), split into heads; queries and keys normalised."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_width = width // num_heads
        self.norm_q = RMSNorm(head_width, eps=1e-6)
        self.norm_k = RMSNorm(head_width, eps=1e-6)
        self.to_q = Linear(width, width)
        self.to_k = Linear(width, width)
        self.to_v = Linear(width, width)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # (B, N, H, E)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = self.norm_q(self.heads(self.to_q(x))), self.norm_k(self.heads(self.to_k(x)))
        return q, k, self.heads(self.to_v(x))


class SingleAttention(Projections):
    """Self-attention over text and image tokens; the block's proj_out is its output projection."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.project(x)
        return attention(rotate(q, cos, sin), rotate(k, cos, sin), v, mask).flatten(2)


class JointAttention(Projections):
    """Attention over text and image tokens together, each with projections of its own."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, num_heads)
        head_width = width // num_heads
        self.to_out = nn.ModuleList([Linear(width, width)])
        self.norm_added_q = RMSNorm(head_width, eps=1e-6)
        self.norm_added_k = RMSNorm(head_width, eps=1e-6)
        self.add_q_proj = Linear(width, width)
        self.add_k_proj = Linear(width, width)
        self.add_v_proj = Linear(width, width)
        self.to_add_out = Linear(width, width)

    def forward(
        self, x: Tensor, text: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x (B, L, D), text (B, T, D) -> their attention outputs."""
        q, k, v = self.project(x)
        q = torch.cat([self.norm_added_q(self.heads(self.add_q_proj(text))), q], dim=1)
        k = torch.cat([self.norm_added_k(self.heads(self.add_k_proj(text))), k], dim=1)
        v = torch.cat([self.heads(self.add_v_proj(text)), v], dim=1)
        out = attention(rotate(q, cos, sin), rotate(k, cos, sin), v, mask).flatten(2)
        text_out, x_out = out.split([text.shape[1], x.shape[1]], dim=1)
        return self.to_out[0](x_out), self.to_add_out(text_out)


class DoubleBlock(Block):
    """Text and image tokens with separate weights, joined in attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = AdaptiveNorm(width, 6)
        self.norm1_context = AdaptiveNorm(width, 6)
        self.attn = JointAttention(width, num_heads)
        self.norm2 = LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ff = FeedForward(width)
        self.norm2_context = LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ff_context = FeedForward(width)

    def forward(
        self, x: Tensor, text: Tensor, vector: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, gate, mlp_shift, mlp_scale, mlp_gate = self.norm1(x, vector)
        text_y, text_gate, text_mlp_shift, text_mlp_scale, text_mlp_gate = self.norm1_context(
            text, vector
        )
        y, text_y = self.attn(y, text_y, cos, sin, mask)
        x = x + gate[:, None] * y
        x = x + mlp_gate[:, None] * self.ff(_modulate(self.norm2(x), mlp_shift, mlp_scale))
        text = text + text_gate[:, None] * text_y
        text_y = _modulate(self.norm2_context(text), text_mlp_shift, text_mlp_scale)
        text = text + text_mlp_gate[:, None] * self.ff_context(text_y)
        return x, _clip_fp16(text)


class SingleBlock(Block):
    """Text and image tokens in one sequence; attention and MLP side by side."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm = AdaptiveNorm(width, 3)
        self.proj_mlp = Linear(width, 4 * width)
        self.proj_out = Linear(5 * width, width)
        self.attn = SingleAttention(width, num_heads)

    def forward(
        self, x: Tensor, vector: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None
    ) -> Tensor:
        y, gate = self.norm(x, vector)
        mlp = F.gelu(self.proj_mlp(y), approximate="tanh")
        y = self.proj_out(torch.cat([self.attn(y, cos, sin, mask), mlp], dim=-1))
        return _clip_fp16(x + gate[:, None] * y)


class Conditioning(nn.Module):
    """Timestep, guidance and pooled text to one vector a sample."""

    def __init__(self, width: int, pooled_width: int, has_guidance: bool) -> None:
        super().__init__()
        self.timestep_embedder = EmbeddingMLP(SINUSOID_WIDTH, width)
        self.guidance_embedder = EmbeddingMLP(SINUSOID_WIDTH, width) if has_guidance else None
        self.text_embedder = EmbeddingMLP(pooled_width, width)

    def forward(self, timestep: Tensor, guidance: Tensor, pooled: Tensor) -> Tensor:
        # 1000 times, as in the released weights; in float32, as bfloat16 keeps 8 bits of a sigma
        vector = self.timestep_embedder(
            sinusoid(1000.0 * timestep.float(), SINUSOID_WIDTH).to(pooled.dtype)
        )
        if self.guidance_embedder is not None:
            vector = vector + self.guidance_embedder(
                sinusoid(1000.0 * guidance.float(), SINUSOID_WIDTH).to(pooled.dtype)
            )
        return vector + self.text_embedder(pooled)


class Flux(nn.Module):
    """The whole network on packed latents."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        width, num_heads = config.width, config.num_attention_heads
        self.time_text_embed = Conditioning(
            width, config.pooled_projection_dim, config.guidance_embeds
        )
        self.context_embedder = Linear(config.joint_attention_dim, width)
        self.x_embedder = Linear(config.in_channels, width)
        self.transformer_blocks = nn.ModuleList(
            DoubleBlock(width, num_heads) for _ in range(config.num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(width, num_heads) for _ in range(config.num_single_layers)
        )
        self.norm_out = OutputNorm(width)
        self.proj_out = Linear(width, config.token_width)
        self._rope_tables: dict[tuple[int, int, int, torch.device], tuple[Tensor, Tensor]] = {}

    def rope(
        self, height: int, width: int, num_text_tokens: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The table for a grid of height x width tokens; kept, as buckets come back."""
        key = (height, width, num_text_tokens, device)
        if key not in self._rope_tables:
            if len(self._rope_tables) >= MAX_CACHED_TABLES:
                self._rope_tables.clear()
            # a table first made while sampling must also serve training
            with torch.inference_mode(False), torch.no_grad():
                self._rope_tables[key] = rope_table(
                    height, width, num_text_tokens, axes=self.config.axes_dims_rope, device=device
                )
        return self._rope_tables[key]

    def forward(
        self,
        packed_latents: Tensor,  # (B, L, in_channels)
        text_embeddings: Tensor,  # (B, T, joint_attention_dim)
        pooled_text_embeddings: Tensor,  # (B, pooled_projection_dim)
        timestep: Tensor,  # (B,) float32, sigma in [0, 1]
        guidance: Tensor,  # (B,) float32; ignored without guidance_embeds
        rope: tuple[Tensor, Tensor],  # of `self.rope`
        text_mask: Tensor | None = None,  # (B, T) bool, True for the tokens attended to
    ) -> Tensor:  # (B, L, token_width)
        cos, sin = rope
        num_text_tokens, num_image_tokens = text_embeddings.shape[1], packed_latents.shape[1]
        mask = None if text_mask is None else F.pad(text_mask, (0, num_image_tokens), value=True)
        vector = F.silu(self.time_text_embed(timestep, guidance, pooled_text_embeddings))
        x = self.x_embedder(packed_latents)
        text = self.context_embedder(text_embeddings)
        for block in self.transformer_blocks:
            x, text = run_block(block, x, text, vector, cos, sin, mask)
        x = torch.cat([text, x], dim=1)
        for block in self.single_transformer_blocks:
            x = run_block(block, x, vector, cos, sin, mask)
        return self.proj_out(*self.norm_out(x[:, num_text_tokens:], vector))


def pack_latents(latents: Tensor) -> Tensor:
    """(B, C, 2h, 2w) -> (B, h * w, 4 C), row by row."""
    return F.pixel_unshuffle(latents, PACK).flatten(2).transpose(1, 2)


def unpack_latents(packed_latents: Tensor, height: int, width: int) -> Tensor:
    """(B, h * w, 4 C) -> (B, C, 2h, 2w), for a grid of height x width tokens."""
    return F.pixel_shuffle(packed_latents.transpose(1, 2).unflatten(2, (height, width)), PACK)


def build_flux(config: Mapping[str, Any]) -> Flux:
    """The network of a config.json; call under torch.device("meta")."""
    flux_config = read_flux_config(config)
    if flux_config.in_channels != flux_config.token_width:
        raise ModelError(
            f"transformer/config.json: in_channels = {flux_config.in_channels}, but a token of the"
            f" output has {flux_config.token_width} channels. Variants with further image inputs"
            " (Fill, Depth, Canny) are not trained here; take FLUX.1-dev or FLUX.1-schnell."
        )
    return Flux(flux_config)


def predict_flux(
    denoiser: nn.Module,
    noisy_latents: Tensor,
    timestep: Tensor,
    conditions: Conditions,
    sizes: Tensor,
    guidance: Tensor,
) -> Tensor:
    """spec.Predict: the velocity, noise - clean latents."""
    height, width = noisy_latents.shape[2] // PACK, noisy_latents.shape[3] // PACK
    text = conditions["text_embeddings"].to(noisy_latents.dtype)
    rope = denoiser.rope(height, width, text.shape[1], noisy_latents.device)  # type: ignore[operator]
    packed = denoiser(
        pack_latents(noisy_latents),
        text,
        conditions["pooled_text_embeddings"].to(noisy_latents.dtype),
        timestep,
        guidance,
        rope,
        conditions.get("text_mask"),
    )
    return unpack_latents(packed, height, width)


def input_shapes(config: Mapping[str, Any], width: int, height: int) -> dict[str, tuple[int, ...]]:
    """As spec.ModelSpec asks; latents have 1/8 of the size."""
    c = read_flux_config(config)
    return {
        "latents": (c.in_channels // PACK**2, height // 8, width // 8),
        "text_embeddings": (t5_positions(config), c.joint_attention_dim),
        "pooled_text_embeddings": (c.pooled_projection_dim,),
    }


_ATTENTION = ("*.to_q", "*.to_k", "*.to_v", "*.to_out.0", "*.add_?_proj", "*.to_add_out")

FLUX = ModelSpec(
    family="flux",
    class_name="FluxTransformer2DModel",
    denoiser_folder="transformer",
    objective="flow_matching",
    prediction="velocity",
    build=build_flux,
    predict=predict_flux,
    open_text_encoders=open_flux,
    merge_text=merge_flux,
    empty_caption_is_zero=False,
    latent_multiple=lambda config: PACK,
    input_shapes=input_shapes,
    adapter_targets={
        "attention": _ATTENTION,
        # every Linear of the blocks, modulation included; not the embedders and the output
        "all-linear": ("transformer_blocks.*", "single_transformer_blocks.*"),
    },
    timestep_sampling="logit_normal",
    has_guidance=True,
)
