"""The families sd1, sd2 and sdxl: the U-Net with its text encoders and conventions."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fasttune.errors import ModelError
from fasttune.models.spec import Conditions, ModelSpec
from fasttune.models.text_encoders import merge_clip, merge_sdxl, open_clip, open_sdxl
from fasttune.models.unet import UNet, build_unet
from fasttune.models.unet_config import read_unet_config


def predict_unet(
    denoiser: nn.Module,
    noisy_latents: Tensor,
    timestep: Tensor,
    conditions: Conditions,
    sizes: Tensor,
    guidance: Tensor,
) -> Tensor:
    """spec.Predict of sd1 and sd2: epsilon or v, as the model was trained."""
    return denoiser(noisy_latents, timestep, conditions["text_embeddings"].to(noisy_latents.dtype))


def predict_sdxl(
    denoiser: nn.Module,
    noisy_latents: Tensor,
    timestep: Tensor,
    conditions: Conditions,
    sizes: Tensor,
    guidance: Tensor,
) -> Tensor:
    """spec.Predict of sdxl: the pooled text embeddings and the sizes join the timestep."""
    return denoiser(
        noisy_latents,
        timestep,
        conditions["text_embeddings"].to(noisy_latents.dtype),
        conditions["pooled_text_embeddings"],
        sizes,
    )


def _builder(family: str, added: str | None) -> Callable[[Mapping[str, Any]], UNet]:
    def build(config: Mapping[str, Any]) -> UNet:
        found = config.get("addition_embed_type")
        if found != added:
            other = '"sdxl"' if found == "text_time" else '"sd1" or "sd2"'
            raise ModelError(
                f"unet/config.json: addition_embed_type = {found!r}, but model.family ="
                f' "{family}" has {added!r}; set model.family = {other}'
            )
        unet = build_unet(config)
        if unet.config.in_channels != unet.config.out_channels:
            raise ModelError(
                f"unet/config.json: in_channels = {unet.config.in_channels}, out_channels ="
                f" {unet.config.out_channels}. Variants with further image inputs (inpainting,"
                " depth, upscaling) are not trained here; take the text-to-image model."
            )
        return unet

    return build


def _latent_multiple(config: Mapping[str, Any]) -> int:
    # the network takes any size; at these no level is rounded
    return 2 ** (len(config["block_out_channels"]) - 1)


TEXT_TOKENS = 77  # positions of CLIP
NUM_SIZES = 6  # numbers of SDXL's size conditioning


def _input_shapes(config: Mapping[str, Any], width: int, height: int) -> dict[str, tuple[int, ...]]:
    c = read_unet_config(config)
    text_width = c.text_width[0] if c.text_projection_in is None else c.text_projection_in
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (c.in_channels, height // 8, width // 8),
        "text_embeddings": (TEXT_TOKENS, text_width),
    }
    if c.added_in is not None:
        shapes["pooled_text_embeddings"] = (c.added_in - NUM_SIZES * c.size_width,)
    return shapes


_ATTENTION = ("*.to_q", "*.to_k", "*.to_v", "*.to_out.0")
_TARGETS = {
    "attention": _ATTENTION,
    # the Linear layers of the transformers; proj_in and proj_out are 1x1 convolutions in sd1
    "all-linear": (*_ATTENTION, "*.ff.net.0.proj", "*.ff.net.2", "*.proj_in", "*.proj_out"),
}

SD1 = ModelSpec(
    family="sd1",
    class_name="UNet2DConditionModel",
    denoiser_folder="unet",
    objective="ddpm",
    prediction="epsilon",
    build=_builder("sd1", None),
    predict=predict_unet,
    open_text_encoders=open_clip,
    merge_text=merge_clip,
    empty_caption_is_zero=False,
    latent_multiple=_latent_multiple,
    input_shapes=_input_shapes,
    adapter_targets=_TARGETS,
    timestep_sampling="uniform",
    has_guidance=False,
)

SD2 = ModelSpec(
    family="sd2",
    class_name="UNet2DConditionModel",
    denoiser_folder="unet",
    objective="ddpm",
    prediction="v_prediction",
    build=_builder("sd2", None),
    predict=predict_unet,
    open_text_encoders=open_clip,
    merge_text=merge_clip,
    empty_caption_is_zero=False,
    latent_multiple=_latent_multiple,
    input_shapes=_input_shapes,
    adapter_targets=_TARGETS,
    timestep_sampling="uniform",
    has_guidance=False,
)

SDXL = ModelSpec(
    family="sdxl",
    class_name="UNet2DConditionModel",
    denoiser_folder="unet",
    objective="ddpm",
    prediction="epsilon",
    build=_builder("sdxl", "text_time"),
    predict=predict_sdxl,
    open_text_encoders=open_sdxl,
    merge_text=merge_sdxl,
    empty_caption_is_zero=True,
    latent_multiple=_latent_multiple,
    input_shapes=_input_shapes,
    adapter_targets=_TARGETS,
    timestep_sampling="uniform",
    has_guidance=False,
)
