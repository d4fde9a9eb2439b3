"""Steps without weights and data are the run's steps in everything but the values."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from benchmarks.static.models import (
    CONFIG_FILES,
    MODEL_FOLDERS,
    config_named,
    model_folder,
    shipped_configs,
)
from fasttune.config import Config
from fasttune.data.buckets import make_buckets
from fasttune.device import Placement, place
from fasttune.errors import FasttuneError
from fasttune.models import MODELS
from fasttune.models.weights import read_config
from fasttune.optim import chunks
from fasttune.rehearsal import bucket_sizes, gpu_placement, largest_bucket, rehearse

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart" / "model"


def cpu(config: Config) -> Placement:
    adapter = config.adapter.type != "none"
    return place(device="cpu", base="fp32", compute="fp32", adapter=adapter)


@pytest.fixture
def quickstart() -> Config:
    config = config_named("quickstart")
    return replace(config, train=replace(config.train, batch_size=2, gradient_accumulation=2))


def test_real_steps_are_finite_and_repeat(quickstart: Config) -> None:
    def losses() -> list[float]:
        rehearsal = rehearse(quickstart, QUICKSTART, placement=cpu(quickstart))
        return [rehearsal.take_step().item() for _ in range(4)]

    first = losses()
    assert first == losses()
    assert all(0 < loss < 100 for loss in first)


def test_what_trains_is_what_the_config_says(quickstart: Config) -> None:
    rehearsal = rehearse(quickstart, QUICKSTART, placement=cpu(quickstart))
    before = {n: p.detach().clone() for n, p in rehearsal.denoiser.named_parameters()}
    for _ in range(3):  # the first has lr 0, the second moves B alone, which starts at zero
        rehearsal.take_step()
    changed = {n for n, p in rehearsal.denoiser.named_parameters() if not p.equal(before[n])}
    assert changed == {n for n in before if "lora_" in n}


def test_the_generators_of_the_caller_are_left_alone(quickstart: Config) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    rehearse(quickstart, QUICKSTART, placement=cpu(quickstart))
    assert torch.rand(4).equal(expected)


def test_fake_steps_make_no_real_tensor() -> None:
    config = config_named("sd1-lora-8gb")
    with FakeTensorMode():
        rehearsal = rehearse(
            config, MODEL_FOLDERS["sd15"], placement=gpu_placement(config), device_type="cuda"
        )
        loss = rehearsal.take_step()
    assert isinstance(loss, FakeTensor)
    assert all(isinstance(p, FakeTensor) for p in rehearsal.denoiser.parameters())
    base = rehearsal.denoiser.get_parameter("conv_in.weight")
    assert base.dtype == torch.bfloat16
    # 66 tokens of 64 x 64 pixels, where the square has 64
    assert rehearsal.size == (384, 704)
    assert rehearsal.batch.latent_mean.shape == (2, 4, 88, 48)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("quickstart", (96, 96)),  # one square
        # as many pixels as 768 x 1440 and 864 x 1280, but squarer, and more than 1024 x 1024
        ("sdxl-lora-12gb", (960, 1152)),
        ("tiny-vae", (96, 100)),  # of the second source; multiples of 4 pixels
    ],
)
def test_the_largest_bucket_has_the_most_tokens(name: str, size: tuple[int, int]) -> None:
    config, folder = next((c, f) for found, c, f in shipped_configs() if found == name)
    spec = MODELS[config.model.family]
    assert largest_bucket(config, spec, folder) == size
    reverse = replace(config, data=config.data[::-1])
    assert largest_bucket(reverse, spec, folder) == size


def test_buckets_are_those_that_images_are_brought_to() -> None:
    config = config_named("sdxl-lora-12gb")
    sizes = bucket_sizes(config, MODELS["sdxl"], MODEL_FOLDERS["sdxl"])
    source = config.data[0]
    made = make_buckets(
        resolution=source.resolution,
        resolution_type=source.resolution_type,
        multiple=32,
        max_aspect=source.max_aspect,
    )
    assert sizes == made.sizes and (768, 1440) in sizes
    assert max(width * height for width, height in sizes) == 768 * 1440


def test_fake_tensors_are_chunked_as_on_the_device_they_stand_for() -> None:
    params = [torch.nn.Parameter(torch.empty(1 << 19)) for _ in range(6)]
    assert len(list(chunks.bounded(params))) == 3
    with chunks.chunked_as_on("cuda"):
        assert len(list(chunks.bounded(params))) == 1
    assert len(list(chunks.bounded(params))) == 3


def test_full_training_keeps_fp32_weights_on_a_gpu() -> None:
    placement = gpu_placement(config_named("sdxl-full-24gb"))
    assert (placement.base_dtype, placement.compute_dtype) == (torch.float32, torch.bfloat16)
    assert gpu_placement(config_named("tiny-sdxl")).compute_dtype == torch.float32


def test_a_model_without_config_files_is_named(quickstart: Config) -> None:
    other = replace(quickstart, model=replace(quickstart.model, path="someone/a-model"))
    with pytest.raises(
        FasttuneError, match=r"configs/mine\.toml.*someone/a-model.*FLUX\.1-schnell"
    ):
        model_folder("mine", other)
    path = "black-forest-labs/FLUX.1-schnell"
    schnell = replace(quickstart, model=replace(quickstart.model, path=path))
    assert model_folder("mine", schnell) == MODEL_FOLDERS["flux-schnell"]


def test_every_shipped_config_has_its_model() -> None:
    found = list(shipped_configs())
    assert [name for name, _, _ in found] == [path.stem for path in CONFIG_FILES]
    for _, config, folder in found:
        spec = MODELS[config.model.family]
        assert (folder / spec.denoiser_folder / "config.json").is_file()


@pytest.mark.parametrize(
    ("name", "family", "expected"),
    [
        # shapes of the released models' inputs at 1024 x 768 pixels
        (
            "flux-dev",
            "flux",
            {
                "latents": (16, 96, 128),
                "text_embeddings": (512, 4096),
                "pooled_text_embeddings": (768,),
            },
        ),
        (
            "flux-schnell",
            "flux",
            {
                "latents": (16, 96, 128),
                "text_embeddings": (256, 4096),
                "pooled_text_embeddings": (768,),
            },
        ),
        (
            "sdxl",
            "sdxl",
            {
                "latents": (4, 96, 128),
                "text_embeddings": (77, 2048),
                "pooled_text_embeddings": (1280,),
            },
        ),
        ("sd15", "sd1", {"latents": (4, 96, 128), "text_embeddings": (77, 768)}),
        ("sd21", "sd2", {"latents": (4, 96, 128), "text_embeddings": (77, 1024)}),
    ],
)
def test_input_shapes(name: str, family: str, expected: dict[str, tuple[int, ...]]) -> None:
    spec = MODELS[family]
    config = read_config(MODEL_FOLDERS[name], spec.denoiser_folder)
    assert spec.input_shapes(config, 1024, 768) == expected


def test_latents_are_as_large_as_the_autoencoder_makes_them(quickstart: Config) -> None:
    # 96 pixels, of which 4 x 4 are a latent; the released autoencoders have 8 x 8
    rehearsal = rehearse(quickstart, QUICKSTART, placement=cpu(quickstart))
    assert rehearsal.batch.latent_mean.shape == (2, 4, 24, 24)
