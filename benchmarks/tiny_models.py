"""Tiny random models in the diffusers folder layout, for tests and benchmarks.

Each `write_tiny_*` builds every component of a family with the diffusers and transformers classes,
at the family's real structure (block types, attention layout, conditioning, scheduler settings)
and the smallest widths that keep it, seeds all weights and saves them to a folder. Loading a
bundle needs no network.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

WORDS = ("a", "photo", "of", "the", "cat", "dog", "red", "blue", "on", "table", "and", "with")
"""Words that the CLIP tokenizers hold as one token; every other word is split into bytes."""


def write_tiny_sdxl(folder: Path | str, seed: int = 0) -> Path:
    """Stable Diffusion XL: 3 U-Net levels, two CLIPs, text_time conditioning, 4 latent channels."""
    from diffusers import UNet2DConditionModel

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _save(_clip(hidden=16, layers=3), folder / "text_encoder")
        _save(
            _clip(hidden=24, layers=3, act="gelu", projection=20, heads=3),
            folder / "text_encoder_2",
        )
        _save(_vae(scaling_factor=0.13025, force_upcast=True), folder / "vae")
        unet = UNet2DConditionModel(
            sample_size=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(16, 32, 32),
            layers_per_block=2,
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(1, 2, 4),
            norm_num_groups=8,
            use_linear_projection=True,
            cross_attention_dim=16 + 24,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=20 + 6 * 8,
        )
        _save(unet, folder / "unet")
    write_clip_tokenizer(folder / "tokenizer")
    write_clip_tokenizer(folder / "tokenizer_2", pad="!")
    scheduler = _ddpm_scheduler("EulerDiscreteScheduler")
    _write_scheduler(folder, {**scheduler, "use_karras_sigmas": False})
    _write_index(
        folder,
        "StableDiffusionXLPipeline",
        text_encoder=("transformers", "CLIPTextModel"),
        text_encoder_2=("transformers", "CLIPTextModelWithProjection"),
        tokenizer=("transformers", "CLIPTokenizer"),
        tokenizer_2=("transformers", "CLIPTokenizer"),
        unet=("diffusers", "UNet2DConditionModel"),
        vae=("diffusers", "AutoencoderKL"),
        scheduler=("diffusers", "EulerDiscreteScheduler"),
        force_zeros_for_empty_prompt=True,
    )
    return folder


def write_tiny_flux(folder: Path | str, seed: int = 0, *, guidance: bool = True) -> Path:
    """FLUX.1: 2 double and 2 single blocks, CLIP and T5, 16 latent channels.

    `guidance=True` is laid out as dev (guidance embedding, resolution-dependent shift), False as
    schnell (neither).
    """
    from diffusers import FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _save(_clip(hidden=16, layers=2, legacy_eos=True), folder / "text_encoder")
        config = T5Config(
            vocab_size=_t5_vocabulary_size(),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
        _save(T5EncoderModel(config), folder / "text_encoder_2")
        vae = _vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, quant_conv=False)
        _save(vae, folder / "vae")
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 6, 6),
        )
        _save(transformer, folder / "transformer")
    write_clip_tokenizer(folder / "tokenizer")
    write_t5_tokenizer(folder / "tokenizer_2", model_max_length=512)
    _write_scheduler(
        folder,
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "base_image_seq_len": 256,
            "base_shift": 0.5,
            "max_image_seq_len": 4096,
            "max_shift": 1.15 if guidance else 1.16,
            "num_train_timesteps": 1000,
            "shift": 3.0 if guidance else 1.0,
            "use_dynamic_shifting": guidance,
        },
    )
    _write_index(
        folder,
        "FluxPipeline",
        text_encoder=("transformers", "CLIPTextModel"),
        text_encoder_2=("transformers", "T5EncoderModel"),
        tokenizer=("transformers", "CLIPTokenizer"),
        tokenizer_2=("transformers", "T5TokenizerFast"),
        transformer=("diffusers", "FluxTransformer2DModel"),
        vae=("diffusers", "AutoencoderKL"),
        scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
    )
    return folder


def write_tiny_sd1(folder: Path | str, seed: int = 0) -> Path:
    """Stable Diffusion 1.5: 4 U-Net levels, convolutional projections, 2 heads at every level."""
    scheduler = {
        **_ddpm_scheduler("PNDMScheduler"),
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    }
    for key in ("interpolation_type", "prediction_type", "timestep_spacing"):
        del scheduler[key]  # the released file has none of them: the class defaults hold
    clip = {"hidden": 16, "layers": 2, "legacy_eos": True}
    return _write_stable_diffusion(
        Path(folder), seed, clip=clip, scheduler=scheduler, attention_head_dim=2
    )


def write_tiny_sd2(folder: Path | str, seed: int = 0) -> Path:
    """Stable Diffusion 2.1 at 768: linear projections, OpenCLIP text encoder, v-prediction."""
    scheduler = {
        **_ddpm_scheduler("DDIMScheduler"),
        "prediction_type": "v_prediction",
        "clip_sample": False,
        "set_alpha_to_one": False,
    }
    for key in ("interpolation_type", "timestep_spacing"):
        del scheduler[key]
    clip = {"hidden": 24, "layers": 2, "act": "gelu", "heads": 3}
    return _write_stable_diffusion(
        Path(folder),
        seed,
        clip=clip,
        scheduler=scheduler,
        attention_head_dim=(1, 2, 4, 4),
        use_linear_projection=True,
        upcast_attention=True,
    )


def _write_stable_diffusion(
    folder: Path, seed: int, *, clip: dict[str, Any], scheduler: dict[str, Any], **unet: Any
) -> Path:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _save(_clip(**clip), folder / "text_encoder")
        _save(_vae(scaling_factor=0.18215), folder / "vae")
        network = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32, 32, 32),
            layers_per_block=2,
            norm_num_groups=8,
            cross_attention_dim=clip["hidden"],
            **unet,
        )
        _save(network, folder / "unet")
    write_clip_tokenizer(folder / "tokenizer", pad="!" if "act" in clip else None)
    _write_scheduler(folder, scheduler)
    _write_index(
        folder,
        "StableDiffusionPipeline",
        feature_extractor=(None, None),
        safety_checker=(None, None),
        text_encoder=("transformers", "CLIPTextModel"),
        tokenizer=("transformers", "CLIPTokenizer"),
        unet=("diffusers", "UNet2DConditionModel"),
        vae=("diffusers", "AutoencoderKL"),
        scheduler=("diffusers", scheduler["_class_name"]),
        requires_safety_checker=False,
    )
    return folder


def clip_vocabulary(words: Iterable[str] = WORDS) -> tuple[dict[str, int], list[str]]:
    """Byte-level BPE of CLIP: 256 bytes, 256 bytes that end a word, `words` as whole tokens, then
    <|startoftext|> and <|endoftext|> with the highest ids, as in the released vocabulary.

    Returns (token -> id, merges in order of rank).
    """
    alphabet = _byte_alphabet()
    tokens = dict.fromkeys([*alphabet, *(char + "</w>" for char in alphabet)])
    merges: dict[str, None] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        left = pieces[0]
        for right in pieces[1:]:
            merges[f"{left} {right}"] = None
            left += right
            tokens[left] = None
    for token in ("<|startoftext|>", "<|endoftext|>"):
        tokens[token] = None
    return {token: index for index, token in enumerate(tokens)}, list(merges)


def write_clip_tokenizer(
    folder: Path, words: Iterable[str] = WORDS, *, pad: str | None = None
) -> None:
    """A CLIP tokenizer folder. `pad="!"` (id 0) is OpenCLIP's, None pads with <|endoftext|>."""
    vocabulary, merges = clip_vocabulary(words)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad or "<|endoftext|>",
    }
    _write_json(folder / "special_tokens_map.json", special)
    settings = {**special, "model_max_length": 77, "do_lower_case": True, "errors": "replace"}
    _write_json(
        folder / "tokenizer_config.json",
        {**settings, "add_prefix_space": False, "tokenizer_class": "CLIPTokenizer"},
    )


def write_t5_tokenizer(folder: Path, *, model_max_length: int) -> None:
    """A Unigram tokenizer with the printable ASCII characters, saved by its own class."""
    from transformers import T5TokenizerFast

    tokenizer = T5TokenizerFast(vocab=_t5_vocabulary(), extra_ids=0)
    tokenizer.model_max_length = model_max_length
    tokenizer.save_pretrained(folder)


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes; "!" is the first, as in CLIP."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(other))]


def _t5_vocabulary() -> list[tuple[str, float]]:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words = [("▁" + word, -3.0) for word in WORDS]
    return [*special, *words, *((chr(code), -6.0) for code in range(33, 127))]


def _t5_vocabulary_size() -> int:
    return len(_t5_vocabulary())


def _clip(
    *,
    hidden: int,
    layers: int,
    act: str = "quick_gelu",
    projection: int | None = None,
    heads: int = 2,
    legacy_eos: bool = False,
) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    size = len(clip_vocabulary()[0])
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        hidden_act=act,
        projection_dim=projection or hidden,
        bos_token_id=0 if legacy_eos else size - 2,
        eos_token_id=2 if legacy_eos else size - 1,  # 2, in the oldest files: the highest id
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def _vae(
    *,
    latent_channels: int = 4,
    scaling_factor: float,
    shift_factor: float | None = None,
    force_upcast: bool = True,
    quant_conv: bool = True,
) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=128,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        force_upcast=force_upcast,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
    )


def _save(module: nn.Module, folder: Path) -> None:
    """Saves after moving norms and biases off their initial ones and zeros, which hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    module.save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]


def _ddpm_scheduler(name: str) -> dict[str, Any]:
    return {
        "_class_name": name,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
    }


def _write_scheduler(folder: Path, config: dict[str, Any]) -> None:
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", config)


def _write_index(folder: Path, pipeline: str, **entries: Any) -> None:
    _write_json(folder / "model_index.json", {"_class_name": pipeline, **entries})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
