"""Makes the tiny SDXL model of the quickstart from the photographs beside this file.

    python configs/quickstart/make.py

Run it in the root of the repository. Five stages, in this order:

1. tokenizers, configs and random weights of the text encoders     -> configs/quickstart/model
2. training images: regions of the photographs, for the U-Net with their captions and for the
   autoencoder changed in colour    -> cache/quickstart-crops, cache/quickstart-patches
3. text encoders: a contrastive objective between captions and crops, in this file
4. autoencoder: `fasttune train configs/tiny-vae.toml`, then its latents get unit variance
5. U-Net: `fasttune train configs/tiny-sdxl.toml`

Stages 1 to 3 take about a minute and are repeated by each start with the same result. Stages 4 and
5 take most of the time; a run that was interrupted is resumed from its newest checkpoint, and a run
that is complete is not repeated. `--fresh` starts all over.

The committed weights were made by these stages, with two differences from one run from start to end:
the U-Net was stopped at step 3310 of a planned 10000 and resumed with 7000, and the trainer's seeds of
the noise inside the autoencoder were changed afterwards. A new run makes a model of the same kind, not
the same bits.

The photographs of the subject (subject/, subject-held-out/) are used in no stage: the autoencoder's
PSNR on them, printed at the end, is on images it has not seen.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

HERE = Path("configs/quickstart")
MODEL = HERE / "model"
CROPS = Path("cache/quickstart-crops")
PATCHES = Path("cache/quickstart-patches")
PATCHES_OF_SIDE = {64: 3200, 96: 800}
SEED = 0
WEIGHTS = "diffusion_pytorch_model.safetensors"
CROPS_PER_PHOTO = 32
WIDTHS = (64, 96)  # of the two text encoders
START, END = "<|startoftext|>", "<|endoftext|>"

# Beside the captions, words of prompts that a newcomer may try: they become single tokens.
WORDS = """
a an the of in on at with and by for from to under over near beside behind between among into through
photo picture image close up portrait painting drawing sketch watercolor black white color colorful
red orange yellow green blue purple pink brown grey golden silver dark light bright pale striped spotted
cat cats kitten tabby ginger dog dogs puppy horse bird eagle raccoon fox rabbit mouse lion tiger bear wolf
fish frog cow sheep goat duck owl animal animals fur whiskers ear ears eye eyes nose paw tail face head
man woman boy girl child person people portrait smiling looking sitting standing lying sleeping running
chelsea astronaut cameraman rocket shuttle space suit helmet flag moon sun star stars galaxy galaxies sky
cup coffee tea table wooden saucer spoon plate bowl bread fruit apple lemon food glass bottle kitchen
flower flowers tulip tulips rose blossom cherry garden leaf leaves grass tree trees branch forest plant
sea lake river water beach coast cliff rock rocks stone stones gravel sand hill mountain mountains valley
snow rain fog cloud clouds night evening morning day summer winter autumn spring field road path bridge
house wall brick bricks window door room chair sofa bed city street car train boat bicycle tower camera
tripod retina blood vessels stems small large big little old young new soft sharp detailed beautiful
"""


def write_tokenizers(captions: list[str]) -> int:
    """CLIP's byte-pair encoding with a small vocabulary, learned from captions and WORDS; any text
    falls back to bytes. The same tokenizer serves both encoders. Returns the vocabulary's size."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator([*captions, *WORDS.split()], trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    # CLIP's order: every byte, every byte at the end of a word, merges by rank, the two marks.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(c + "</w>" for c in letters), *("".join(pair) for pair in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    for suffix in ("", "_2"):
        folder = MODEL / f"tokenizer{suffix}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
        marks = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
        write_json(folder / "special_tokens_map.json", marks)
        write_json(
            folder / "tokenizer_config.json",
            {**marks, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77},
        )
    return len(vocab)


def write_configs() -> None:
    """The configs of the networks that fasttune trains, the scheduler and the index."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=96,
        mid_block_add_attention=False,
        scaling_factor=1.0,  # standardise_latents sees to it
        force_upcast=False,  # its activations stay far below fp16's range
    )
    vae.save_config(MODEL / "vae")
    unet = UNet2DConditionModel(
        sample_size=24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(1, 2, 4),  # diffusers' name for the number of heads
        cross_attention_dim=sum(WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTHS[1] + 6 * 8,
        use_linear_projection=True,
        norm_num_groups=16,
    )
    unet.save_config(MODEL / "unet")
    EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        prediction_type="epsilon",
    ).save_config(MODEL / "scheduler")
    write_json(
        MODEL / "model_index.json",
        {
            "_class_name": "StableDiffusionXLPipeline",
            "_diffusers_version": "0.36.0",
            "add_watermarker": False,
            "force_zeros_for_empty_prompt": True,
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def cut_crops() -> None:
    """Random regions of the photographs, each with its photograph's caption.

    The files differ in size and shape whatever they show, so that the U-Net does not learn to tell
    photographs apart by SDXL's size conditioning, and accepts any size later.
    """
    shutil.rmtree(CROPS, ignore_errors=True)
    CROPS.mkdir(parents=True)
    rng = random.Random(SEED)
    for path in sorted((HERE / "photos").glob("*.jpg")):
        photo = Image.open(path).convert("RGB")
        caption = path.with_suffix(".txt").read_text("utf-8").strip()
        for i in range(CROPS_PER_PHOTO):
            short = rng.uniform(0.7, 1.0) * min(photo.size)
            width = min(photo.width, short * rng.uniform(1.0, 1.15))
            height = min(photo.height, short * rng.uniform(1.0, 1.15))
            left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
            scale = rng.uniform(96, 224) / min(width, height)
            size = (max(96, round(width * scale)), max(96, round(height * scale)))
            crop = photo.resize(
                size, Image.Resampling.LANCZOS, (left, top, left + width, top + height)
            )
            crop.save(CROPS / f"{path.stem}-{i:02}.png")
            words = caption if rng.random() < 0.7 else re.sub(r"^.*photo of ", "", caption)
            (CROPS / f"{path.stem}-{i:02}.txt").write_text(words + "\n", "utf-8")


def cut_patches() -> None:
    """What the autoencoder is trained on: squares of any size cut from the photographs, turned,
    mirrored, and changed in colour.

    A dozen photographs hold few colours, and an autoencoder that has seen no others reproduces no
    others.
    """
    shutil.rmtree(PATCHES, ignore_errors=True)
    rng = random.Random(SEED)
    photos = [Image.open(path).convert("RGB") for path in sorted((HERE / "photos").glob("*.jpg"))]
    for side, count in PATCHES_OF_SIDE.items():
        folder = PATCHES / str(side)
        folder.mkdir(parents=True)
        for i in range(count):
            photo = photos[i % len(photos)]
            cut = rng.uniform(48, min(photo.size))
            left, top = rng.uniform(0, photo.width - cut), rng.uniform(0, photo.height - cut)
            box = (left, top, left + cut, top + cut)
            patch = photo.resize((side, side), Image.Resampling.LANCZOS, box)
            pixels = np.rot90(np.asarray(patch) / 255, rng.randrange(4))
            if rng.random() < 0.5:
                pixels = pixels[:, ::-1]
            if rng.random() < 0.7:  # any order of red, green and blue
                pixels = pixels[..., rng.sample(range(3), 3)]
            if rng.random() < 0.2:
                pixels = 1 - pixels
            mean = pixels.mean(axis=(0, 1))
            contrast = [rng.uniform(0.4, 1.2) for _ in range(3)]
            if rng.random() < 0.5:
                contrast = contrast[:1] * 3
            brightness = [rng.uniform(-0.25, 0.25) for _ in range(3)]
            pixels = ((pixels - mean) * contrast + mean + brightness).clip(0, 1) * 255
            Image.fromarray(pixels.round().astype(np.uint8)).save(folder / f"{i:04}.png")


class ImageTower(nn.Sequential):
    """Stands beside the text encoders while they learn, and is thrown away: images -> vectors."""

    def __init__(self, width: int) -> None:
        channels = (3, 16, 32, 64, 96)
        layers: list[nn.Module] = []
        for i, o in zip(channels, channels[1:], strict=False):
            layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.GroupNorm(8, o), nn.SiLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(384, width))


def train_text_encoders(vocab_size: int, *, steps: int = 400, batch_size: int = 24) -> None:
    """Contrastive learning (arXiv 2103.00020) of both encoders on the crops, beside one small image
    tower. Words are left out at random, so that single ones come to stand for what is seen.

    It teaches them the words of the photographs' captions and no others: every other token keeps
    its random embedding, which is what the subject's words are for the quickstart.
    """
    torch.manual_seed(SEED)
    rng = random.Random(SEED)

    def config(width: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=3,
            num_attention_heads=width // 32,
            projection_dim=width,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
        )

    first, second = (
        CLIPTextModel(config(WIDTHS[0])),
        CLIPTextModelWithProjection(config(WIDTHS[1])),
    )
    for encoder in (first, second):  # CLIP's 0.02 is for widths of 512 and more
        for name, weight in encoder.named_parameters():
            if "token_embedding" in name:
                nn.init.normal_(weight, std=0.5)
            elif "position_embedding" in name:
                nn.init.normal_(weight, std=0.1)
    tower, head = ImageTower(sum(WIDTHS)), nn.Linear(WIDTHS[0], WIDTHS[0])
    scale = nn.Parameter(torch.tensor(2.0))
    modules = nn.ModuleList([first, second, tower, head])
    optimizer = torch.optim.AdamW([*modules.parameters(), scale], lr=1e-3, weight_decay=0.01)
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    by_photo: dict[str, list[tuple[Tensor, str]]] = {}
    for path in sorted(CROPS.glob("*.png")):
        image = Image.open(path).convert("RGB").resize((48, 48), Image.Resampling.BOX)
        caption = path.with_suffix(".txt").read_text("utf-8").strip()
        by_photo.setdefault(path.stem[:-3], []).append((pixels_of(image), caption))

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50) * (1 - step / steps)
        chosen = [rng.choice(by_photo[name]) for name in rng.sample(sorted(by_photo), batch_size)]
        captions = []
        for _, caption in chosen:
            words = caption.split()
            kept = [word for word in words if rng.random() < 0.75]
            captions.append(" ".join(kept or words))
        ids = tokenizer(captions, padding="longest", return_tensors="pt").input_ids
        text = torch.cat([head(first(ids).pooler_output), second(ids).text_embeds], dim=-1)
        image = tower(torch.stack([pixels for pixels, _ in chosen]))
        logits = F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T * scale.exp()
        target = torch.arange(batch_size)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            right = (logits.argmax(1) == target).float().mean()
            say(f"text encoders: step {step + 1}, loss {loss:.3f}, right image {right:.0%}")
    first.half().save_pretrained(MODEL / "text_encoder")
    second.half().save_pretrained(MODEL / "text_encoder_2")


def train(config: str, *, fresh: bool) -> Path:
    """Runs `fasttune train` unless it is complete; returns the exported network's folder."""
    name = Path(config).stem
    run = Path("runs") / name
    if fresh:
        shutil.rmtree(run, ignore_errors=True)
    exported = run / "weights" / name
    if not exported.is_dir():
        command = [sys.executable, "-m", "fasttune", "train", config]
        if any((run / "checkpoints").glob("step-*")):
            command += ["--resume", "latest"]
        elif run.exists():  # stopped before its first checkpoint
            shutil.rmtree(run)
        say(" ".join(command[1:]))
        subprocess.run(command, check=True)
    return exported


def install(exported: Path, component: str) -> None:
    """Takes the trained weights of one component over into the model folder."""
    shutil.copyfile(exported / component / WEIGHTS, MODEL / component / WEIGHTS)


@torch.no_grad()
def standardise_latents() -> Tensor:
    """Gives each latent channel mean 0 and variance 1 on the crops, so that the U-Net's noise levels
    mean the same for all of them; returns the standard deviations as they were.

    The change is exact: it goes into the 1 x 1 convolutions on either side of the latents, and
    scaling_factor is 1.
    """
    vae = AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32)
    latents = torch.cat(
        [
            vae.encode(square(path, 96)[None]).latent_dist.mean
            for path in sorted(CROPS.glob("*.png"))[::7]
        ]
    )
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    encoder, decoder = vae.quant_conv, vae.post_quant_conv
    n = len(mean)
    encoder.weight[:n] /= std[:, None, None, None]
    encoder.bias[:n] = (encoder.bias[:n] - mean) / std
    encoder.bias[n:] -= 2 * std.log()  # log-variances
    decoder.bias += decoder.weight[:, :, 0, 0] @ mean
    decoder.weight *= std[None, :, None, None]
    half = {name: tensor.half().contiguous() for name, tensor in vae.state_dict().items()}
    save_file(half, MODEL / "vae" / WEIGHTS, metadata={"format": "pt"})
    return std


@torch.no_grad()
def psnr(paths: list[Path], side: int = 128) -> list[float]:
    """Reconstruction of each image, cut square and scaled to `side` pixels, by the mean latents; dB
    relative to the whole range of pixel values."""
    vae = AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32)
    result = []
    for path in paths:
        image = square(path, side)[None]
        back = vae.decode(vae.encode(image).latent_dist.mean).sample.clamp(-1, 1)
        result.append(-10 * float(torch.log10(((back - image) / 2).square().mean())))
    return result


def square(path: Path, side: int) -> Tensor:
    """The image's centre square at `side` pixels: (3, side, side) in [-1, 1]."""
    image = Image.open(path).convert("RGB")
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    box = (left, top, left + short, top + short)
    return pixels_of(image.resize((side, side), Image.Resampling.LANCZOS, box))


def pixels_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def sizes() -> Iterator[tuple[str, int]]:
    """(component, bytes of its folder) of the model."""
    for folder in sorted(path for path in MODEL.iterdir() if path.is_dir()):
        yield folder.name, sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--fresh", action="store_true", help="do not resume earlier runs")
    fresh = parser.parse_args().fresh
    if not HERE.is_dir():
        parser.error(f"run it in the root of the repository; {HERE} is not here")
    captions = [p.read_text("utf-8").strip() for p in sorted(HERE.glob("photos/*.txt"))]
    vocab_size = write_tokenizers(captions)
    say(f"tokenizers: {vocab_size} tokens")
    write_configs()
    cut_crops()
    cut_patches()
    train_text_encoders(vocab_size)

    install(train("configs/tiny-vae.toml", fresh=fresh), "vae")
    before = ", ".join(f"{std:.2f}" for std in standardise_latents().tolist())
    say(f"autoencoder: standard deviations of the latents were {before}, and are 1 now")
    install(train("configs/tiny-sdxl.toml", fresh=fresh), "unet")

    unseen = sorted([*HERE.glob("subject/*.jpg"), *HERE.glob("subject-held-out/*.jpg")])
    decibels = psnr(unseen)
    say(
        f"PSNR on {len(unseen)} unseen images: mean {np.mean(decibels):.2f} dB, "
        f"lowest {min(decibels):.2f} dB (wanted: 24)"
    )
    for name, size in sizes():
        say(f"{name:16} {size / 2**20:6.2f} MiB")
    say(f"{'together':16} {sum(size for _, size in sizes()) / 2**20:6.2f} MiB (at most 16)")


if __name__ == "__main__":
    main()
