"""Training steps of a config without its weights and images.

Under a `FakeTensorMode` a step of the real size needs neither memory nor a GPU, and says what the
run will take; on a GPU the same steps run on random weights and can be timed. Network, adapter,
objective, optimizer, average and clipping are the run's own; `random_batch` says what its batch is not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fasttune.build import adapt, objective_for, set_blocks, step_for
from fasttune.config import Config
from fasttune.data.buckets import make_buckets
from fasttune.data.loader import Batch
from fasttune.device import Placement, dtypes
from fasttune.models import MODELS
from fasttune.models.autoencoder import downscale
from fasttune.models.spec import ModelSpec
from fasttune.models.weights import build_on_meta, read_config, set_tensor
from fasttune.optim.chunks import chunked_as_on
from fasttune.seeds import derive_seed
from fasttune.step import Step
from fasttune.trained import Trained

PIXELS_PER_LATENT = 8
"""Along each side, as `ModelSpec.input_shapes` takes it; `folder` need not have the VAE."""


@dataclass(kw_only=True, slots=True)
class Rehearsal:
    """A run that can take steps. Made by `rehearse`."""

    config: Config
    placement: Placement
    denoiser: nn.Module
    trained: Trained
    forward: Step
    batch: Batch
    size: tuple[int, int]
    """(width, height) in pixels of the images that `rehearse` made the batch for."""
    device_type: str
    """The kind of device that is rehearsed; the placement's own, but for fake tensors."""
    step: int = field(default=0, init=False)
    """Updates taken."""

    def micro_batch(self) -> Tensor:
        """Forward and backward of one micro-batch; its detached loss."""
        count = self.config.train.gradient_accumulation
        generator = torch.Generator(self.placement.device)
        generator.manual_seed(derive_seed(self.config.run.seed, "micro-batch", self.step))
        loss = self.forward.loss(self.batch, generator) / count
        self.trained.backward(loss)
        return loss.detach()

    def update(self) -> Tensor:
        """Clipping, optimizer and average; the gradient norm before clipping."""
        self.step += 1
        with chunked_as_on(self.device_type):
            return self.trained.update(self.step)

    def take_step(self) -> Tensor:
        """All micro-batches and the update; the loss on the device, nothing waits for it."""
        self.trained.set_lr(self.step)
        losses = [self.micro_batch() for _ in range(self.config.train.gradient_accumulation)]
        self.update()
        return torch.stack(losses).sum()


def rehearse(
    config: Config,
    folder: Path,
    *,
    placement: Placement,
    device_type: str | None = None,
    size: tuple[int, int] | None = None,
) -> Rehearsal:
    """The config's run on the model whose config files are in `folder`; no weights are read.

    `size` is (width, height) in pixels, by default the run's largest bucket: what takes most.
    Call it under a FakeTensorMode, with a CPU placement, to make no real tensors: fake CUDA tensors
    have no backward without a GPU. `device_type` then says what they stand for.
    """
    spec = MODELS[config.model.family]
    size = size or largest_bucket(config, spec, folder)
    kind = device_type or placement.device.type
    with _drawn(config.run.seed), chunked_as_on(kind):
        denoiser = network_without_weights(spec, folder, placement)
        adapt(config, spec, denoiser)
        set_blocks(config, denoiser, placement, device_type=device_type)
        denoiser.train()
        return Rehearsal(
            config=config,
            placement=placement,
            denoiser=denoiser,
            trained=Trained(config, denoiser, placement, resuming=True),  # reads no starting LoRA
            forward=step_for(
                config, spec, denoiser, objective_for(config, spec, folder), placement, folder
            ),
            batch=random_batch(config, spec, folder, placement, size),
            size=size,
            device_type=kind,
        )


def bucket_sizes(config: Config, spec: ModelSpec, folder: Path) -> tuple[tuple[int, int], ...]:
    """(width, height) in pixels of the buckets of all sources, each once, as `prepare` makes them for a
    model whose config files are in `folder`."""
    multiple = spec.latent_multiple(read_config(folder, spec.denoiser_folder))
    if spec.objective != "reconstruction":  # whose inputs are pixels
        multiple *= pixels_per_latent(folder)
    made = (
        make_buckets(
            resolution=source.resolution,
            resolution_type=source.resolution_type,
            multiple=multiple,
            max_aspect=source.max_aspect,
            aspect_buckets=source.aspect_buckets,
        )
        for source in config.data
    )
    return tuple(dict.fromkeys(size for buckets in made for size in buckets.sizes))


def pixels_per_latent(folder: Path) -> int:
    """Side in pixels of what becomes one latent: by vae/config.json, or that of the released models
    where the folder has none."""
    if not (folder / "vae" / "config.json").is_file():
        return PIXELS_PER_LATENT
    return downscale(read_config(folder, "vae"))


def largest_bucket(config: Config, spec: ModelSpec, folder: Path) -> tuple[int, int]:
    """(width, height) in pixels of the bucket with the most tokens over all sources, whose batches
    need the most memory and time. Of several the squarest; of those the first, which is upright."""

    def order(size: tuple[int, int]) -> tuple[int, float]:
        width, height = size
        return width * height, -max(width / height, height / width)

    return max(bucket_sizes(config, spec, folder), key=order)


def gpu_placement(config: Config) -> Placement:
    """Where fake tensors stand for those on a GPU with bf16: CPU tensors in that GPU's dtypes.
    A config that asks for the CPU stays with its own."""
    base, compute = config.precision.base, config.precision.compute
    if config.model.family == "autoencoder":
        base = compute = "fp32"
    base_dtype, compute_dtype = dtypes(
        base, compute, adapter=config.adapter.type != "none", bf16=config.run.device != "cpu"
    )
    return Placement(
        device=torch.device("cpu"),
        base_dtype=base_dtype,
        compute_dtype=compute_dtype,
        reason="fake tensors",
    )


@contextmanager
def _drawn(seed: int) -> Iterator[None]:
    """Default generators seeded within, and as before after."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "rehearsal"))
        yield


@torch.no_grad()
def network_without_weights(spec: ModelSpec, folder: Path, placement: Placement) -> nn.Module:
    """Random weights, drawn on the device at the scale torch's layers draw theirs: vectors named
    weight are norms' and 1, biases 0, so that activations stay finite through any depth."""
    denoiser = build_on_meta(spec, folder)
    found = {**dict(denoiser.named_parameters()), **dict(denoiser.named_buffers())}
    for name, tensor in found.items():
        value = torch.empty(tensor.shape, dtype=placement.base_dtype, device=placement.device)
        if tensor.ndim < 2:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            fan_in = tensor[0].numel()
            value.normal_(0.0, (3 * fan_in) ** -0.5)
        set_tensor(denoiser, name, value)
    return denoiser


def random_batch(
    config: Config, spec: ModelSpec, folder: Path, placement: Placement, size: tuple[int, int]
) -> Batch:
    """Random latents with a deviation, float32, and conditions in the compute dtype, of the shapes that
    a run's batch has for images of `size`, (width, height) in pixels.

    A run's conditions come in the dtype that the cache stores them in, int8 unpacked to float32, and its
    step converts them; `text_storage = "auto"` stores the compute dtype. Where `cache.latents` is
    "sample", its latents have no deviation. Its loader keeps further batches on the device."""
    width, height = size
    count, device = config.train.batch_size, placement.device
    # The specs' shapes are those of the released autoencoders.
    scale = PIXELS_PER_LATENT // pixels_per_latent(folder)
    if spec.objective == "reconstruction":
        scale = 1
    model_config = read_config(folder, spec.denoiser_folder)
    shapes = spec.input_shapes(model_config, width * scale, height * scale)
    latents = torch.randn(count, *shapes.pop("latents"), device=device)
    conditions = {
        name: torch.randn(count, *shape, device=device, dtype=placement.compute_dtype)
        for name, shape in shapes.items()
    }
    if config.objective.text_mask:
        tokens = conditions["text_embeddings"].shape[1]
        conditions["text_mask"] = torch.ones(count, tokens, dtype=torch.bool, device=device)
    numbers = [height, width, 0, 0, height, width]
    return Batch(
        latent_mean=latents,
        latent_std=torch.full_like(latents, 0.1),
        conditions=conditions,
        sizes=torch.tensor([numbers] * count, dtype=torch.float32, device=device),
        paths=[],
        micro_batch=0,
    )
