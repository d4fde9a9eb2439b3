"""Images from a model, for `fasttune sample` and for validation in training.

Prompts are encoded by prompts.py, the denoising loop of denoise.py makes latents, and the
autoencoder is loaded last. The noise of an image is drawn on the CPU from the image's own seed, so
that it is the same on every device and beside any other images.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from fasttune.adapters.formats import read_lora
from fasttune.adapters.lora import apply_lora, module_shapes, set_lora_
from fasttune.build import Objective, denoiser_for, objective_for, placement_for, scheduler_config
from fasttune.checkpoint import check_same_tensors, damage
from fasttune.config import Config
from fasttune.denoise import denoise, noise_schedule
from fasttune.device import Placement
from fasttune.errors import CheckpointError, ConfigError, ModelError
from fasttune.grid import make_grid, save_png
from fasttune.models import MODELS
from fasttune.models.autoencoder import decode, downscale, load_autoencoder
from fasttune.models.spec import ModelSpec
from fasttune.models.weights import component_patterns, load_denoiser, read_config, resolve_model
from fasttune.prompts import EncodedPrompts, encode_prompts
from fasttune.reconstruction import Reconstruction

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shot:
    """One image to make."""

    prompt: int
    """Index into the prompts."""
    width: int
    height: int
    seed: int


def shots(
    num_prompts: int, resolutions: Sequence[tuple[int, int]], seeds: Sequence[int]
) -> list[Shot]:
    """Every prompt at every (width, height) with every seed; the seed changes fastest."""
    return [
        Shot(prompt=prompt, width=width, height=height, seed=seed)
        for prompt in range(num_prompts)
        for width, height in resolutions
        for seed in seeds
    ]


def sample(
    spec: ModelSpec,
    denoiser: nn.Module,
    *,
    objective: Objective,
    folder: Path,
    encoded: EncodedPrompts,
    shots: Sequence[Shot],
    num_steps: int,
    guidance_scale: float,
    device: torch.device,
    compute_dtype: torch.dtype,
    progress: str | None = None,
) -> list[Image.Image]:
    """The images of `shots`: `sample_latents`, then `decode_latents`. The denoiser stays on its device
    beside the autoencoder."""
    latents = sample_latents(
        spec,
        denoiser,
        objective=objective,
        folder=folder,
        encoded=encoded,
        shots=shots,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        device=device,
        compute_dtype=compute_dtype,
        progress=progress,
    )
    return decode_latents(folder, latents, device=device, compute_dtype=compute_dtype)


def sample_latents(
    spec: ModelSpec,
    denoiser: nn.Module,
    *,
    objective: Objective,
    folder: Path,
    encoded: EncodedPrompts,
    shots: Sequence[Shot],
    num_steps: int,
    guidance_scale: float,
    device: torch.device,
    compute_dtype: torch.dtype,
    progress: str | None = None,
) -> list[Tensor]:
    """Latents (1, C, h, w) of `shots`, one after the other; the denoiser's mode is left as it was.

    `progress` is the title of a bar on stderr. Raises ConfigError for a resolution the model cannot
    make.
    """
    check_resolutions(spec, folder, [(shot.width, shot.height) for shot in shots])
    assert not isinstance(objective, Reconstruction)  # refused by check_resolutions
    scheduler, vae_config = scheduler_config(folder), read_config(folder, "vae")
    multiple = spec.latent_multiple(read_config(folder, spec.denoiser_folder))
    latents: list[Tensor] = []
    training = denoiser.training
    denoiser.eval()
    try:
        with tqdm(
            total=len(shots) * num_steps, desc=progress, disable=progress is None, leave=False
        ) as bar:
            for shot in shots:
                noise = _noise(shot, vae_config["latent_channels"], downscale(vae_config))
                size = [shot.height, shot.width, 0, 0, shot.height, shot.width]
                sizes = torch.tensor([size], dtype=torch.float32)
                schedule = noise_schedule(
                    objective,
                    scheduler,
                    num_steps=num_steps,
                    image_seq_len=noise[0, 0].numel() // multiple**2,
                )
                made = denoise(
                    spec,
                    denoiser,
                    conditions=encoded.positive[shot.prompt],
                    negative_conditions=encoded.negative,
                    sizes=sizes,
                    negative_sizes=sizes,
                    noise=noise.to(device),
                    schedule=schedule,
                    guidance_scale=guidance_scale,
                    compute_dtype=compute_dtype,
                    step_done=bar.update,
                )
                latents.append(made)
    finally:
        denoiser.train(training)
    return latents


def decode_latents(
    folder: Path, latents: Sequence[Tensor], *, device: torch.device, compute_dtype: torch.dtype
) -> list[Image.Image]:
    """The images of latents (1, C, h, w). The autoencoder is loaded for it, and freed."""
    vae = load_autoencoder(folder, device=device, dtype=compute_dtype)
    pixels = (decode(vae, one)[0].permute(1, 2, 0).cpu().numpy() for one in latents)
    return [Image.fromarray(array) for array in pixels]


def parse_resolution(text: str) -> tuple[int, int]:
    """(width, height) of "1024x768". Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+)\s*[xX]\s*(\d+)\s*", text)
    if match is None or not int(match[1]) or not int(match[2]):
        raise ConfigError(
            [f'resolution "{text}": expected width x height in pixels, such as "1024x768"']
        )
    return int(match[1]), int(match[2])


def pixel_multiple(spec: ModelSpec, folder: Path) -> int:
    """Widths and heights of images are multiples of this many pixels."""
    if spec.objective == "reconstruction":
        raise ConfigError(
            [
                f'model.family = "{spec.family}" makes no images from prompts; set'
                " validation.prompts = [] and look at the held-out loss"
            ]
        )
    latent = spec.latent_multiple(read_config(folder, spec.denoiser_folder))
    return latent * downscale(read_config(folder, "vae"))


def check_resolutions(
    spec: ModelSpec, folder: Path, resolutions: Iterable[tuple[int, int]]
) -> None:
    """ConfigError, with the nearest possible one, for each resolution the model cannot make."""
    multiple = pixel_multiple(spec, folder)
    problems = []
    for width, height in dict.fromkeys(resolutions):
        if width % multiple or height % multiple:
            near = " x ".join(str(nearest_multiple(side, multiple)) for side in (width, height))
            problems.append(
                f"resolution {width}x{height}: this model makes widths and heights that are"
                f" multiples of {multiple}; the nearest is {near.replace(' ', '')}"
            )
    if problems:
        raise ConfigError(problems)


def nearest_multiple(side: int, multiple: int) -> int:
    """At least one `multiple`."""
    return max(1, round(side / multiple)) * multiple


def resolutions_of(config: Config, spec: ModelSpec, folder: Path) -> list[tuple[int, int]]:
    """validation.resolutions, or the first source's resolution as a square the model can make."""
    if config.validation.resolutions:
        return [parse_resolution(text) for text in config.validation.resolutions]
    side = nearest_multiple(config.data[0].resolution, pixel_multiple(spec, folder))
    return [(side, side)]


def main(
    config: Config,
    *,
    checkpoint: Path | None = None,
    weights: Path | None = None,
    prompts: Sequence[str] | None = None,
    negative_prompt: str | None = None,
    seeds: Sequence[int] | None = None,
    resolutions: Sequence[str] | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    out: Path | None = None,
) -> list[Path]:
    """`fasttune sample`: writes a PNG an image and a grid, and returns their paths, the grid last.
    What is None is taken from config.validation.

    weights: a LoRA file of any layout, or a folder with the whole network. checkpoint: resume
    state of a run, its average if it has one. Without either, the model of the config untrained.
    out: folder of the images, or the .png of the grid, with the images in a folder beside it.
    """
    given = {
        "prompts": tuple(prompts) if prompts else None,
        "negative_prompt": negative_prompt,
        "seeds": tuple(seeds) if seeds else None,
        "resolutions": tuple(resolutions) if resolutions else None,
        "sampling_steps": steps,
        "guidance_scale": guidance_scale,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    config = replace(config, validation=replace(config.validation, **changes))  # type: ignore[arg-type]
    v = config.validation
    if not v.prompts:
        raise ConfigError(["validation.prompts is empty; give --prompt, or prompts in the config"])
    if v.sampling_steps < 1:
        raise ConfigError([f"validation.sampling_steps = {v.sampling_steps}; at least 1"])

    spec, placement = MODELS[config.model.family], placement_for(config)
    parts = ("vae", "scheduler", spec.denoiser_folder, *_TEXT_PARTS)
    folder = resolve_model(config.model.path, config.model.revision, component_patterns(*parts))
    sizes = resolutions_of(config, spec, folder)
    check_resolutions(spec, folder, sizes)
    objective = objective_for(config, spec, folder)
    encoded = encode_prompts(
        spec,
        folder,
        prompts=v.prompts,
        negative_prompt=v.negative_prompt,
        device=placement.device,
        dtype=placement.compute_dtype,
        text_mask=config.objective.text_mask,
    )
    denoiser = _trained(config, spec, folder, placement, checkpoint=checkpoint, weights=weights)
    todo = shots(len(v.prompts), sizes, v.seeds)
    device, compute_dtype = placement.device, placement.compute_dtype
    latents = sample_latents(
        spec,
        denoiser,
        objective=objective,
        folder=folder,
        encoded=encoded,
        shots=todo,
        num_steps=v.sampling_steps,
        guidance_scale=v.guidance_scale,
        device=device,
        compute_dtype=compute_dtype,
        progress="sampling",
    )
    del denoiser  # its memory is the autoencoder's now
    images = decode_latents(folder, latents, device=device, compute_dtype=compute_dtype)
    grid_path, image_folder = _places(out, checkpoint)
    paths = []
    for shot, image in zip(todo, images, strict=True):
        name = f"{shot.prompt + 1:02d}-{_slug(v.prompts[shot.prompt])}"
        path = image_folder / f"{name}-{shot.width}x{shot.height}-seed{shot.seed}.png"
        save_png(image, path)
        paths.append(path)
    columns = len(v.seeds)
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    labels = [label(v.prompts[s.prompt], s, with_size=len(sizes) > 1) for s in todo[::columns]]
    save_png(make_grid(rows, labels, [f"seed {seed}" for seed in v.seeds]), grid_path)
    paths.append(grid_path)
    return paths


def label(prompt: str, shot: Shot, *, with_size: bool, with_seed: bool = False) -> str:
    """Row label of a grid."""
    size = f" ({shot.width}x{shot.height})" if with_size else ""
    return (prompt or '""') + size + (f", seed {shot.seed}" if with_seed else "")


_TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def _noise(shot: Shot, channels: int, scale: int) -> Tensor:
    """(1, C, h, w) float32 on the CPU; what diffusers draws from a CPU generator of this seed."""
    generator = torch.Generator().manual_seed(shot.seed)
    return torch.randn(1, channels, shot.height // scale, shot.width // scale, generator=generator)


def _trained(
    config: Config,
    spec: ModelSpec,
    folder: Path,
    placement: Placement,
    *,
    checkpoint: Path | None,
    weights: Path | None,
) -> nn.Module:
    """The network with the weights asked for; see `main`."""
    dtype, device = placement.base_dtype, placement.device
    if weights is not None and weights.is_dir():
        inside = (weights / spec.denoiser_folder / "config.json").is_file()
        if not inside:
            raise ModelError(
                f"{weights}: no {spec.denoiser_folder}/config.json here; --weights is a LoRA file or"
                " a folder in diffusers layout"
            )
        return load_denoiser(spec, weights, dtype=dtype, device=device)
    if weights is not None:
        denoiser = load_denoiser(spec, folder, dtype=dtype, device=device)
        try:
            pairs, _ = read_lora(weights, module_shapes(denoiser))
        except ConfigError as error:
            said = [problem.replace("adapter.init_from", "--weights") for problem in error.problems]
            raise ConfigError(said) from error
        rank = max(pair.rank for pair in pairs.values())
        apply_lora(denoiser, targets=list(pairs), rank=rank, alpha=float(rank))
        set_lora_(denoiser, pairs, origin=str(weights))
        return denoiser
    denoiser = denoiser_for(config, spec, folder, placement)
    if checkpoint is None:
        log.info("no checkpoint or weights: sampling the model of the config as it is")
        return denoiser
    problem = damage(checkpoint)
    if problem is not None:
        raise CheckpointError(f"{checkpoint}: {problem}; give another checkpoint")
    average = checkpoint / "ema.safetensors"
    saved = load_file(average if average.is_file() else checkpoint / "trainable.safetensors")
    current = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    check_same_tensors(checkpoint, saved, current)
    with torch.no_grad():
        for name, parameter in current.items():
            parameter.copy_(saved[name])
    log.info("sampling %s of %s", "the average" if average.is_file() else "the weights", checkpoint)
    return denoiser


def _places(out: Path | None, checkpoint: Path | None) -> tuple[Path, Path]:
    """(grid, folder of the single images)."""
    if out is None:
        run = checkpoint.resolve().parents[1] if checkpoint is not None else Path()
        out = run / "samples" / (checkpoint.name if checkpoint is not None else "images")
    if out.suffix.lower() == ".png":
        return out, out.with_suffix("")
    return out / "grid.png", out


def _slug(prompt: str) -> str:
    """A file name that still tells the prompt."""
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "empty"
