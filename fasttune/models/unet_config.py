"""What unet/config.json says, checked for what the network implements."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fasttune.errors import ModelError

DOWN_TYPES = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # -> has attention
UP_TYPES = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}

# Keys of config.json that would change the network, and the values under which they do not.
FIXED: dict[str, tuple[Any, ...]] = {
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "addition_embed_type": (None, "text_time"),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim_type": (None, "text_proj"),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetConfig:
    """What unet/config.json says, one entry a level (finest first) where it is a tuple."""

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    has_attention_down: tuple[bool, ...]
    has_attention_up: tuple[bool, ...]
    """Coarsest level first, as the up blocks run."""
    num_resnets: tuple[int, ...]
    num_transformer_blocks: tuple[int, ...]
    num_heads: tuple[int, ...]
    text_width: tuple[int, ...]
    text_projection_in: int | None
    """Width of the text embeddings before encoder_hid_proj (Kolors), None without it."""
    linear_projection: bool
    added_in: int | None
    """Input width of add_embedding: pooled text and sizes (SDXL), None without it."""
    size_width: int
    """Width of the embedding of each size number (SDXL)."""
    flip_sin_to_cos: bool
    freq_shift: float
    num_groups: int
    norm_eps: float


def read_unet_config(config: Mapping[str, Any]) -> UNetConfig:
    """Raises ModelError naming the key whose value the network does not implement.

    Absent keys have the values diffusers gives them; keys that are not listed in its signature
    (EMA settings, sample_size) are left alone. `upcast_attention` changes nothing: attention
    accumulates in float32.
    """
    for key, allowed in FIXED.items():
        value = config.get(key, allowed[0])
        values = value if isinstance(value, list | tuple) else (value,)
        if any(entry not in allowed for entry in values):
            raise _refusal(key, value, " or ".join(map(repr, allowed)))
    channels = tuple(config.get("block_out_channels", (320, 640, 1280, 1280)))

    def per_level(key: str, default: Any) -> tuple[Any, ...]:
        value = config.get(key, default)
        result = tuple(value) if isinstance(value, list | tuple) else (value,) * len(channels)
        if len(result) != len(channels):
            raise _refusal(key, value, f"one value, or {len(channels)} as block_out_channels has")
        if any(not isinstance(entry, int | str) for entry in result):
            raise _refusal(key, value, "plain values")
        return result

    def has_attention(key: str, default: list[str], types: dict[str, bool]) -> tuple[bool, ...]:
        names = per_level(key, default)
        if any(name not in types for name in names):
            raise _refusal(key, list(names), " or ".join(types))
        return tuple(types[name] for name in names)

    down, up = ["CrossAttnDownBlock2D"] * 3, ["CrossAttnUpBlock2D"] * 3
    heads = per_level("attention_head_dim", 8)  # diffusers' name for the number of heads
    if any(width % count for width, count in zip(channels, heads, strict=True)):
        raise _refusal("attention_head_dim", list(heads), f"divisors of {list(channels)}")
    has_sizes = config.get("addition_embed_type") == "text_time"
    result = UNetConfig(
        in_channels=config.get("in_channels", 4),
        out_channels=config.get("out_channels", 4),
        channels=channels,
        has_attention_down=has_attention("down_block_types", [*down, "DownBlock2D"], DOWN_TYPES),
        has_attention_up=has_attention("up_block_types", ["UpBlock2D", *up], UP_TYPES),
        num_resnets=per_level("layers_per_block", 2),
        num_transformer_blocks=per_level("transformer_layers_per_block", 1),
        num_heads=heads,
        text_width=per_level("cross_attention_dim", 1280),
        text_projection_in=config.get("encoder_hid_dim"),
        linear_projection=config.get("use_linear_projection", False),
        added_in=config.get("projection_class_embeddings_input_dim") if has_sizes else None,
        size_width=config.get("addition_time_embed_dim") or 0,
        flip_sin_to_cos=config.get("flip_sin_to_cos", True),
        freq_shift=config.get("freq_shift", 0),
        num_groups=config.get("norm_num_groups", 32),
        norm_eps=config.get("norm_eps", 1e-5),
    )
    if any(width % result.num_groups for width in channels):
        raise _refusal("norm_num_groups", result.num_groups, f"a divisor of {list(channels)}")
    if has_sizes and (result.added_in is None or not result.size_width):
        key = (
            "addition_time_embed_dim"
            if result.added_in
            else "projection_class_embeddings_input_dim"
        )
        raise _refusal(key, None, "a width, as addition_embed_type is 'text_time'")
    return result


def _refusal(key: str, value: Any, allowed: str) -> ModelError:
    return ModelError(f"unet/config.json: {key} = {value!r} is not implemented; allowed: {allowed}")
