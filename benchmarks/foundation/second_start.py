"""How long a start takes when nothing has changed: 100,000 small files with captions.

    python -m benchmarks.foundation.second_start [--files 100000] [--folder /tmp/second-start] [--starts 3]

Writes the files (8 x 8 PNGs, a .txt each, 1000 a folder) if they are not there, prepares them once with
encoders that cost nothing, then starts again `--starts` times, each in a new process. One JSON row
a start: wall seconds of the whole process and of `prepare` alone, CPU seconds of the latter
(what a busy machine does not change), peak memory. No model is loaded and no
image opened in those. The page cache is warm.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import ROOT, environment


def write_files(folder: Path, count: int) -> None:
    """Images 8 x 8 of one colour each."""
    import io

    from PIL import Image

    for index in range(count):
        inside = folder / f"{index // 1000:03d}"
        if index % 1000 == 0:
            inside.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (index % 256, index // 256 % 256, 0)).save(buffer, "PNG")
        (inside / f"{index}.png").write_bytes(buffer.getvalue())
        (inside / f"{index}.txt").write_text(f"an image of colour {index}\n")


def start(images: Path, cache: Path) -> dict[str, float | int | str]:
    """One `prepare` in this process."""
    import torch

    from fasttune.config import Cache, Config, Data, Model, Run
    from fasttune.data.encode import Encoders
    from fasttune.prepare import Model as Frozen
    from fasttune.prepare import prepare

    def open_autoencoder() -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        return lambda images: (images.float(), images.float())

    def open_text() -> Callable[[list[str]], dict[str, torch.Tensor]]:
        return lambda captions: {"text_embeddings": torch.zeros(len(captions), 2, 4)}

    encoders = Encoders(
        image_identity="free",
        text_identity="free",
        open_autoencoder=open_autoencoder,
        open_text=(open_text, open_text),
        merge_text=lambda parts: parts[0],
        empty_caption_is_zero=False,
        text_storage="fp32",
    )
    config = Config(
        run=Run(device="cpu"),
        model=Model(family="sdxl", path="free"),
        data=(Data(path=str(images), resolution=8),),
        cache=Cache(dir=str(cache), batch_size=64),
    )
    begin, cpu = time.perf_counter(), time.process_time()
    prepared = prepare(config, model=Frozen(folder=ROOT, multiple=8, encoders=encoders))
    return {
        "prepare_seconds": round(time.perf_counter() - begin, 2),
        "prepare_cpu_seconds": round(time.process_time() - cpu, 2),
        "encoded": prepared.summary.num_encoded_images,
        "samples": len(prepared.train),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(start(args.folder / "images", args.folder / "cache")))
        return
    folder = args.folder or Path(tempfile.mkdtemp(prefix="second-start-"))
    if not (folder / "images").exists():
        write_files(folder / "images", args.files)
    rows = []
    for number in range(1 + args.starts):
        begin = time.perf_counter()
        command = [sys.executable, __file__, "--once", "--folder", str(folder)]
        output = subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment()
        ).stdout
        wall = round(time.perf_counter() - begin, 2)
        rows.append({"start": number + 1, "wall_seconds": wall, **json.loads(output)})
        print(json.dumps(rows[-1]), flush=True)
    print("\nstart  wall s  prepare s  CPU s  encoded  samples  peak MiB")
    for row in rows:
        numbers = (
            row["start"],
            row["wall_seconds"],
            row["prepare_seconds"],
            row["prepare_cpu_seconds"],
        )
        counts = (row["encoded"], row["samples"], row["peak_mib"])
        print("{:5}  {:6}  {:9}  {:5}  {:7}  {:7}  {:8}".format(*numbers, *counts))


if __name__ == "__main__":
    main()
