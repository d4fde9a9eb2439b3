"""Names of diffusers modules in the original layouts: BFL for Flux, LDM for the U-Nets of SD 1.x,
2.x and SDXL. kohya and ComfyUI keys of LoRA files and single-file checkpoints are made of them.

The original Flux code computes q, k and v (and the MLP's first layer in single blocks) with one
matrix, so several diffusers modules are row blocks of one original module; and its last modulation
has shift before scale where diffusers has scale before shift.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple


class Place(NamedTuple):
    """Where a diffusers module is found in the original layout."""

    module: str
    part: int = 0
    """Position among the modules that are row blocks of the same original module."""
    halves_swapped: bool = False
    """The first and second half of the rows change places."""


def original_places(names: Iterable[str]) -> dict[str, Place]:
    """Place of every module in `names`, the names of one network's modules. Which layout it is and
    how many layers a block has is read from the names, so give all of them. Empty for networks that
    have diffusers names alone."""
    names = list(names)
    if any(name.startswith("single_transformer_blocks.") for name in names):
        return {name: _flux_place(name) for name in names}
    if any(name.startswith("down_blocks.0.") for name in names):
        return _unet_places(names)
    return {}


def fused_modules(places: dict[str, Place]) -> dict[str, list[str]]:
    """Original module -> its diffusers modules, in the order of the rows."""
    groups: dict[str, list[str]] = {}
    for name in sorted(places, key=lambda name: places[name].part):
        groups.setdefault(places[name].module, []).append(name)
    return groups


_FLUX_TOP = {
    "x_embedder": Place("img_in"),
    "context_embedder": Place("txt_in"),
    "time_text_embed.timestep_embedder.linear_1": Place("time_in.in_layer"),
    "time_text_embed.timestep_embedder.linear_2": Place("time_in.out_layer"),
    "time_text_embed.text_embedder.linear_1": Place("vector_in.in_layer"),
    "time_text_embed.text_embedder.linear_2": Place("vector_in.out_layer"),
    "time_text_embed.guidance_embedder.linear_1": Place("guidance_in.in_layer"),
    "time_text_embed.guidance_embedder.linear_2": Place("guidance_in.out_layer"),
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", halves_swapped=True),
    "proj_out": Place("final_layer.linear"),
}
_FLUX_DOUBLE = {
    "norm1.linear": Place("img_mod.lin"),
    "norm1_context.linear": Place("txt_mod.lin"),
    "attn.to_q": Place("img_attn.qkv", 0),
    "attn.to_k": Place("img_attn.qkv", 1),
    "attn.to_v": Place("img_attn.qkv", 2),
    "attn.add_q_proj": Place("txt_attn.qkv", 0),
    "attn.add_k_proj": Place("txt_attn.qkv", 1),
    "attn.add_v_proj": Place("txt_attn.qkv", 2),
    "attn.norm_q": Place("img_attn.norm.query_norm"),
    "attn.norm_k": Place("img_attn.norm.key_norm"),
    "attn.norm_added_q": Place("txt_attn.norm.query_norm"),
    "attn.norm_added_k": Place("txt_attn.norm.key_norm"),
    "attn.to_out.0": Place("img_attn.proj"),
    "attn.to_add_out": Place("txt_attn.proj"),
    "ff.net.0.proj": Place("img_mlp.0"),
    "ff.net.2": Place("img_mlp.2"),
    "ff_context.net.0.proj": Place("txt_mlp.0"),
    "ff_context.net.2": Place("txt_mlp.2"),
}
_FLUX_SINGLE = {
    "norm.linear": Place("modulation.lin"),
    "attn.to_q": Place("linear1", 0),
    "attn.to_k": Place("linear1", 1),
    "attn.to_v": Place("linear1", 2),
    "proj_mlp": Place("linear1", 3),
    "attn.norm_q": Place("norm.query_norm"),
    "attn.norm_k": Place("norm.key_norm"),
    "proj_out": Place("linear2"),
}


def _flux_place(name: str) -> Place:
    match = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", name)
    if match is None:
        return _FLUX_TOP[name]
    single, index, rest = match.groups()
    place = (_FLUX_SINGLE if single else _FLUX_DOUBLE)[rest]
    block = "single_blocks" if single else "double_blocks"
    return place._replace(module=f"{block}.{index}.{place.module}")


_UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_BLOCK = re.compile(
    r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?"
    r"\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


def _unet_places(names: list[str]) -> dict[str, Place]:
    """LDM numbers its blocks in one row: down blocks have `layers` entries and a downsampler each
    (the last has none), up blocks `layers` + 1 entries, the last of which holds the upsampler."""
    blocks = {name: match for name in names if (match := _UNET_BLOCK.fullmatch(name))}
    layers = 1 + max(
        int(m[4]) for m in blocks.values() if (m[1], m[2], m[3]) == ("down_blocks", "0", "resnets")
    )
    with_attention = {m[2] for m in blocks.values() if (m[1], m[3]) == ("up_blocks", "attentions")}
    places = {}
    for name in names:
        match = blocks.get(name)
        if match is None:
            places[name] = Place(_UNET_TOP[name])
            continue
        stage, block, kind, layer, rest = match.groups()
        index = int(layer)
        rest = _UNET_RESNET[rest] if kind == "resnets" else rest
        if stage == "down_blocks":
            entry = 1 + int(block) * (layers + 1) + index
            prefix = {
                "resnets": f"input_blocks.{entry}.0",
                "attentions": f"input_blocks.{entry}.1",
                "downsamplers": f"input_blocks.{entry + layers}.0",
            }[kind]
            rest = "op" if kind == "downsamplers" else rest
        elif stage == "up_blocks":
            entry = int(block) * (layers + 1) + index
            prefix = {
                "resnets": f"output_blocks.{entry}.0",
                "attentions": f"output_blocks.{entry}.1",
                "upsamplers": f"output_blocks.{entry + layers}.{1 + (block in with_attention)}",
            }[kind]
        else:
            prefix = f"middle_block.{1 if kind == 'attentions' else 2 * index}"
        places[name] = Place(f"{prefix}.{rest}")
    return places
