"""Metadata of exported files: modelspec (https://github.com/Stability-AI/ModelSpec, version 1.0.1),
the ss_ keys of kohya's tools that loaders look at, and our own. Safetensors metadata is strings."""

from collections.abc import Mapping
from typing import Any

from fasttune import __version__
from fasttune.tensor_files import HASH_KEY

_STABILITY = "https://github.com/Stability-AI/generative-models"
_BFL = "https://github.com/black-forest-labs/flux"
_KOHYA_BASE = {"flux": "flux1", "sdxl": "sdxl_base_v1-0", "sd1": "sd_v1", "sd2": "sd_v2"}


def architecture(family: str, *, prediction: str, model_config: Mapping[str, Any]) -> str:
    """modelspec's id of the base model; `model_config` is the network's config.json."""
    if family == "flux":
        return "flux-1-dev" if model_config.get("guidance_embeds") else "flux-1-schnell"
    if family == "sd2":
        v_prediction = prediction == "v_prediction"
        return "stable-diffusion-v2-768-v" if v_prediction else "stable-diffusion-v2-512"
    known = {"sdxl": "stable-diffusion-xl-v1-base", "sd1": "stable-diffusion-v1"}
    return known.get(family, family)


def file_metadata(
    *,
    family: str,
    layout: str,
    title: str,
    date: str,
    resolution: int,
    prediction: str,
    model_config: Mapping[str, Any],
    base_model: str,
    base_precision: str,
    step: int,
    lora: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Metadata of one file. `date` is ISO 8601; `lora` has rank and alpha, None for a network."""
    is_diffusers = layout in ("peft", "diffusers")
    original = _BFL if family == "flux" else _STABILITY
    kind = architecture(family, prediction=prediction, model_config=model_config)
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": kind if lora is None else f"{kind}/lora",
        "modelspec.implementation": "diffusers" if is_diffusers else original,
        "modelspec.implementation_version": f"fasttune/{__version__}",
        "modelspec.title": title,
        "modelspec.date": date,
        "modelspec.resolution": f"{resolution}x{resolution}",
        HASH_KEY: "",
        "fasttune.version": __version__,
        "fasttune.base_model": base_model,
        "fasttune.base_precision": base_precision,
        "fasttune.step": str(step),
    }
    if prediction in ("epsilon", "v_prediction"):
        metadata["modelspec.prediction_type"] = "v" if prediction == "v_prediction" else "epsilon"
    if lora is not None:
        rank, alpha = str(lora["rank"]), str(lora["alpha"])
        metadata |= {"fasttune.rank": rank, "fasttune.alpha": alpha}
        if not is_diffusers:  # with PEFT keys alpha is in the weights, and must not count twice
            metadata |= {
                "ss_network_module": "networks.lora_flux" if family == "flux" else "networks.lora",
                "ss_network_dim": rank,
                "ss_network_alpha": alpha,
                "ss_base_model_version": _KOHYA_BASE.get(family, family),
                "ss_v2": str(family == "sd2"),
                "ss_sd_model_name": base_model,
                "ss_output_name": title,
                "ss_steps": str(step),
            }
    return metadata
