"""Runs the diffusers SDXL LoRA script unchanged in this process, watched, and fed if asked.

Started by against_diffusers.py. The script is read from the path given; nothing of it is kept here.

- watched: the clock stops once a step, where the script logs its loss; the time in which it fetches
  images and runs the autoencoder and the text encoders is summed beside it.
- fed (`--feed FILE`): the first LoRA weights, the samples of each batch, the noise of the latents, the noise
  added to them, and the timesteps come from a safetensors file instead of the script's own generators.
  With `--latents float16` mean and std of the latents are also rounded as fasttune's cache stores them.
"""

import argparse
import os
import runpy
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import emit, spread

WARMUP_STEPS = 10
ENCODING = ("images", "autoencoder", "text encoders")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--begun", type=float, required=True, help="time.time() of the start")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--feed", type=Path)
    parser.add_argument("--latents", choices=("float32", "float16"), default="float32")
    parser.add_argument("arguments", nargs="*", help="of the script, after --")
    args = parser.parse_args()

    from benchmarks.foundation import torchvision_stand_in

    stand_in = torchvision_stand_in.install()
    if args.feed is not None:
        feed(args.feed, half=args.latents == "float16")
    watch(args.steps, args.begun, stand_in)
    warnings.simplefilter("ignore")
    sys.argv = [str(args.script), *args.arguments]
    runpy.run_path(str(args.script), run_name="__main__")
    raise RuntimeError(f"the script ended before step {args.steps}")


def watch(steps: int, begun: float, stand_in: bool) -> None:
    """Prints a row and leaves after the last step: what the script does then is not its step."""
    import torch
    from accelerate import Accelerator
    from diffusers import AutoencoderKL
    from torch.utils.data._utils import fetch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    losses: list[float] = []
    ends: list[float] = []
    cpu: list[float] = []
    inside = dict.fromkeys(ENCODING, 0.0)
    encoding: list[float] = []

    def timed(part: str, owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                inside[part] += time.perf_counter() - begin

        setattr(owner, name, call)

    timed("images", fetch._MapDatasetFetcher, "fetch")
    timed("autoencoder", AutoencoderKL, "encode")
    timed("text encoders", CLIPTextModel, "forward")
    timed("text encoders", CLIPTextModelWithProjection, "forward")
    log = Accelerator.log

    def step_done(self: Accelerator, values: dict[str, float], *args: Any, **kwargs: Any) -> None:
        log(self, values, *args, **kwargs)
        losses.append(values["train_loss"])
        ends.append(time.perf_counter())
        cpu.append(time.process_time())
        encoding.append(sum(inside.values()))
        if len(losses) == steps:
            whole = [1000 * (b - a) for a, b in zip(ends[:-1], ends[1:], strict=True)]
            encode = [1000 * (b - a) for a, b in zip(encoding[:-1], encoding[1:], strict=True)]
            whole, encode = whole[WARMUP_STEPS:], encode[WARMUP_STEPS:]
            rest = [w - e for w, e in zip(whole, encode, strict=True)]
            emit(
                "",
                **spread(whole, "step_ms"),
                **spread(rest, "step_without_encoding_ms"),
                mean_step_cpu_ms=round(
                    1000 * (cpu[-1] - cpu[WARMUP_STEPS]) / (len(cpu) - 1 - WARMUP_STEPS), 3
                ),
                parts_ms={part: round(1000 * s / len(losses), 2) for part, s in inside.items()},
                whole_run_s=round(time.time() - begun, 2),
                losses=losses,
                torchvision="stand-in" if stand_in else "installed",
                threads=torch.get_num_threads(),
            )
            os._exit(0)

    Accelerator.log = step_done


def feed(path: Path, *, half: bool) -> None:
    """Makes the script draw what `path` holds, see against_diffusers.write_feed."""
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from safetensors.torch import load_file
    from torch import Tensor

    table = load_file(path)
    scale = float(table.pop("scaling_factor"))
    indices, timesteps = table.pop("indices"), table.pop("timesteps")
    latent_noise, noise = table.pop("latent_noise"), table.pop("noise")
    step = -1

    def sample(self: DiagonalGaussianDistribution, *_: Any, **__: Any) -> Tensor:
        nonlocal step
        step += 1  # the first thing the script draws in a step
        mean, std = self.mean * scale, self.std * scale
        if half:
            mean, std = mean.half().float(), std.half().float()
        return (mean + std * latent_noise[step]) / scale

    randint = torch.randint

    def fed_randint(low: int, high: int, size: tuple[int, ...], **kwargs: Any) -> Tensor:
        if (low, high, size) == (0, 1000, tuple(timesteps[step].shape)):
            return timesteps[step]
        return randint(low, high, size, **kwargs)

    def fed_noise(like: Tensor, **_: Any) -> Tensor:
        assert like.shape == noise[step].shape
        return noise[step]

    class Fed(torch.utils.data.DataLoader):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if kwargs.pop("shuffle", False):
                kwargs.pop("batch_size")
                kwargs["batch_sampler"] = Batches()
            super().__init__(*args, **kwargs)

    class Batches:
        """The epochs of `indices`, one an iteration."""

        def __init__(self) -> None:
            self.epoch = 0
            self.length = int(table["batches_per_epoch"])

        def __len__(self) -> int:
            return self.length

        def __iter__(self) -> Iterator[list[int]]:
            start = self.epoch * self.length
            self.epoch += 1
            yield from indices[start : start + self.length].tolist()

    add_adapter = UNet2DConditionModel.add_adapter  # type: ignore[attr-defined]

    def add_fed_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        add_adapter(self, *args, **kwargs)
        down = {n: p for n, p in self.named_parameters() if n.endswith(".lora_A.default.weight")}
        names = {name.removesuffix(".lora_A.default.weight") for name in down}
        given = {name for name in table if name != "batches_per_epoch"}
        assert names == given, f"other modules are adapted: {sorted(names ^ given)[:4]}"
        with torch.no_grad():
            for name, parameter in down.items():
                parameter.copy_(table[name.removesuffix(".lora_A.default.weight")])

    for owner, name, fed in (
        (DiagonalGaussianDistribution, "sample", sample),
        (torch, "randint", fed_randint),
        (torch, "randn_like", fed_noise),
        (torch.utils.data, "DataLoader", Fed),
        (UNet2DConditionModel, "add_adapter", add_fed_adapter),
    ):
        setattr(owner, name, fed)


if __name__ == "__main__":
    main()
