"""Loading a 5 GB network: peak anonymous host memory and time, ours beside diffusers'.

    python -m benchmarks.foundation.load_memory [--folder FOLDER] [--pairs 2]
        [--config benchmarks/models/sdxl/unet/config.json]

Writes a U-Net of SDXL's real size with random bfloat16 weights, in four shards, tensor by tensor with
our own writer, then loads it in processes of their own: ours, theirs, theirs, ours. A thread reads
RssAnon of /proc/self/status every 10 ms: private memory that no file backs, which is what a
machine runs out of. The interpreter and its imports are in it; `anon_before_gib` says how much.
Beside it stands the peak of the whole resident set, mapped files included.

diffusers maps the files and reads nothing, ours copies; so two more numbers, taken after the load, say
what the mapping costs later: the time to read every weight once (`read_s`), and time and memory to
write to every weight once (`write_s`, `peak_anon_private_gib`), as training the whole network does.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, collect, emit

SDXL = ROOT / "benchmarks" / "models" / "sdxl" / "unet" / "config.json"
SHARDS = 4
INTERVAL_S = 0.01
GIB = 2**30


class Memory:
    """Peaks of this process's memory, read by a thread. Linux only."""

    def __init__(self) -> None:
        self.before = resident()
        self.peak = dict(self.before)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.samples = 0

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._sample()

    def _sample(self) -> None:
        self.samples += 1
        for key, value in resident().items():
            self.peak[key] = max(self.peak[key], value)


def resident() -> dict[str, int]:
    """Bytes of anonymous ("anon") and of all ("rss") resident memory of this process."""
    names = {"RssAnon": "anon", "VmRSS": "rss"}
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {names[key]: int(value.split()[0]) * 1024 for key, value in pairs if key in names}


def write_model(folder: Path, config: Path) -> int:
    """`folder`/unet with random bfloat16 weights; bytes of all tensors."""
    import torch

    from fasttune.models import MODELS
    from fasttune.models.weights import INDEX, WEIGHTS, build_on_meta
    from fasttune.tensor_files import LazyTensor, write_tensors

    unet = folder / "unet"
    unet.mkdir(parents=True)
    (unet / "config.json").write_text(config.read_text())
    shapes = {
        name: tuple(p.shape) for name, p in build_on_meta(MODELS["sdxl"], folder).named_parameters()
    }
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02, generator=generator)

    tensors = {
        name: LazyTensor(shape, torch.bfloat16, lambda shape=shape: draw(shape))  # type: ignore[misc]
        for name, shape in shapes.items()
    }
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_shards({n: t.num_bytes for n, t in tensors.items()})):
        file = WEIGHTS.replace(".safetensors", f"-{number + 1:05d}-of-{SHARDS:05d}.safetensors")
        write_tensors(unet / file, {name: tensors[name] for name in names}, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(tensor.num_bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (unet / INDEX).write_text(json.dumps(index))
    return total


def _shards(sizes: dict[str, int]) -> list[list[str]]:
    """Names in order, cut into SHARDS groups of about equal size."""
    groups: list[list[str]] = [[] for _ in range(SHARDS)]
    total, seen = sum(sizes.values()), 0
    for name, size in sizes.items():
        groups[min(seen * SHARDS // total, SHARDS - 1)].append(name)
        seen += size
    return groups


def load(which: str, folder: Path) -> None:
    """In the child: one load, measured."""
    import torch

    if which == "fasttune":
        from fasttune.models import MODELS
        from fasttune.models.weights import load_denoiser

        device = torch.device("cpu")
        with Memory() as memory:
            begin = time.perf_counter(), time.process_time()
            network = load_denoiser(MODELS["sdxl"], folder, dtype=torch.bfloat16, device=device)
            load_s, load_cpu_s = since(begin)
    else:
        from diffusers import UNet2DConditionModel

        with Memory() as memory:
            begin = time.perf_counter(), time.process_time()
            network = UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.bfloat16)
            load_s, load_cpu_s = since(begin)
    begin = time.perf_counter(), time.process_time()
    checksum = read_all(network.parameters())
    read_s, _ = since(begin)
    begin = time.perf_counter(), time.process_time()
    with torch.no_grad(), Memory() as private:
        for parameter in network.parameters():
            parameter.mul_(1)  # makes pages that are mapped from a file private
    write_s, _ = since(begin)
    emit(
        "",
        load_s=round(load_s, 2),
        load_cpu_s=round(load_cpu_s, 2),
        read_s=round(read_s, 2),
        write_s=round(write_s, 2),
        checksum=checksum,
        anon_before_gib=round(memory.before["anon"] / GIB, 3),
        peak_anon_gib=round(memory.peak["anon"] / GIB, 3),
        peak_rss_gib=round(memory.peak["rss"] / GIB, 3),
        peak_anon_private_gib=round(private.peak["anon"] / GIB, 3),
        samples=memory.samples,
    )


def since(begin: tuple[float, float]) -> tuple[float, float]:
    """Seconds of wall time and of processor time."""
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def read_all(tensors: Iterable[Any]) -> float:
    """Sum over every element, so that all pages are read, and to see that the loaders agree.

    Each tensor in its own dtype: a sum in float64 makes a wide copy, whose page faults took 5 s.
    """
    return float(sum(tensor.detach().sum().double() for tensor in tensors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where 5 GB fit; default: the temporary folder")
    parser.add_argument("--config", type=Path, default=SDXL)
    parser.add_argument("--pairs", type=int, default=2, help="loads by each")
    parser.add_argument("--load", choices=("fasttune", "diffusers"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(args.load, args.folder)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary) / "model"
        num_bytes = write_model(folder, args.config)
        found: dict[str, list[dict[str, Any]]] = {"fasttune": [], "diffusers": []}
        for path in sorted((folder / "unet").iterdir()):  # into the page cache, for both alike
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass
        for pair in range(args.pairs):
            for which in list(found)[:: 1 if pair % 2 == 0 else -1]:
                child = [sys.executable, __file__, "--load", which, "--folder", str(folder)]
                found[which] += collect(child)
    checksums = {row["checksum"] for rows in found.values() for row in rows}
    if len(checksums) != 1:
        raise RuntimeError(f"the loaders disagree about the weights: {checksums}")
    for which, rows in found.items():
        worst = max(rows, key=lambda row: row["peak_anon_gib"])
        emit(
            f"load 5 GB: {which}",
            model_gib=round(num_bytes / GIB, 3),
            peak_anon_ratio=round(worst["peak_anon_gib"] * GIB / num_bytes, 3),
            **{key: value for key, value in worst.items() if key not in ("measurement", "load_s")},
            load_s=[row["load_s"] for row in rows],
        )


if __name__ == "__main__":
    main()
