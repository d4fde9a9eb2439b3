"""A tiny SDXL, a folder of images and a config for both: what the loop's benchmarks train.

The images are square and of exactly the training resolution, so that no resampling differs between
trainers; captions are in metadata.jsonl, which fasttune and `datasets` both read.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.tiny_models import write_tiny_sdxl
from fasttune import config as c

RESOLUTION = 128
NUM_IMAGES = 16
RANK = 4


def write_images(folder: Path, *, count: int = NUM_IMAGES, resolution: int = RESOLUTION) -> Path:
    """`count` PNGs (waves, a disc, grain) and metadata.jsonl with their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    y, x = np.mgrid[0:resolution, 0:resolution] / resolution
    for index in range(count):
        rng = np.random.default_rng(index)
        waves = np.sin(2 * np.pi * (x[..., None] * rng.uniform(0, 4, 3) + y[..., None]))
        disc = (x - rng.uniform(0.3, 0.7)) ** 2 + (y - rng.uniform(0.3, 0.7)) ** 2 < 0.05
        pixels = rng.uniform(60, 190, 3) + 50 * waves + 40 * disc[..., None]
        pixels = pixels + rng.normal(0, 6, pixels.shape)
        name = f"{index:03d}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name)
        text = f"a photo of the {('red', 'blue')[index % 2]} cat on table {index}"
        lines.append(json.dumps({"file_name": name, "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_inputs(folder: Path) -> None:
    """`folder`/model and `folder`/images, unless they are there."""
    if not (folder / "images" / "metadata.jsonl").exists():
        write_tiny_sdxl(folder / "model")
        write_images(folder / "images")


def config(
    folder: Path,
    *,
    steps: int,
    batch_size: int = 1,
    lr: float = 1e-4,
    log_every: int = 10,
    name: str = "run",
) -> c.Config:
    """A LoRA in float32 on the attention of the U-Net, without captions dropped, activations
    recomputed, validation or checkpoints before the end: what the diffusers script does."""
    return c.Config(
        run=c.Run(name=name, output_dir=str(folder / "runs"), device="cpu"),
        model=c.Model(family="sdxl", path=str(folder / "model")),
        adapter=c.Adapter(rank=RANK, alpha=float(RANK)),
        precision=c.Precision(base="fp32", compute="fp32"),
        memory=c.Memory(activations="save"),
        data=(
            c.Data(
                path=str(folder / "images"),
                captions="jsonl",
                caption_file="metadata.jsonl",
                caption_column="text",
                resolution=RESOLUTION,
                resolution_type="pixel",
            ),
        ),
        cache=c.Cache(dir=str(folder / "cache"), text_storage="fp32"),
        train=c.Train(steps=steps, batch_size=batch_size, caption_dropout=0.0),
        optimizer=c.Optimizer(lr=lr, weight_decay=1e-2),
        schedule=c.Schedule(name="constant"),
        validation=c.Validation(every=0),
        checkpoint=c.Checkpoint(every=0),
        logging=c.Logging(every=log_every),
    )
