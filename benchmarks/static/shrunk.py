"""Model folders of a released model's structure at a fraction of its widths.

Levels, kinds of blocks and what follows what are those of the released config.json, so a gate that looks
at the structure alone finds on a shrunk network in seconds what it would find on the real one.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DIVISOR = 40
"""Of a U-Net's widths: 320, 640 and 1280 become 8, 16 and 32."""
SMALL = 128
"""Widths that are not shrunk further: those of the quickstart."""

FLUX = {
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": [4, 6, 6],
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
}
UNET = {"norm_num_groups": 4, "cross_attention_dim": 32}
UNET_SIZES = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}


def write_shrunk(source: Path, target: Path, *, repeats: int) -> Path:
    """Writes the config files of the model in `source`, shrunk, to `target`, and returns it. Of what
    repeats (a kind of Flux block, the resnets of a level, the blocks of a transformer) at most so
    many remain."""
    denoiser = "transformer" if (source / "transformer").is_dir() else "unet"
    scheduler = "scheduler/scheduler_config.json"
    config = shrunk(_read(source / denoiser / "config.json"), repeats=repeats)
    for name, values in (
        (f"{denoiser}/config.json", config),
        (scheduler, _read(source / scheduler)),
    ):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    return target


def shrunk(config: Mapping[str, Any], *, repeats: int) -> dict[str, Any]:
    """config.json of a Flux or U-Net at small widths."""
    if "block_out_channels" not in config:
        depths = {name: min(repeats, config[name]) for name in ("num_layers", "num_single_layers")}
        return {**config, **FLUX, **depths}
    unet = {
        **config,
        "layers_per_block": min(repeats, config["layers_per_block"]),
        "transformer_layers_per_block": _at_most(
            config.get("transformer_layers_per_block", 1), repeats
        ),
    }
    if max(config["block_out_channels"]) <= SMALL:
        return unet
    heads = config["attention_head_dim"]
    return {
        **unet,
        **UNET,
        **(UNET_SIZES if config.get("addition_embed_type") == "text_time" else {}),
        "block_out_channels": [width // DIVISOR for width in config["block_out_channels"]],
        "attention_head_dim": 2 if isinstance(heads, int) else [max(1, n // 5) for n in heads],
    }


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _at_most(counts: int | list[int], limit: int) -> int | list[int]:
    """A number, or one a level."""
    return min(counts, limit) if isinstance(counts, int) else [min(n, limit) for n in counts]
