"""How long the user waits: for --help, for a config error, for the first optimizer step.

    python -m benchmarks.foundation.startup [--runs 15] [--config configs/quickstart.toml] [--starts 3]

Wall time of whole processes, begun by this one. The first step is timed twice a start, with nothing
cached (text encoders and autoencoder are loaded and run) and with everything cached, to the return
of the first update, in the order in which `fasttune train` works: what comes before is divided into
phases. The page cache is warm: files were read by the run before, which is not counted.

Without a complete quickstart in configs/ the first step is that of the tiny SDXL of tiny_models.py.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Row, collect, emit, environment, spread

QUICKSTART = ROOT / "configs" / "quickstart.toml"
HEAVY = ("diffusers", "transformers", "torch._dynamo", "scipy", "accelerate", "huggingface_hub")
"""Imports of which the rows say whether they happened."""


def command() -> list[str]:
    """The installed `fasttune`, or the module in this checkout."""
    script = Path(sys.executable).with_name("fasttune")
    return [str(script)] if script.exists() else [sys.executable, "-m", "fasttune"]


def wall_ms(arguments: list[str], expected_status: int) -> float:
    begin = time.perf_counter()
    done = subprocess.run(
        [*command(), *arguments], capture_output=True, text=True, env=environment(), check=False
    )
    seconds = time.perf_counter() - begin
    if done.returncode != expected_status:
        raise RuntimeError(f"fasttune {' '.join(arguments)}: {done.returncode}\n{done.stderr}")
    return 1000 * seconds


def measure_commands(runs: int, folder: Path) -> None:
    wrong = folder / "wrong.toml"
    wrong.write_text('[model]\nfamily = "sdxl"\npath = "nowhere"\n[trian]\nsteps = "many"\n')
    for name, arguments, status in (
        ("fasttune --help", ["--help"], 0),
        ("config error", ["train", str(wrong)], 2),
    ):
        times = [wall_ms(arguments, status) for _ in range(1 + runs)][1:]
        emit(name, **spread(times, "ms", 1), fastest_ms=round(min(times), 1), runs=runs)


def is_complete(config: Path) -> bool:
    """Whether the config is there, and weights for its model."""
    return config.exists() and any(config.with_suffix("").glob("model/unet/*.safetensors"))


def stand_in(folder: Path) -> Path:
    """A config of the tiny SDXL, in a process of its own: it needs diffusers, the parent must not."""
    code = (
        "import sys; from pathlib import Path; from benchmarks.tiny_run import config, write_inputs; "
        "from fasttune.config_file import to_toml; folder = Path(sys.argv[1]); "
        "write_inputs(folder); (folder / 'c.toml').write_text(to_toml(config(folder, steps=100)))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        check=True,
        env=environment(),
        capture_output=True,
    )
    return folder / "c.toml"


def measure_first_step(config: Path, starts: int, folder: Path) -> None:
    quickstart = is_complete(config)
    name = "quickstart" if quickstart else "tiny sdxl"
    path = config if quickstart else stand_in(folder)
    rows: dict[str, list[Row]] = {"nothing cached": [], "all cached": []}
    for start in range(1 + starts):
        overrides = [f"run.output_dir={folder / 'runs'}", f"cache.dir={folder}/cache-{start}"]
        for kind in rows:
            child = [sys.executable, __file__, "--begun", repr(time.time())]
            (row,) = collect([*child, str(path), *overrides])
            if start:  # the first one warms the page cache
                rows[kind].append(row)
    for kind, found in rows.items():
        walls = [row["first_step_s"] for row in found]
        emit(
            f"first step: {name}, {kind}",
            **spread(walls, "s", 2),
            cpu_s=statistics.median(row["cpu_s"] for row in found),
            phases_s=found[walls.index(min(walls))]["phases_s"],
            imported=found[-1]["imported"],
            starts=starts,
        )


def first_step(begun: float, arguments: list[str]) -> None:
    """In the child: trains up to the end of the first step, and leaves."""
    os.chdir(ROOT)
    marks: dict[str, float] = {"python": time.time() - begun}

    from fasttune import cli

    marks["command line"] = time.time() - begun
    from fasttune import train as loop
    from fasttune.metrics import Metrics
    from fasttune.trained import Trained

    marks["imports of train"] = time.time() - begun

    def marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            marks[name] = time.time() - begun
            return result

        return call

    def leave(self: Metrics, *args: Any, **kwargs: Any) -> None:
        marks["first step"] = time.time() - begun
        names, times = list(marks), list(marks.values())
        phases = {n: t - before for n, t, before in zip(names, times, [0, *times], strict=False)}
        emit(
            "",
            first_step_s=round(times[-1], 2),
            cpu_s=round(time.process_time(), 2),
            phases_s={name: round(seconds, 2) for name, seconds in phases.items()},
            imported=[name for name in HEAVY if name in sys.modules],
        )
        os._exit(0)

    loop.prepare = marked("prepare", loop.prepare)
    loop.denoiser_for = marked("load the network", loop.denoiser_for)
    loop.Validator.run = marked("validation of step 0", loop.Validator.run)  # type: ignore[method-assign]
    Trained.__init__ = marked("optimizer", Trained.__init__)  # type: ignore[method-assign]
    Metrics.step = leave  # type: ignore[assignment]
    sys.exit(cli.main(["train", *arguments]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=15, help="of --help and of the config error")
    parser.add_argument("--starts", type=int, default=3, help="first steps")
    parser.add_argument("--config", type=Path, default=QUICKSTART)
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.begun is not None:
        first_step(args.begun, args.arguments)
    with tempfile.TemporaryDirectory() as temporary:
        measure_commands(args.runs, Path(temporary))
        measure_first_step(args.config, args.starts, Path(temporary))


if __name__ == "__main__":
    main()
