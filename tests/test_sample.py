"""Images and latents equal those of the diffusers pipelines on tiny random models."""

import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from fasttune import sample as sampling
from fasttune.adapters.formats import lora_tensors
from fasttune.adapters.lora import apply_lora, lora_state, module_shapes
from fasttune.build import objective_for, scheduler_config
from fasttune.checkpoint import save_checkpoint
from fasttune.config import Config, Data, Model, Run, Validation
from fasttune.denoise import denoise, noise_schedule
from fasttune.errors import CheckpointError, ConfigError, FasttuneError
from fasttune.models import MODELS
from fasttune.models.spec import ModelSpec
from fasttune.models.weights import load_denoiser

CPU = torch.device("cpu")
PROMPT, OTHER = "a photo of the cat", "dog, blurry"
PIPELINES = {
    "sdxl": "StableDiffusionXLPipeline",
    "flux": "FluxPipeline",
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
}


def config_for(family: str, folder: Path, **validation: Any) -> Config:
    return Config(
        run=Run(device="cpu"),
        model=Model(family=family, path=str(folder)),  # type: ignore[arg-type]
        data=(Data(path="unused", resolution=64),),
        validation=Validation(**validation),
    )


def diffusers_images(family: str, folder: Path, *, size: tuple[int, int], **call: Any) -> Any:
    """What the pipeline makes of PROMPT in 6 steps from seed 3; Euler steps for all families."""
    import diffusers

    pipe = getattr(diffusers, PIPELINES[family]).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if family != "flux":
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(scheduler_config(folder))
    return pipe(
        PROMPT,
        width=size[0],
        height=size[1],
        num_inference_steps=6,
        generator=torch.Generator().manual_seed(3),
        **call,
    ).images


def our_images(
    family: str,
    folder: Path,
    *,
    size: tuple[int, int],
    guidance_scale: float,
    negative_prompt: str = "",
    spec: ModelSpec | None = None,
) -> list[Image.Image]:
    spec = spec or MODELS[family]
    return sampling.sample(
        spec,
        load_denoiser(spec, folder, dtype=torch.float32, device=CPU),
        objective=objective_for(config_for(family, folder), spec, folder),
        folder=folder,
        encoded=sampling.encode_prompts(
            spec,
            folder,
            prompts=[PROMPT],
            negative_prompt=negative_prompt,
            device=CPU,
            dtype=torch.float32,
        ),
        shots=sampling.shots(1, [size], [3]),
        num_steps=6,
        guidance_scale=guidance_scale,
        device=CPU,
        compute_dtype=torch.float32,
    )


def assert_same_image(ours: Image.Image, theirs: Image.Image) -> None:
    assert ours.size == theirs.size
    a, b = np.asarray(ours).astype(int), np.asarray(theirs).astype(int)
    assert b.std() > 1  # not blank: the comparison can fail
    assert np.abs(a - b).max() <= 1  # 8-bit rounding of values 1e-6 apart


# raised inside diffusers' EulerDiscreteScheduler with NumPy 2
euler_warning = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@euler_warning
@pytest.mark.parametrize("negative", [None, OTHER])
def test_sdxl_images_as_diffusers(tiny_sdxl: Path, negative: str | None) -> None:
    size = (96, 64)
    (theirs,) = diffusers_images(
        "sdxl", tiny_sdxl, size=size, guidance_scale=5.0, negative_prompt=negative
    )
    (ours,) = our_images(
        "sdxl", tiny_sdxl, size=size, guidance_scale=5.0, negative_prompt=negative or ""
    )
    assert_same_image(ours, theirs)


@pytest.mark.parametrize("guidance", [True, False])
def test_flux_images_as_diffusers(
    guidance: bool, tiny_flux: Path, tiny_models: Any, tmp_path: Path
) -> None:
    """dev: dynamic shift, embedded guidance, 512 positions; schnell: neither and 256."""
    folder = tiny_flux if guidance else tiny_models.write_tiny_flux(tmp_path / "m", guidance=False)
    (theirs,) = diffusers_images(
        "flux",
        folder,
        size=(96, 64),
        guidance_scale=3.5,
        max_sequence_length=512 if guidance else 256,
    )
    (ours,) = our_images("flux", folder, size=(96, 64), guidance_scale=3.5)
    assert_same_image(ours, theirs)


@euler_warning
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_sd_images_as_diffusers(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(f"tiny_{family}"), folder)
    # EulerDiscreteScheduler spaces otherwise than the class in the file unless told
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "timestep_spacing": "leading"}))
    call = {"guidance_scale": 4.0, "negative_prompt": OTHER}
    (theirs,) = diffusers_images(family, folder, size=(128, 64), **call)
    (ours,) = our_images(family, folder, size=(128, 64), **call)
    assert_same_image(ours, theirs)


DDPM_CASES = [
    ("sdxl", {}),
    ("sdxl", {"timestep_spacing": "trailing"}),
    ("sd1", {"timestep_spacing": "linspace"}),
    ("sd2", {"timestep_spacing": "leading"}),
    ("sd2", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    ("sd2", {"timestep_spacing": "linspace"}),
]


@euler_warning
@pytest.mark.parametrize(("family", "changes"), DDPM_CASES)
@torch.no_grad()
def test_latents_follow_the_scheduler(
    family: str, changes: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The loop of a pipeline with diffusers' network and scheduler, against ours with our network."""
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    folder = tmp_path / "model"
    source = request.getfixturevalue(f"tiny_{family}")
    shutil.copytree(source / "unet", folder / "unet")
    shutil.copytree(source / "scheduler", folder / "scheduler")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    generator = torch.Generator().manual_seed(0)
    width = unet.config.cross_attention_dim
    noise = torch.randn(2, 4, 8, 16, generator=generator)
    positive = {"text_embeddings": torch.randn(2, 77, width, generator=generator)}
    negative = {"text_embeddings": torch.randn(2, 77, width, generator=generator)}
    sizes = torch.tensor([[64.0, 128, 0, 0, 64, 128], [100, 90, 4, 5, 64, 128]])
    added = {}
    if family == "sdxl":
        positive["pooled_text_embeddings"] = torch.randn(2, 20, generator=generator)
        negative["pooled_text_embeddings"] = torch.randn(2, 20, generator=generator)
        pooled = torch.cat([negative["pooled_text_embeddings"], positive["pooled_text_embeddings"]])
        added = {"text_embeds": pooled, "time_ids": torch.cat([sizes, sizes])}

    scheduler = EulerDiscreteScheduler.from_config(scheduler_config(folder))
    scheduler.set_timesteps(7)
    x = noise * scheduler.init_noise_sigma
    text = torch.cat([negative["text_embeddings"], positive["text_embeddings"]])
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(torch.cat([x, x]), t)
        prediction = unet(
            model_input, t, encoder_hidden_states=text, added_cond_kwargs=added or None
        ).sample
        uncond, cond = prediction.chunk(2)
        x = scheduler.step(uncond + 3.0 * (cond - uncond), t, x).prev_sample

    spec = MODELS[family]
    objective = objective_for(config_for(family, folder), spec, folder)
    ours = denoise(
        spec,
        load_denoiser(spec, folder, dtype=torch.float32, device=CPU),
        conditions=positive,
        negative_conditions=negative,
        sizes=sizes,
        negative_sizes=sizes,
        noise=noise,
        schedule=noise_schedule(
            objective, scheduler_config(folder), num_steps=7, image_seq_len=128
        ),
        guidance_scale=3.0,
        compute_dtype=torch.float32,
    )
    assert (ours - x).abs().max() / x.abs().max() < 1e-4


def fake_spec(family: str, predict: Callable[..., Tensor]) -> ModelSpec:
    return replace(MODELS[family], predict=predict)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "prediction"),
    [("flux", "velocity"), ("sdxl", "epsilon"), ("sd2", "v_prediction")],
)
def test_a_perfect_denoiser_ends_at_its_image(
    family: str, prediction: str, request: pytest.FixtureRequest
) -> None:
    """From the definitions of the predictions, without any scheduler's code."""
    folder = request.getfixturevalue(f"tiny_{family}")
    generator = torch.Generator().manual_seed(1)
    image, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    objective = objective_for(config_for(family, folder), MODELS[family], folder)
    if family != "flux":
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        abar = torch.cumprod(1 - betas, 0)

    def predict(_: nn.Module, noisy: Tensor, timestep: Tensor, *rest: Any) -> Tensor:
        if prediction == "velocity":
            return (noisy - image) / timestep.view(-1, 1, 1, 1)
        a = abar[timestep.long()].float().view(-1, 1, 1, 1)
        eps = (noisy - a.sqrt() * image) / (1 - a).sqrt()
        return eps if prediction == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * image

    schedule = noise_schedule(objective, scheduler_config(folder), num_steps=5, image_seq_len=16)
    assert schedule.prediction == prediction
    out = denoise(
        fake_spec(family, predict),
        nn.Identity(),
        conditions={},
        negative_conditions=None,
        sizes=torch.zeros(2, 6),
        negative_sizes=torch.zeros(2, 6),
        noise=noise,
        schedule=schedule,
        guidance_scale=1.0,
        compute_dtype=torch.float32,
    )
    torch.testing.assert_close(out, image, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "guidance_scale", "negative", "batch"),
    [
        ("sdxl", 1.0, True, 2),
        ("sdxl", 5.0, True, 4),
        ("sdxl", 5.0, False, 2),
        ("flux", 5.0, True, 2),
    ],
)
def test_guidance(
    family: str, guidance_scale: float, negative: bool, batch: int, request: pytest.FixtureRequest
) -> None:
    """One forward of B without guidance, one of 2 B with; the result moves as the formula says."""
    folder = request.getfixturevalue(f"tiny_{family}")
    seen: list[tuple[int, float]] = []

    def predict(
        _: nn.Module,
        noisy: Tensor,
        timestep: Tensor,
        conditions: Any,
        sizes: Tensor,
        guidance: Tensor,
    ) -> Tensor:
        assert len(noisy) == len(timestep) == len(sizes) == len(guidance)
        seen.append((len(noisy), float(guidance[0])))
        return torch.ones_like(noisy) * conditions["text_embeddings"].view(-1, 1, 1, 1)

    objective = objective_for(config_for(family, folder), MODELS[family], folder)
    schedule = noise_schedule(objective, scheduler_config(folder), num_steps=4, image_seq_len=16)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    out = denoise(
        fake_spec(family, predict),
        nn.Identity(),
        conditions={"text_embeddings": torch.tensor([[1.0], [2.0]])},
        negative_conditions={"text_embeddings": torch.tensor([[0.5], [0.5]])} if negative else None,
        sizes=torch.zeros(2, 6),
        negative_sizes=torch.zeros(2, 6),
        noise=noise,
        schedule=schedule,
        guidance_scale=guidance_scale,
        compute_dtype=torch.float32,
    )
    assert seen == [(batch, guidance_scale)] * 4
    guided = [0.5 + 5 * (value - 0.5) if batch == 4 else value for value in (1.0, 2.0)]
    start, end = schedule.initial * noise, -float(schedule.sigmas[0])
    expected = start + end * torch.tensor(guided).view(2, 1, 1, 1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


def test_zero_terminal_snr_from_the_config_starts_at_pure_noise(tiny_sd2: Path) -> None:
    config = config_for("sd2", tiny_sd2)
    config = replace(config, objective=replace(config.objective, zero_terminal_snr=True))
    objective = objective_for(config, MODELS["sd2"], tiny_sd2)
    schedule = noise_schedule(objective, scheduler_config(tiny_sd2), num_steps=4, image_seq_len=1)
    assert schedule.timesteps.tolist() == [999, 749, 499, 249]
    assert schedule.sigmas[0] > 4000


def test_an_image_depends_on_its_seed_alone(tiny_sdxl: Path) -> None:
    spec = MODELS["sdxl"]
    denoiser = load_denoiser(spec, tiny_sdxl, dtype=torch.float32, device=CPU).train()
    encoded = sampling.encode_prompts(
        spec,
        tiny_sdxl,
        prompts=[PROMPT, OTHER],
        negative_prompt="",
        device=CPU,
        dtype=torch.float32,
    )
    todo = sampling.shots(2, [(64, 64), (96, 64)], [0, 1])
    assert [(s.prompt, s.width, s.seed) for s in todo[:5]] == [
        (0, 64, 0),
        (0, 64, 1),
        (0, 96, 0),
        (0, 96, 1),
        (1, 64, 0),
    ]

    def make(some: list[sampling.Shot]) -> list[bytes]:
        images = sampling.sample(
            spec,
            denoiser,
            objective=objective_for(config_for("sdxl", tiny_sdxl), spec, tiny_sdxl),
            folder=tiny_sdxl,
            encoded=encoded,
            shots=some,
            num_steps=2,
            guidance_scale=3.0,
            device=CPU,
            compute_dtype=torch.float32,
        )
        assert [image.size for image in images] == [(s.width, s.height) for s in some]
        return [image.tobytes() for image in images]

    before = torch.get_rng_state()
    together = make(todo)
    assert len(set(together)) == len(todo)
    torch.manual_seed(99)  # no other generator matters
    assert make(todo[5:6]) == together[5:6]
    torch.set_rng_state(before)
    assert make(todo) == together
    assert torch.equal(torch.get_rng_state(), before)  # and none is advanced
    assert denoiser.training


def test_text_encoders_are_loaded_one_at_a_time(tiny_flux: Path) -> None:
    alive: list[weakref.ref[Any]] = []
    spec = MODELS["flux"]

    def openers(folder: Path, device: torch.device, dtype: torch.dtype) -> list[Any]:
        def watched(opener: Callable[[], Any]) -> Callable[[], Any]:
            def open_one() -> Any:
                assert all(reference() is None for reference in alive)
                encode = opener()
                alive.append(weakref.ref(encode.encoder))
                return encode

            return open_one

        return [watched(opener) for opener in spec.open_text_encoders(folder, device, dtype)]

    encoded = sampling.encode_prompts(
        replace(spec, open_text_encoders=openers),
        tiny_flux,
        prompts=[PROMPT],
        negative_prompt="",
        device=CPU,
        dtype=torch.float32,
    )
    assert len(alive) == 2 and all(reference() is None for reference in alive)
    assert encoded.negative is None
    assert set(encoded.positive[0]) == {"text_embeddings", "pooled_text_embeddings"}


def test_requests_that_cannot_be_honoured(tiny_sdxl: Path, tiny_flux: Path, tiny_sd1: Path) -> None:
    check = sampling.check_resolutions
    with pytest.raises(ConfigError, match="100x64.*multiples of 32.*96x64"):
        check(MODELS["sdxl"], tiny_sdxl, [(64, 64), (100, 64)])
    check(MODELS["flux"], tiny_flux, [(16, 48)])
    with pytest.raises(ConfigError, match="multiples of 16"):
        check(MODELS["flux"], tiny_flux, [(24, 48)])
    with pytest.raises(ConfigError, match="multiples of 64"):
        check(MODELS["sd1"], tiny_sd1, [(96, 64)])
    with pytest.raises(ConfigError, match="no images from prompts"):
        check(MODELS["autoencoder"], tiny_sd1, [(64, 64)])
    for text in ("1024", "1024x", "0x64", "64*64"):
        with pytest.raises(ConfigError, match="expected width x height"):
            sampling.parse_resolution(text)
    assert sampling.parse_resolution("640 x 480") == (640, 480)
    with pytest.raises(ConfigError, match="negative prompt"):
        sampling.encode_prompts(
            MODELS["flux"],
            tiny_flux,
            prompts=["cat"],
            negative_prompt="dog",
            device=CPU,
            dtype=torch.float32,
        )
    with pytest.raises(ConfigError, match="prompt"):
        sampling.main(config_for("sdxl", tiny_sdxl))


def lora_of(folder: Path, family: str) -> nn.Module:
    """A network with an adapter that changes its output."""
    spec = MODELS[family]
    denoiser = load_denoiser(spec, folder, dtype=torch.float32, device=CPU)
    targets = spec.adapter_targets["attention"]
    apply_lora(denoiser, targets=targets, rank=4, alpha=8.0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return denoiser


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_main_with_weights_of_any_layout(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    denoiser = lora_of(folder, family)
    config = config_for(family, folder, sampling_steps=1, guidance_scale=3.0)
    files = {"untrained": None}
    for layout in ("peft", "kohya", "comfyui"):
        files[layout] = tmp_path / f"{layout}.safetensors"
        tensors = lora_tensors(
            lora_state(denoiser), module_shapes(denoiser), layout=layout, dtype=torch.float32
        )
        save_file(tensors, files[layout])
    pixels: dict[str, np.ndarray] = {}
    for name, weights in files.items():
        paths = sampling.main(
            config,
            weights=weights,
            prompts=[PROMPT, ""],
            seeds=[0, 7],
            resolutions=["64x64"],
            out=tmp_path / name,
        )
        assert [path.name for path in paths] == [
            "01-a-photo-of-the-cat-64x64-seed0.png",
            "01-a-photo-of-the-cat-64x64-seed7.png",
            "02-empty-64x64-seed0.png",
            "02-empty-64x64-seed7.png",
            "grid.png",
        ]
        pixels[name] = np.stack([np.asarray(Image.open(path)) for path in paths[:-1]]).astype(int)
    assert np.abs(pixels["peft"] - pixels["untrained"]).max() > 5
    for layout in ("kohya", "comfyui"):
        assert np.abs(pixels["peft"] - pixels[layout]).max() <= 1


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_main_frees_the_network_before_the_autoencoder_is_loaded(
    family: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    networks: list[weakref.ref[nn.Module]] = []
    alive_then: list[bool] = []
    load_network, load_autoencoder = sampling._trained, sampling.load_autoencoder

    def watched_network(*args: Any, **kwargs: Any) -> nn.Module:
        network = load_network(*args, **kwargs)
        networks.append(weakref.ref(network))
        return network

    def watched_autoencoder(*args: Any, **kwargs: Any) -> Any:
        alive_then.extend(network() is not None for network in networks)
        return load_autoencoder(*args, **kwargs)

    monkeypatch.setattr(sampling, "_trained", watched_network)
    monkeypatch.setattr(sampling, "load_autoencoder", watched_autoencoder)
    weights = tmp_path / "lora.safetensors"
    lora = lora_of(folder, family)
    tensors = lora_tensors(
        lora_state(lora), module_shapes(lora), layout="peft", dtype=torch.float32
    )
    save_file(tensors, weights)
    config = config_for(family, folder, sampling_steps=1, prompts=(PROMPT,))
    sampling.main(config, weights=weights, out=tmp_path / "out")
    assert alive_then == [False]


def test_main_with_a_checkpoint(tiny_sdxl: Path, tmp_path: Path) -> None:
    denoiser = lora_of(tiny_sdxl, "sdxl")
    trained = {name: p.detach() for name, p in denoiser.named_parameters() if p.requires_grad}
    average = {name: 0.25 * p for name, p in trained.items()}
    run = tmp_path / "runs" / "cat"
    config = config_for("sdxl", tiny_sdxl, sampling_steps=1, prompts=(PROMPT,))
    config = replace(config, adapter=replace(config.adapter, rank=4, alpha=8.0))
    plain = save_checkpoint(run / "checkpoints", 1, {"trainable": trained}, {})
    averaged = save_checkpoint(run / "checkpoints", 2, {"trainable": trained, "ema": average}, {})
    images = {}
    for checkpoint in (None, plain, averaged):
        out = tmp_path / "base" / "my.png" if checkpoint is None else None
        paths = sampling.main(config, checkpoint=checkpoint, out=out)
        images[checkpoint] = np.asarray(Image.open(paths[0])).astype(int)
        if checkpoint is None:
            assert paths[-1] == out
            assert paths[0].parent == tmp_path / "base" / "my"
        else:
            assert paths[-1] == run / "samples" / checkpoint.name / "grid.png"
    assert np.abs(images[plain] - images[None]).max() > 5
    assert np.abs(images[averaged] - images[plain]).max() > 5

    other = replace(config, adapter=replace(config.adapter, rank=8))
    with pytest.raises(CheckpointError, match="another model or adapter"):
        sampling.main(other, checkpoint=plain)
    (plain / "trainable.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="trainable"):
        sampling.main(config, checkpoint=plain)


def test_main_with_a_whole_network(tiny_sdxl: Path, tiny_models: Any, tmp_path: Path) -> None:
    other = tiny_models.write_tiny_sdxl(tmp_path / "other", seed=1)
    config = config_for("sdxl", tiny_sdxl, sampling_steps=1, prompts=(PROMPT,), guidance_scale=1.0)
    images = [
        np.asarray(Image.open(sampling.main(config, weights=weights, out=tmp_path / name)[0]))
        for name, weights in (("a", None), ("b", other), ("c", tiny_sdxl))
    ]
    assert np.array_equal(images[0], images[2])
    assert not np.array_equal(images[0], images[1])
    with pytest.raises(FasttuneError, match="unet/config.json"):
        sampling.main(config, weights=tiny_sdxl / "vae", out=tmp_path)
    with pytest.raises(ConfigError, match="--weights.*diffusion_pytorch_model"):
        file = tiny_sdxl / "unet" / "diffusion_pytorch_model.safetensors"
        sampling.main(config, weights=file, out=tmp_path)
    save_file({"text_encoder.layer.lora_A.weight": torch.ones(1)}, tmp_path / "text.safetensors")
    with pytest.raises(ConfigError, match="--weights"):
        sampling.main(config, weights=tmp_path / "text.safetensors", out=tmp_path)
