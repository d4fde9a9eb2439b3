"""Validation during training: a grid of samples beside the untrained model's, and the held-out loss."""

import hashlib
import logging
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from fasttune.build import Objective
from fasttune.checkpoint import checkpoint_name
from fasttune.config import Config
from fasttune.data.loader import CachedSample, fixed_batches
from fasttune.device import Placement
from fasttune.grid import make_grid, save_png
from fasttune.held_out import HeldOutBatch, held_out_loss
from fasttune.metrics import Metrics
from fasttune.models.spec import ModelSpec, select_conditions
from fasttune.prepare import Prepared
from fasttune.sample import (
    EncodedPrompts,
    Shot,
    check_resolutions,
    label,
    resolutions_of,
    sample,
    shots,
)

log = logging.getLogger(__name__)


class Validator:
    """What `[validation]` asks for. Raises ConfigError for a resolution the model cannot make."""

    def __init__(
        self,
        config: Config,
        spec: ModelSpec,
        placement: Placement,
        prepared: Prepared,
        objective: Objective,
        run_dir: Path,
    ) -> None:
        self._config, self._spec, self._placement = config, spec, placement
        self._prepared, self._objective, self._run_dir = prepared, objective, run_dir
        v = config.validation
        self._shots: list[Shot] = []
        if v.prompts:
            sizes = resolutions_of(config, spec, prepared.folder)
            check_resolutions(spec, prepared.folder, sizes)
            self._shots = shots(len(v.prompts), sizes, v.seeds)
            self._labels = [
                label(
                    v.prompts[shot.prompt],
                    shot,
                    with_size=len(sizes) > 1,
                    with_seed=len(v.seeds) > 1,
                )
                for shot in self._shots
            ]

    @property
    def records(self) -> list[str]:
        """What each validation adds to metrics.jsonl."""
        return ["held_out_loss"] * bool(self._prepared.held_out) + ["samples"] * bool(self._shots)

    def run(self, step: int, denoiser: nn.Module, metrics: Metrics) -> None:
        """Validates the weights as they are and records the results under `step`."""
        if self._prepared.held_out:
            self._held_out(step, denoiser, metrics)
        if self._shots:
            metrics.samples(step, self._samples(step, denoiser))

    def _held_out(self, step: int, denoiser: nn.Module, metrics: Metrics) -> None:
        samples, placement = self._prepared.held_out, self._placement
        times = self._objective.held_out_times(self._config.validation.held_out_timesteps)
        indices = fixed_batches(samples, self._config.train.batch_size)
        result = held_out_loss(
            self._spec,
            denoiser,
            self._objective,
            (self._held_out_batch([samples[index] for index in some]) for some in indices),
            timesteps=times,
            seed=self._config.run.seed,
            device=placement.device,
            compute_dtype=placement.compute_dtype,
            guidance=self._config.objective.guidance,
        )
        metrics.held_out(step, result.loss, result.by_timestep, times)

    def _held_out_batch(self, chosen: list[CachedSample]) -> HeldOutBatch:
        batch = self._prepared.reader.read(chosen)
        text_mask = self._config.objective.text_mask
        return HeldOutBatch(
            clean_latents=batch.latent_mean,
            conditions=select_conditions(batch.conditions, text_mask=text_mask),
            sizes=batch.sizes,
            keys=[cached.sample.name for cached in chosen],
        )

    def _samples(self, step: int, denoiser: nn.Module) -> Path:
        v, placement = self._config.validation, self._placement
        images = sample(
            self._spec,
            denoiser,
            objective=self._objective,
            folder=self._prepared.folder,
            encoded=self._encoded(),
            shots=self._shots,
            num_steps=v.sampling_steps,
            guidance_scale=v.guidance_scale,
            device=placement.device,
            compute_dtype=placement.compute_dtype,
        )
        folder = self._run_dir / "samples"
        for shot, image in zip(self._shots, images, strict=True):
            save_png(image, self._single(step, shot))
        first = self._first_column()
        rows = [[image] for image in images]
        untrained = "untrained" if self._config.adapter.init_from is None else "at the start"
        columns = [f"step {step}" if step else untrained]
        if step and first:
            rows = [[before, image] for before, image in zip(first, images, strict=True)]
            columns = [untrained, *columns]
        grid = folder / f"{checkpoint_name(step)}.png"
        save_png(make_grid(rows, self._labels, columns), grid)
        return grid

    def _encoded(self) -> EncodedPrompts:
        """The prompts from the text cache, where prepare has put them."""
        v = self._config.validation

        def read(prompt: str) -> dict[str, torch.Tensor]:
            conditions = self._prepared.conditions([prompt])
            return select_conditions(conditions, text_mask=self._config.objective.text_mask)

        return EncodedPrompts(
            prompts=v.prompts,
            positive=tuple(read(prompt) for prompt in v.prompts),
            negative=None if self._spec.has_guidance else read(v.negative_prompt),
        )

    def _single(self, step: int, shot: Shot) -> Path:
        """Named after what is sampled, so that changed prompts never meet another's first column."""
        what = (
            f"{self._config.validation.prompts[shot.prompt]} {shot.width} {shot.height} {shot.seed}"
        )
        digest = hashlib.blake2b(what.encode(), digest_size=6).hexdigest()
        return self._run_dir / "samples" / "single" / f"{checkpoint_name(step)}-{digest}.png"

    def _first_column(self) -> list[Image.Image]:
        """The untrained model's images, from disk: a resumed run has them, too."""
        paths = [self._single(0, shot) for shot in self._shots]
        if not all(path.is_file() for path in paths):
            return []
        return [Image.open(path).convert("RGB") for path in paths]
