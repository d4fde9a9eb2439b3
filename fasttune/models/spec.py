"""What the loop needs to know of a model family: data and functions, no subclasses.

A family is one `ModelSpec` in `models.MODELS`. If a new model needs a change in train.py, this
class lacks a field.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

Conditions = Mapping[str, Tensor]
"""Per-sample conditioning, batch first: "text_embeddings" (B, T, D), "pooled_text_embeddings"
(B, P), "text_mask" (B, T) bool, as the family has them."""


class Predict(Protocol):
    """One forward of the denoiser in the family's own conventions."""

    def __call__(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,  # (B, C, H, W), compute dtype
        timestep: Tensor,  # (B,), float32: sigma in [0, 1] for flow matching, else [0, 999]
        conditions: Conditions,
        sizes: Tensor,  # (B, 6), float32: original h, w; crop top, left; target h, w in pixels
        guidance: Tensor,  # (B,), float32: embedded guidance; ignored by families without it
    ) -> Tensor: ...  # (B, C, H, W)


class EncodeText(Protocol):
    """Encodes captions as the reference pipeline does. Called once per text encoder."""

    def __call__(self, captions: list[str]) -> dict[str, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One family."""

    family: str
    class_name: str
    """Class of the network in diffusers, as config.json names it."""
    denoiser_folder: str
    """Sub-folder of a diffusers layout with the trained network: "unet", "transformer"."""
    objective: Literal["flow_matching", "ddpm", "reconstruction"]
    prediction: Literal["velocity", "epsilon", "v_prediction"]
    """Default; DDPM families read `prediction_type` of scheduler_config.json over it."""
    build: Callable[[Mapping[str, Any]], nn.Module]
    """Network from the folder's config.json; call under torch.device("meta")."""
    predict: Predict
    open_text_encoders: Callable[..., list[Callable[[], EncodeText]]]
    """(folder, device, dtype) -> one opener per text encoder. Each opener loads one encoder,
    returns its EncodeText and keeps no other reference, so that they live one at a time.
    The dicts of all encoders are merged by `merge_text`."""
    merge_text: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]
    """Joins the encoders' outputs into Conditions (SDXL concatenates along the width)."""
    empty_caption_is_zero: bool
    """Caption dropout and an absent negative prompt use zeros instead of encoding ""."""
    latent_multiple: Callable[[Mapping[str, Any]], int]
    """Heights and widths of latents must be multiples of this (config.json)."""
    input_shapes: Callable[[Mapping[str, Any], int, int], dict[str, tuple[int, ...]]]
    """(config.json, width, height in pixels) -> shapes of one sample's "latents" and Conditions,
    without the batch, for networks that are planned or timed without data."""
    adapter_targets: Mapping[str, tuple[str, ...]]
    """Presets: name -> fnmatch patterns over names of Linear (and Conv2d) modules."""
    timestep_sampling: Literal["uniform", "logit_normal"]
    has_guidance: bool
    """Guidance-distilled: the guidance scale is an input, not two forwards."""


def cast_conditions(conditions: Conditions, dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating tensors to `dtype`; masks stay bool."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in conditions.items()}


def select_conditions(conditions: Conditions, *, text_mask: bool) -> dict[str, Tensor]:
    """What the denoiser gets of the cached conditions: the text mask only if asked for."""
    return {k: v for k, v in conditions.items() if text_mask or k != "text_mask"}
