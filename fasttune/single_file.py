"""Single-file checkpoints in the original layouts: names, fused matrices and shapes that differ from
the diffusers folder.

    Flux      img_in.weight ...                          the network alone, as flux1-dev.safetensors
    SDXL      model.diffusion_model.                     U-Net
              first_stage_model.                         VAE
              conditioner.embedders.0.transformer.       CLIP-L, names of transformers
              conditioner.embedders.1.model.             OpenCLIP-G, names of OpenCLIP
    SD 1.x    cond_stage_model.transformer.              CLIP-L
    SD 2.x    cond_stage_model.model.                    OpenCLIP-H
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fasttune.adapters.original_layout import fused_modules, original_places
from fasttune.tensor_files import LazyTensor, component_files, mapped, open_tensors, stacked

Tensors = dict[str, LazyTensor]


def single_file_tensors(family: str, denoiser: Mapping[str, LazyTensor], folder: Path) -> Tensors:
    """All tensors of a single file. `denoiser` has the diffusers names; VAE and text encoders are
    read from the diffusers folder. ModelError if the folder lacks one of them."""
    network = denoiser_to_original(denoiser)
    if family == "flux":
        return network

    def component(name: str) -> Tensors:
        return open_tensors(component_files(folder / name))

    tensors = _prefixed("model.diffusion_model.", network)
    tensors |= _prefixed("first_stage_model.", vae_to_original(component("vae")))
    clip = component("text_encoder")
    if family == "sdxl":
        big = open_clip_to_original(component("text_encoder_2"))
        tensors |= _prefixed("conditioner.embedders.0.transformer.", clip_to_original(clip))
        tensors |= _prefixed("conditioner.embedders.1.model.", big)
    elif family == "sd1":
        tensors |= _prefixed("cond_stage_model.transformer.", clip_to_original(clip))
    else:
        tensors |= _prefixed("cond_stage_model.model.", open_clip_to_original(clip))
    return tensors


def denoiser_to_original(state: Mapping[str, LazyTensor]) -> Tensors:
    """The trained network in BFL (Flux) or LDM (U-Net) names."""
    leaves: dict[str, list[str]] = {}
    for name in state:
        module, _, leaf = name.rpartition(".")
        leaves.setdefault(module, []).append(leaf)
    places = original_places(leaves)
    tensors = {}
    for module, parts in fused_modules(places).items():
        for leaf in leaves[parts[0]]:
            tensor = stacked([state[f"{part}.{leaf}"] for part in parts])
            if places[parts[0]].halves_swapped:
                tensor = mapped(tensor, _swap_halves)
            name = "scale" if module.endswith(("query_norm", "key_norm")) else leaf
            tensors[f"{module}.{name}"] = tensor
    return tensors


_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",  # names of the oldest diffusers files
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}
_VAE_BLOCK = re.compile(
    r"(encoder|decoder)\.(down|up|mid)_blocks?(?:\.(\d+))?"
    r"\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)\.(weight|bias)"
)


def vae_to_original(state: Mapping[str, LazyTensor]) -> Tensors:
    """AutoencoderKL in LDM names. LDM counts the decoder's levels from the finest, and its
    attention has 1x1 convolutions where diffusers has matrices."""
    levels = 1 + max(
        int(match[3]) for name in state if (match := _VAE_BLOCK.fullmatch(name)) and match[3]
    )
    tensors = {}
    for name, tensor in state.items():
        match = _VAE_BLOCK.fullmatch(name)
        if match is None:
            tensors[name.replace("conv_norm_out", "norm_out")] = tensor
            continue
        half, stage, block, kind, index, module, leaf = match.groups()
        module = module.replace("conv_shortcut", "nin_shortcut")
        level = f"{half}.{stage}"
        if stage != "mid":
            level += f".{levels - 1 - int(block) if stage == 'up' else int(block)}"
        if kind == "attentions":
            prefix, module = f"attn_{int(index) + 1}", _VAE_ATTENTION[module]
            if leaf == "weight" and module != "norm":
                rows, columns = tensor.shape[:2]
                tensor = mapped(tensor, _as_1x1, (rows, columns, 1, 1))
        elif kind == "resnets":
            prefix = f"block_{int(index) + 1}" if stage == "mid" else f"block.{index}"
        else:
            prefix = "downsample" if kind == "downsamplers" else "upsample"
        tensors[f"{level}.{prefix}.{module}.{leaf}"] = tensor
    return tensors


def clip_to_original(state: Mapping[str, LazyTensor]) -> Tensors:
    """A CLIP text model under transformers' checkpoint names, text_model.*; newer releases of
    transformers save it without that prefix."""
    return {
        f"text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in state.items()
        if not name.endswith(("position_ids", "text_projection.weight"))
    }


_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def open_clip_to_original(state: Mapping[str, LazyTensor]) -> Tensors:
    """A CLIP text model in OpenCLIP's names: q, k and v in one matrix, the projection transposed."""
    tensors = {}
    for full_name, tensor in state.items():
        name = full_name.removeprefix("text_model.")
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in _OPEN_CLIP:
            tensors[_OPEN_CLIP[name]] = tensor
        elif name == "text_projection.weight":
            tensors["text_projection"] = mapped(tensor, _transposed, tensor.shape[::-1])
        elif layer is not None:
            index, module, leaf = layer.groups()
            block = f"transformer.resblocks.{index}"
            if module in _OPEN_CLIP_LAYER:
                tensors[f"{block}.{_OPEN_CLIP_LAYER[module]}.{leaf}"] = tensor
            elif module == "self_attn.q_proj":
                parts = [full_name.replace("q_proj", f"{x}_proj") for x in "qkv"]
                tensors[f"{block}.attn.in_proj_{leaf}"] = stacked([state[part] for part in parts])
    return tensors


def _prefixed(prefix: str, tensors: Mapping[str, LazyTensor]) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _swap_halves(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def _as_1x1(weight: Tensor) -> Tensor:
    return weight.reshape(*weight.shape[:2], 1, 1)


def _transposed(weight: Tensor) -> Tensor:
    return weight.T
