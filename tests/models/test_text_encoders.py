"""Text embeddings equal those of the diffusers pipelines on tiny random models."""

import gc
import logging
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttune.errors import ModelError
from fasttune.models import text_encoders

CPU = torch.device("cpu")
CAPTIONS = ["a photo of the cat", "", "Ein Café, 2 zebras & the dog!\nnew line", "word " * 90]


def encode(
    openers: list[Callable[[], Any]], merge: Callable[..., dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    return merge([opener()(CAPTIONS) for opener in openers])


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bundle", ["tiny_sd1", "tiny_sd2"])
@torch.no_grad()
def test_clip_as_stable_diffusion(bundle: str, request: pytest.FixtureRequest) -> None:
    from diffusers import StableDiffusionPipeline

    folder = request.getfixturevalue(bundle)
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    theirs, _ = pipe.encode_prompt(CAPTIONS, CPU, 1, False)
    openers = text_encoders.open_clip(folder, CPU, torch.float32)
    ours = encode(openers, text_encoders.merge_clip)
    assert set(ours) == {"text_embeddings"}
    close(ours["text_embeddings"], theirs)


@torch.no_grad()
def test_sdxl(tiny_sdxl: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    theirs, _, pooled, _ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    openers = text_encoders.open_sdxl(tiny_sdxl, CPU, torch.float32)
    assert len(openers) == 2
    ours = encode(openers, text_encoders.merge_sdxl)
    assert set(ours) == {"text_embeddings", "pooled_text_embeddings"}
    close(ours["text_embeddings"], theirs)
    close(ours["pooled_text_embeddings"], pooled)
    # captions differ from each other, so that the comparison can fail
    assert (ours["pooled_text_embeddings"][0] - ours["pooled_text_embeddings"][2]).abs().max() > 0.1


@pytest.mark.parametrize("max_length", [512, 64])
@torch.no_grad()
def test_flux(tiny_flux: Path, max_length: int) -> None:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(tiny_flux)
    theirs, pooled, _ = pipe.encode_prompt(CAPTIONS, max_sequence_length=max_length)
    openers = text_encoders.open_flux(tiny_flux, CPU, torch.float32, max_length=max_length)
    ours = encode(openers, text_encoders.merge_flux)
    assert set(ours) == {"text_embeddings", "pooled_text_embeddings", "text_mask"}
    close(ours["text_embeddings"], theirs)
    close(ours["pooled_text_embeddings"], pooled)
    lengths = [min(len(ids), max_length) for ids in pipe.tokenizer_2(CAPTIONS).input_ids]
    expected = torch.arange(max_length) < torch.tensor(lengths)[:, None]
    assert torch.equal(ours["text_mask"], expected)


def test_flux_length_follows_the_model(tiny_flux: Path, tiny_models: Any, tmp_path: Path) -> None:
    schnell = tiny_models.write_tiny_flux(tmp_path / "schnell", guidance=False)
    for folder, length in ((tiny_flux, 512), (schnell, 256)):
        _, open_t5 = text_encoders.open_flux(folder, CPU, torch.float32)
        assert open_t5()(["a cat"])["text_embeddings"].shape == (1, length, 32)


@torch.no_grad()
def test_bf16_as_the_pipeline_in_bf16(tiny_flux: Path) -> None:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(tiny_flux).to(torch.bfloat16)
    theirs, pooled, _ = pipe.encode_prompt(CAPTIONS, max_sequence_length=64)
    openers = text_encoders.open_flux(tiny_flux, CPU, torch.bfloat16, max_length=64)
    ours = encode(openers, text_encoders.merge_flux)
    assert torch.equal(ours["text_embeddings"], theirs)
    assert torch.equal(ours["pooled_text_embeddings"], pooled)


def test_embeddings_do_not_depend_on_the_batch(tiny_sdxl: Path) -> None:
    (opener, _) = text_encoders.open_sdxl(tiny_sdxl, CPU, torch.float32)
    encode_text = opener()
    together = encode_text(CAPTIONS)["text_embeddings"]
    alone = torch.cat([encode_text([caption])["text_embeddings"] for caption in CAPTIONS])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_truncated_captions_are_logged_once_and_counted(
    tiny_sd1: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (opener,) = text_encoders.open_clip(tiny_sd1, CPU, torch.float32)
    encode_text = opener()
    # 75 tokens and the two special ones fit, one more does not
    with caplog.at_level(logging.WARNING):
        encode_text(["a " * 75])
        assert encode_text.num_truncated == 0
        assert encode_text.truncated == {}
        encode_text(["cat", "a " * 76, "a " * 200])
        tokens = [
            len(encode_text.tokenizer("a " * n, truncation=True, max_length=999).input_ids)
            for n in (76, 200)
        ]
        assert tokens[0] == 78
        assert encode_text.truncated == {
            "a " * n: f"text_encoder (CLIP) reads 77 of its {count} tokens"
            for n, count in zip((76, 200), tokens, strict=True)
        }
        encode_text(["dog " * 100])
        assert list(encode_text.truncated) == ["dog " * 100]
        encode_text(["dog"])
        assert encode_text.truncated == {}
    assert encode_text.num_truncated == 3
    assert [record.args[1:4] for record in caplog.records] == [(77, 2, 3)]


def test_dropping_the_function_frees_the_encoder(tiny_flux: Path) -> None:
    for opener in text_encoders.open_flux(tiny_flux, CPU, torch.float32):
        encode_text = opener()
        encoder = weakref.ref(encode_text.encoder)
        gc.disable()
        try:
            del encode_text
            assert encoder() is None
        finally:
            gc.enable()


@pytest.mark.parametrize("missing", ["text_encoder_2", "tokenizer_2", "text_encoder_2/config.json"])
def test_a_missing_component_is_named(tiny_sdxl: Path, tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_sdxl, folder)
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, opener = text_encoders.open_sdxl(folder, CPU, torch.float32)
    with pytest.raises(ModelError, match=missing.split("/")[0]):
        opener()


def test_damaged_or_incomplete_weights_are_refused(tiny_sdxl: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_sdxl, folder)
    path = folder / "text_encoder" / "model.safetensors"
    opener, _ = text_encoders.open_sdxl(folder, CPU, torch.float32)
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith("layers.1.mlp.fc1.weight"))

    save_file({k: v for k, v in tensors.items() if k != lost}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="layers.1.mlp.fc1.weight"):
        opener()
    wrong = {**tensors, lost: tensors[lost][:, :-1].contiguous()}
    save_file(wrong, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="text_encoder"):
        opener()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="text_encoder"):
        opener()
    path.unlink()
    with pytest.raises(ModelError, match="text_encoder"):
        opener()


def test_half_precision_files_are_found(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_sdxl, folder)
    path = folder / "text_encoder" / "model.safetensors"
    path.rename(path.with_name("model.fp16.safetensors"))
    opener, _ = text_encoders.open_sdxl(folder, CPU, torch.float32)
    assert opener()(["cat"])["text_embeddings"].dtype == torch.float32
