"""What `prepare` costs over bare decoding, resizing and encoding, and how much memory it takes.

    python -m benchmarks.foundation.prepare_speed [--images 96] [--rounds 4] [--memory-images 10000]

Speed: the same JPEGs through `prepare` (A) and through a plain loop of Pillow and the same autoencoder (B),
interleaved ABBA, a fresh cache each time. One JSON row a run, then mean and standard deviation of
both and the ratio of the means, in wall and in CPU seconds (which a busy machine changes less). The autoencoder is a small random one, opened before the clock starts.
Memory: peak resident memory of a process that prepares many images with an encoder that
costs nothing, less what it had before; the models come on top.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, environment

RESOLUTION = 256
MULTIPLE = 32
BATCH = 4


def write_images(folder: Path, count: int, size: tuple[int, int]) -> None:
    """JPEGs of smooth noise, which compresses about as photographs do."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    for index in range(count):
        rng = np.random.default_rng(index)
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype="u1"))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index}.jpg", quality=90)


def run_prepare(images: Path, cache: Path, encode: Callable[..., Any], workers: int = 0) -> None:
    """`prepare` with this encoder, and no text."""
    from fasttune.config import Cache, Config, Data, Model, Run
    from fasttune.data.encode import Encoders
    from fasttune.prepare import Model as Frozen
    from fasttune.prepare import prepare

    encoders = Encoders(
        image_identity="benchmark",
        text_identity="",
        open_autoencoder=lambda: encode,
        open_text=(),
        merge_text=lambda parts: {},
        empty_caption_is_zero=False,
        text_storage="fp32",
    )
    config = Config(
        run=Run(device="cpu"),
        model=Model(family="sdxl", path="benchmark"),
        data=(Data(path=str(images), captions="filename", resolution=RESOLUTION),),
        cache=Cache(dir=str(cache), batch_size=BATCH, workers=workers),
    )
    prepared = prepare(config, model=Frozen(folder=ROOT, multiple=MULTIPLE, encoders=encoders))
    prepared.cache.close()


def run_loop(images: Path, encode: Callable[..., Any]) -> None:
    """The least that must be done: decode, resize and crop, encode; nothing is kept."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    from fasttune.data.buckets import make_buckets

    buckets = make_buckets(
        resolution=RESOLUTION, resolution_type="area", multiple=MULTIPLE, max_aspect=2.0
    )
    pending = []
    for path in sorted(images.iterdir()):
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        size = buckets.nearest(*image.size)
        fitted = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        pending.append(torch.from_numpy(np.array(fitted)).permute(2, 0, 1))
        if len(pending) == BATCH:
            encode(torch.stack(pending))
            pending.clear()
    if pending:
        encode(torch.stack(pending))


def small_autoencoder() -> Callable[..., Any]:
    """A random autoencoder with SD's four levels and a quarter of its width or less."""
    import torch
    from diffusers import AutoencoderKL

    from fasttune.models.autoencoder import encode_moments

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=4,
    )
    return lambda images: encode_moments(vae.eval(), images)


def measure_speed(folder: Path, count: int, rounds: int) -> list[dict[str, float | str]]:
    import torch

    images = folder / "images"
    write_images(images, count, (1024, 768))
    encode = small_autoencoder()
    run_loop(images, encode)  # warm-up
    run_prepare(images, folder / "warm", encode)
    rows: list[dict[str, float | str]] = []
    for number in range(rounds):
        for kind in ("prepare", "loop") if number % 2 == 0 else ("loop", "prepare"):
            begin, cpu = time.perf_counter(), time.process_time()
            if kind == "prepare":
                run_prepare(images, folder / f"cache{number}", encode)
            else:
                run_loop(images, encode)
            row = {"round": number, "kind": kind}
            row |= {"seconds": round(time.perf_counter() - begin, 3)}
            row |= {"cpu_seconds": round(time.process_time() - cpu, 3)}
            row |= {"images": count, "torch_threads": torch.get_num_threads()}
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def measure_memory(folder: Path) -> dict[str, float]:
    """In this process; the folder holds the images."""
    import torch

    import fasttune.prepare  # noqa: F401  # its memory is not that of the run

    def encode(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = torch.nn.functional.avg_pool2d(images.float(), 8)
        latents = torch.cat([pooled] * 6, dim=1)[:, :16]
        return latents, latents

    before = memory_mib("VmRSS")
    run_prepare(folder / "images", folder / "cache", encode)
    return {"before_mib": before, "peak_mib": memory_mib("VmHWM")}


def memory_mib(field: str) -> int:
    """A figure of this process as Linux keeps it; ru_maxrss would be that of the parent at least."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--memory-images", type=int, default=10_000)
    parser.add_argument("--memory-folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_folder:
        print(json.dumps(measure_memory(args.memory_folder)))
        return
    with tempfile.TemporaryDirectory(prefix="prepare-speed-") as name:
        folder = Path(name)
        rows = measure_speed(folder / "speed", args.images, args.rounds)
        if args.memory_images:
            write_images(folder / "memory" / "images", args.memory_images, (384, 288))
            command = [sys.executable, __file__, "--memory-folder", str(folder / "memory")]
            output = subprocess.run(
                command, check=True, capture_output=True, text=True, env=environment()
            ).stdout
            memory = {"kind": "memory", "images": args.memory_images, **json.loads(output)}
            print(json.dumps(memory))
    means, cpu_means = {}, {}
    print("\nkind     mean s  std s  images/s  CPU s")
    for kind in ("prepare", "loop"):
        seconds = [float(row["seconds"]) for row in rows if row["kind"] == kind]
        means[kind] = statistics.mean(seconds)
        spread = statistics.stdev(seconds) if len(seconds) > 1 else 0.0
        cpu_means[kind] = statistics.mean(
            float(r["cpu_seconds"]) for r in rows if r["kind"] == kind
        )
        rate = args.images / means[kind]
        print(f"{kind:8} {means[kind]:6.2f}  {spread:5.2f}  {rate:8.1f}  {cpu_means[kind]:5.2f}")
    print(f"prepare / loop = {means['prepare'] / means['loop']:.3f}", end="")
    print(f", in CPU seconds {cpu_means['prepare'] / cpu_means['loop']:.3f}")
    if args.memory_images:
        used = memory["peak_mib"] - memory["before_mib"]
        print(f"memory of {args.memory_images} images: {used} MiB beyond the process itself")


if __name__ == "__main__":
    main()
