"""Latents and images equal those of diffusers' autoencoder on tiny random models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fasttune.errors import ModelError
from fasttune.models import autoencoder

CPU = torch.device("cpu")


def images(height: int = 48, width: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("bundle", ["tiny_sdxl", "tiny_flux", "tiny_sd1"])
def test_moments_and_images_as_diffusers(bundle: str, request: pytest.FixtureRequest) -> None:
    from diffusers import AutoencoderKL
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image

    folder = request.getfixturevalue(bundle)
    reference = AutoencoderKL.from_pretrained(folder / "vae").eval()
    scale, shift = reference.config.scaling_factor, reference.config.shift_factor or 0.0
    processor = VaeImageProcessor(vae_scale_factor=8)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images()]
    with torch.no_grad():
        posterior = reference.encode(processor.preprocess(pictures)).latent_dist
        latents = (posterior.mean - shift) * scale
        decoded = reference.decode(latents / scale + shift).sample
    expected = processor.postprocess(decoded, output_type="np")

    vae = autoencoder.load_autoencoder(folder, device=CPU, dtype=torch.float32)
    mean, std = autoencoder.encode_moments(vae, images())
    assert mean.shape == (2, reference.config.latent_channels, 6, 8)
    torch.testing.assert_close(mean, latents, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(std, posterior.std * scale, rtol=1e-6, atol=1e-6)
    ours = autoencoder.decode(vae, mean)
    assert ours.dtype == torch.uint8
    # diffusers rounds the same numbers; one level apart where a sum in another order rounds over
    difference = ours.permute(0, 2, 3, 1).float() - torch.from_numpy(expected * 255).round()
    assert difference.abs().max() <= 1
    assert difference.abs().mean() < 1e-3


def test_fp16_is_refused_for_an_autoencoder_that_overflows(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_sdxl / "vae", folder / "vae")
    load = autoencoder.load_autoencoder
    assert load(folder, device=CPU, dtype=torch.float16).dtype == torch.float32
    assert load(folder, device=CPU, dtype=torch.bfloat16).dtype == torch.bfloat16
    config = json.loads((folder / "vae" / "config.json").read_text())
    for value, dtype in ((None, torch.float32), (False, torch.float16)):
        config.pop("force_upcast")
        if value is not None:
            config["force_upcast"] = value
        (folder / "vae" / "config.json").write_text(json.dumps(config))
        assert load(folder, device=CPU, dtype=torch.float16).dtype == dtype
        config["force_upcast"] = True


def test_bf16_moments_are_near_fp32(tiny_sdxl: Path) -> None:
    moments = [
        autoencoder.encode_moments(
            autoencoder.load_autoencoder(tiny_sdxl, device=CPU, dtype=dtype), images()
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for exact, rounded in zip(*moments, strict=True):
        assert rounded.dtype == torch.float32
        assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_pixels_are_the_latents_of_the_autoencoder_family() -> None:
    pixels, std = autoencoder.encode_pixels(images())
    assert pixels.shape == std.shape == (2, 3, 48, 64)
    assert torch.equal(((pixels + 1) * 127.5).round().to(torch.uint8), images())
    assert pixels.min() == -1 and pixels.max() == 1
    assert not std.any()


def test_predict_reconstructs_with_the_posterior(tiny_sdxl: Path) -> None:
    from diffusers import AutoencoderKL

    spec = autoencoder.AUTOENCODER
    config = AutoencoderKL.load_config(tiny_sdxl / "vae")
    assert spec.latent_multiple(config) == 8
    network = spec.build(config)
    weights = autoencoder.load_autoencoder(tiny_sdxl, device=CPU, dtype=torch.float32).state_dict()
    network.load_state_dict(weights)
    pixels, _ = autoencoder.encode_pixels(images())
    unused = torch.zeros(2)
    torch.manual_seed(3)
    reconstruction, mean, logvar = autoencoder.predict(network, pixels, unused, {}, unused, unused)
    torch.manual_seed(3)
    with torch.no_grad():
        posterior = network.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        expected = network.decode(latents).sample
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(logvar, posterior.logvar)
    torch.testing.assert_close(reconstruction, expected, rtol=1e-5, atol=1e-5)
    (reconstruction - pixels).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.encoder.parameters())


def test_a_missing_or_damaged_autoencoder_is_named(tiny_sdxl: Path, tmp_path: Path) -> None:
    def load() -> None:
        autoencoder.load_autoencoder(tmp_path, device=CPU, dtype=torch.float32)

    with pytest.raises(ModelError, match="vae: no autoencoder"):
        load()
    shutil.copytree(tiny_sdxl / "vae", tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    lost = tensors.pop("decoder.conv_out.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="decoder.conv_out.weight"):
        load()
    wrong = {**tensors, "decoder.conv_out.weight": lost[:, :-1].contiguous()}
    save_file(wrong, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="vae"):
        load()
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ModelError, match="vae"):
        load()
