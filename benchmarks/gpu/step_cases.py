"""The training steps that are measured: their names, their configs, and their order."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import ROOT
from fasttune.config import Config
from fasttune.config_file import config_from_tables
from fasttune.errors import FasttuneError

if TYPE_CHECKING:
    from torch import nn

MODELS = {"flux": "flux-dev", "sdxl": "sdxl"}
"""Family -> folder in benchmarks/models."""
SMOKE_SIDE = 64
PLAIN_CHOICES = ("save", "recompute")
"""What plain blocks can do with their activations."""
CAPS_GIB = (12, 16, 24)
"""Memory of common cards, emulated on a larger one."""

_PLAIN, _BUCKETS = "plain", "buckets"
_PRECISIONS: dict[str, dict[str, str]] = {
    "bf16": {"base": "auto", "compute": "bf16"},
    "bf16-weights": {"base": "bf16", "compute": "bf16"},
    "fp16": {"base": "auto", "compute": "fp16"},
    "fp32": {"base": "fp32", "compute": "fp32"},
}
"""`bf16` keeps a frozen base in bf16 and trained weights in fp32, as "auto" does; `bf16-weights` trains
bf16 weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCase:
    """One row of training steps."""

    model: str = "flux"
    train: str = "lora"
    """lora (AdamW), full (Adafactor), or full-adamw."""
    precision: str = "bf16"
    activations: str = "recompute"
    batch_size: int = 1
    size: int = 1024
    """Side of the square images, pixels."""
    compiled: bool = False
    fused: bool = True
    """By the blocks' formulas; else by the plain modules, which save or recompute."""
    cap_gib: int | None = None
    buckets: bool = False
    """Over buckets of several shapes, for what that compiles."""

    @property
    def name(self) -> str:
        """Stable: rows are compared by it."""
        parts = [self.model, self.train, self.precision, self.activations]
        parts += [f"b{self.batch_size}", str(self.size), "compile" if self.compiled else "eager"]
        parts += ([] if self.fused else [_PLAIN]) + ([_BUCKETS] if self.buckets else [])
        return " ".join([*parts, *([] if self.cap_gib is None else [f"cap{self.cap_gib}"])])

    @property
    def folder(self) -> Path:
        return ROOT / "benchmarks" / "models" / MODELS[self.model]

    @property
    def compute_dtype(self) -> str:
        return _PRECISIONS[self.precision]["compute"]

    def config(self, device: str = "auto") -> Config:
        """The run, with every other key at its default. `device` is run.device."""
        lora = self.train == "lora"
        adamw = self.train != "full"
        tables: dict[str, Any] = {
            "run": {"device": device},
            "model": {"family": self.model, "path": str(self.folder)},
            "adapter": {"type": "lora", "targets": "attention"} if lora else {"type": "none"},
            "precision": dict(_PRECISIONS[self.precision]),
            "memory": {"activations": self.activations},
            "data": [{"path": "none", "resolution": self.size}],
            "train": {"batch_size": self.batch_size, "compile": "off"},  # `steps` compiles
            "optimizer": {
                "name": "adamw" if adamw else "adafactor",
                "lr": 1e-4 if lora else 1e-5,
            },
        }
        return config_from_tables(tables, check_files=False)


@contextmanager
def folder_of(case: StepCase, smoke: bool) -> Iterator[Path]:
    """The folder with the model's config files; under `smoke` of a shrunk model, for a while."""
    if not smoke:
        yield case.folder
        return
    from benchmarks.static.shrunk import write_shrunk

    with tempfile.TemporaryDirectory() as temporary:
        yield write_shrunk(case.folder, Path(temporary), repeats=2)


def make_plain(denoiser: "nn.Module", activations: str) -> None:
    """Gives a fused network its plain blocks again, with the same activations."""
    from fasttune.models.fused import unfuse
    from fasttune.models.layers import set_recompute

    unfuse(denoiser)
    set_recompute(denoiser, activations == "recompute")


def side_of(case: StepCase, smoke: bool) -> int:
    """Of the square images, pixels."""
    return SMOKE_SIDE if smoke else case.size


def parse(name: str) -> StepCase:
    """The case of a name; FasttuneError where there is no such thing."""
    parts = name.split()
    try:
        model, train, precision, activations, batch, size, mode, *options = parts
        cap = [word.removeprefix("cap") for word in options if word.startswith("cap")]
        case = StepCase(
            model=model,
            train=train,
            precision=precision,
            activations=activations,
            batch_size=int(batch.removeprefix("b")),
            size=int(size),
            compiled=mode == "compile",
            fused=_PLAIN not in options,
            cap_gib=int(cap[0]) if cap else None,
            buckets=_BUCKETS in options,
        )
        known = model in MODELS and precision in _PRECISIONS and train in _TRAINED
    except ValueError:
        known = False
    if not known or case.name != name:
        raise FasttuneError(
            f'--case "{name}": no such training step. There are "{StepCase(compiled=True).name}" '
            f"and {len(cases()) - 1} others; `python -m benchmarks.gpu.steps --list` names them"
        )
    return case


_TRAINED = ("lora", "full", "full-adamw")


def cases() -> list[StepCase]:
    """All, most important first; none twice."""
    return list(dict.fromkeys(_ordered()))


def _ordered() -> Iterator[StepCase]:
    flux, sdxl = StepCase(model="flux"), StepCase(model="sdxl")
    sdxl_full = replace(sdxl, train="full")
    # Adafactor and bf16 weights are what lets 12 billion trained weights into 80 GB.
    flux_full = replace(flux, train="full", precision="bf16-weights")
    for case in (flux, sdxl):
        yield from _by_activations(replace(case, compiled=True))
    for case in (flux, sdxl):
        yield replace(case, activations="save", compiled=True, buckets=True)
        yield from _by_activations(case)
    yield sdxl_full
    yield replace(sdxl_full, compiled=True)
    yield replace(sdxl, batch_size=4)
    yield replace(sdxl, batch_size=4, compiled=True)
    yield from (replace(case, cap_gib=cap) for case in (sdxl, sdxl_full) for cap in CAPS_GIB)
    kept = [replace(sdxl, activations=name) for name in ("save", "int8", "offload")]
    yield from (replace(case, cap_gib=cap, compiled=True) for case in kept for cap in CAPS_GIB)
    yield replace(flux, activations="offload", size=512, cap_gib=24)
    yield replace(flux, cap_gib=24)
    yield replace(flux, size=512, cap_gib=24)
    # the rest of what people try on such cards: where it does not fit, that is the row
    narrow = replace(sdxl_full, precision="bf16-weights")
    tried = (*kept, narrow, flux, flux_full)
    yield from (replace(case, cap_gib=cap) for case in tried for cap in reversed(CAPS_GIB))
    yield replace(flux, size=512)
    yield replace(flux, size=512, compiled=True)
    yield flux_full
    yield replace(sdxl_full, train="full-adamw")
    yield replace(flux, batch_size=4)
    yield replace(flux, batch_size=4, compiled=True)
    for case, precision in product((sdxl, flux), ("fp16", "fp32")):
        yield replace(case, precision=precision)
    yield replace(sdxl_full, precision="bf16-weights")
    for activations, size, batch_size, case, compiled in product(
        ("recompute", "save"),
        (1024, 512),
        (1, 4),
        (flux, sdxl, sdxl_full, flux_full),
        (False, True),
    ):
        yield replace(
            case, activations=activations, size=size, batch_size=batch_size, compiled=compiled
        )


def _by_activations(case: StepCase) -> Iterator[StepCase]:
    """Each choice for what blocks keep, and beside it the plain blocks where they have it."""
    for activations in ("save", "int8", "recompute", "offload"):
        yield replace(case, activations=activations)
        if activations in PLAIN_CHOICES:
            yield replace(case, activations=activations, fused=False)
