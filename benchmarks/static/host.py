"""Gate: what commands import, and how much Python a batch, a step and a config take.

Imports are those of a fresh process, the standard library left out. Counted are the bytecode
instructions that fasttune's own code executes and the calls it makes, of Python and C functions alike;
what those do inside is the libraries' matter and changes with their versions. So the counts are the
same on every machine and under every hash seed. The denoiser of the step is a multiplication: what
networks take is the python_calls gate's.

Left out, because they are not the same from one process to the next, nor from one batch to the next:
tracemalloc's bytes and blocks, and `sys.getallocatedblocks` (a batch of four: 132 to 154 blocks of
fasttune's, 52 to 71 left). Left out as well is what a thread's timing decides, such as the loader's end.
"""

import contextlib
import functools
import gc
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest import mock

from benchmarks.harness import ROOT, ROW, Row, environment
from benchmarks.static.versions import CPU_LIBRARY

VERSIONS = ("python", "torch", CPU_LIBRARY)

BAD_CONFIG = """\
[model]
family = "sdxl"
path = "nowhere"

[[data]]
path = "nowhere"

[train]
step = 100
"""
COMMANDS: dict[str, tuple[str, ...]] = {
    "--help": ("--help",),
    "train --help": ("train", "--help"),
    "a config error": ("train", "wrong.toml"),
    "bench --help": ("bench", "--help"),
    "schema": ("schema",),
}
"""Case -> arguments, in a folder with wrong.toml."""

_SHOW_MODULES = f"""
import json, sys
before = set(sys.modules)
from fasttune.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code
new = sorted(m for m in set(sys.modules) - before if m.partition(".")[0] not in sys.stdlib_module_names)
print({ROW!r} + json.dumps([status, new]))
"""

BATCH_SIZE = 4
NUM_SAMPLES = 16
LOG_EVERY = 5
STEPS = 2 * LOG_EVERY


def rows() -> Iterator[Row]:
    for command, arguments in COMMANDS.items():
        yield {"case": f"imports of fasttune {command}", **imports_of(arguments)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        yield {"case": "load a config", **config_row(folder)}
        yield {"case": f"batch of {BATCH_SIZE}", **batch_row(folder)}
        yield from step_rows(folder)


def imports_of(arguments: tuple[str, ...], root: Path = ROOT) -> Row:
    """Exit status of a command and the modules it imports, but for the standard library's.

    `root` has the packages fasttune and benchmarks. RuntimeError if the command does not end."""
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "kernels"), env["PYTHONPATH"]])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "wrong.toml").write_text(BAD_CONFIG, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", _SHOW_MODULES, *arguments],
            capture_output=True,
            text=True,
            env=env,
            cwd=folder,
            check=False,
        )
    last = done.stdout.splitlines()[-1:]
    if not last or not last[0].startswith(ROW):
        raise RuntimeError(f"fasttune {' '.join(arguments)}: {done.stderr[-4000:]}")
    status, modules = json.loads(last[0].removeprefix(ROW))
    others = [name for name in modules if name.partition(".")[0] not in ("fasttune", "benchmarks")]
    return {"exit_status": status, "modules": modules, "modules_of_others": len(others)}


@dataclass(slots=True)
class Counts:
    """What fasttune's own code did."""

    instructions: int = 0
    calls: int = 0

    def since(self, earlier: "Counts") -> Row:
        return {
            "instructions": self.instructions - earlier.instructions,
            "calls": self.calls - earlier.calls,
        }

    def copy(self) -> "Counts":
        return Counts(self.instructions, self.calls)


@contextlib.contextmanager
def counting(package: Path = ROOT / "fasttune") -> Iterator[Counts]:
    """Within, the counts grow with what functions that are called from here on execute, in this
    thread, as far as their code is in `package`."""
    counts = Counts()
    prefix = f"{package}{os.sep}"
    own: dict[CodeType, bool] = {}

    def is_own(code: CodeType) -> bool:
        known = own.get(code)
        if known is None:
            known = own[code] = code.co_filename.startswith(prefix)
        return known

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not is_own(frame.f_code):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return trace_own

    def trace_own(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            counts.instructions += 1
        return trace_own

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        caller = frame if event == "c_call" else frame.f_back if event == "call" else None
        if caller is not None and is_own(caller.f_code):
            counts.calls += 1

    gc.collect()
    gc.disable()  # collections come when they like, and call finalizers
    before = sys.gettrace(), sys.getprofile()
    # Python 3.12 sends opcode events only if a frame had asked for them before settrace.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)
    sys.setprofile(profile)
    try:
        yield counts
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])
        gc.enable()


def count(function: Callable[[], object]) -> Row:
    """Of one call of `function`."""
    with counting() as counts:
        function()
    return counts.since(Counts())


def config_row(folder: Path) -> Row:
    """Of reading and checking a config of few keys, the second time in a process, and the number of
    keys there are: a new one makes it a little longer."""
    from fasttune.config_file import key_types, load_config

    path = folder / "config.toml"
    path.write_text(BAD_CONFIG.replace("step =", "steps ="), encoding="utf-8")

    def load() -> None:
        load_config(path, ["optimizer.lr=1e-5"], check_files=False)

    load()
    return {**count(load), "config_keys": len(key_types())}


def batch_row(folder: Path) -> Row:
    """Of what the loader's thread does for a batch: plan, read, collate, finish. Here in this one."""
    from fasttune.data import loader

    with (
        _cached(folder) as (samples, reader, _),
        mock.patch.object(loader, "Loader", lambda make, *_: make),
    ):
        plan = loader.BatchPlan([s.plan.bucket for s in samples], batch_size=BATCH_SIZE, seed=0)
        make: Any = loader.load(samples, plan, reader, seed=0, caption_dropout=0.5)
        make(0)  # opens the shards and shuffles the epoch
        return count(lambda: make(1))


def step_rows(folder: Path) -> Iterator[Row]:
    """Of a step of the training loop, and of one that logs."""
    steps = _steps(folder)
    plain = [step for number, step in steps.items() if number % LOG_EVERY]
    logging = [step for number, step in steps.items() if number % LOG_EVERY == 0]
    for case, found in (("step", plain), ("step that logs", logging)):
        if any(step != found[0] for step in found):
            raise RuntimeError(f"{case}: not the same in all steps: {steps}")
        yield {"case": f"{case}, empty network", **found[0]}


def _steps(folder: Path) -> dict[int, Row]:
    """Step -> counts, from the line that sets the learning rate to the next such line. The first
    window is left out, in which the loop warms up."""
    import torch
    import torch._dynamo  # as the first optimizer does, here before everything is counted
    from torch import Tensor, nn

    from fasttune import train as loop
    from fasttune.prepare import Prepared
    from fasttune.trained import Trained

    class Empty(nn.Module):
        """A network with nothing to compute, one trainable number."""

        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, *_: Tensor) -> Tensor:
            return x * self.factor

    marks: list[Counts] = []
    set_lr = Trained.set_lr
    config = _config(folder)
    run_dir = folder / "run"
    run_dir.mkdir()
    with contextlib.ExitStack() as stack:
        samples, reader, cache = stack.enter_context(_cached(folder))
        prepared = Prepared(
            folder=ROOT / "benchmarks" / "models" / "sdxl",
            train=samples,
            held_out=[],
            reader=reader,
            summary=None,  # type: ignore[arg-type]  # for people, not for the loop
            bad_files=[],
            warnings=[],
            cache=cache,
        )
        for name, instead in {
            "denoiser_for": lambda *_: Empty(),
            "set_blocks": lambda *_: None,
            "export": lambda *_, **__: [],
            # A line of the log says 9.8 ms in other branches than 10 ms.
            "Metrics": functools.partial(loop.Metrics, clock=itertools.count().__next__),
        }.items():
            stack.enter_context(mock.patch.object(loop, name, instead))
        # A terminal would get a bar instead of lines.
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        counts = stack.enter_context(counting())

        def begin_step(self: Trained, step: int) -> float:
            marks.append(counts.copy())
            return set_lr(self, step)

        stack.enter_context(mock.patch.object(Trained, "set_lr", begin_step))
        loop._train(config, run_dir, prepared, None, 0.0)
    both = zip(marks, marks[1:], strict=False)
    steps = {number: after.since(before) for number, (before, after) in enumerate(both, start=1)}
    return {number: step for number, step in steps.items() if number > LOG_EVERY}


def _config(folder: Path) -> Any:
    from fasttune import config as c

    return c.Config(
        run=c.Run(name="run", output_dir=str(folder), device="cpu"),
        model=c.Model(family="sdxl", path=str(ROOT / "benchmarks" / "models" / "sdxl")),
        adapter=c.Adapter(type="none"),
        precision=c.Precision(base="fp32", compute="fp32"),
        data=(c.Data(path=str(folder)),),
        cache=c.Cache(dir=str(folder / "cache")),
        train=c.Train(steps=STEPS + 1, batch_size=BATCH_SIZE),
        validation=c.Validation(every=0),
        checkpoint=c.Checkpoint(every=0),
        logging=c.Logging(every=LOG_EVERY),
    )


@contextlib.contextmanager
def _cached(folder: Path) -> Iterator[tuple[list[Any], Any, Any]]:
    """Samples of one bucket whose latents and text embeddings are in a cache, as those of SDXL are
    but narrower; their reader, and the cache."""
    import torch

    from fasttune.data.buckets import CropPlan
    from fasttune.data.cache import Cache, make_key
    from fasttune.data.encode import text_key
    from fasttune.data.loader import CachedSample, Reader
    from fasttune.data.samples import Sample
    from fasttune.models.text_encoders import merge_sdxl

    plan = CropPlan(64, 64, 0, 0, 64, 64)
    samples = []
    for i in range(NUM_SAMPLES):
        path = f"/images/{i:02d}.png"
        sample = Sample(path, f"{i:02d}.png", 1, 1, 0, 0, f"caption {i}", 64, 64, False, path)
        samples.append(CachedSample(sample, plan, make_key(path), text_key(sample.caption)))
    with Cache(folder / "cache") as cache:
        latents = cache.space("latents", "latents")
        text = (cache.space("text", "first"), cache.space("text", "second"))
        keys = [text_key(""), *(s.text_key for s in samples)]
        moments = {"mean": torch.zeros(4, 8, 8), "std": torch.ones(4, 8, 8)}
        embeddings = {"text_embeddings": torch.zeros(77, 8)}
        pooled = embeddings | {"pooled_text_embeddings": torch.zeros(8)}
        for space, its_keys, tensors in (
            (latents, [s.latents_key for s in samples], moments),
            (text[0], keys, embeddings),
            (text[1], keys, pooled),
        ):
            with space.writer() as writer:
                for key in space.missing(its_keys):
                    half = {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
                    writer.add([(key, half)])
        reader = Reader(
            latents=latents,
            text=text,
            merge_text=merge_sdxl,
            empty_key=text_key(""),
            empty_caption_is_zero=True,
        )
        yield samples, reader, cache
