"""The training steps that are measured: their names, their configs, and their order."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT
from fasttune.config import Config
from fasttune.config_file import config_from_tables
from fasttune.errors import ConfigError

MODELS = {"flux": "flux-dev", "sdxl": "sdxl"}
"""Family -> folder in benchmarks/models."""
SMOKE_SIDE = 64
CAPS_GIB = (12, 16, 24)
"""Memory of common cards, emulated on a larger one."""

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
    cap_gib: int | None = None

    @property
    def name(self) -> str:
        """Stable: rows are compared by it."""
        parts = [self.model, self.train, self.precision, self.activations]
        parts += [f"b{self.batch_size}", str(self.size), "compile" if self.compiled else "eager"]
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
            "train": {"batch_size": self.batch_size},
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


def side_of(case: StepCase, smoke: bool) -> int:
    """Of the square images, pixels."""
    return SMOKE_SIDE if smoke else case.size


def parse(name: str) -> StepCase:
    """The case of a name; ConfigError where there is no such thing."""
    parts = name.split()
    try:
        model, train, precision, activations, batch, size, mode, *cap = parts
        case = StepCase(
            model=model,
            train=train,
            precision=precision,
            activations=activations,
            batch_size=int(batch.removeprefix("b")),
            size=int(size),
            compiled=mode == "compile",
            cap_gib=int(cap[0].removeprefix("cap")) if cap else None,
        )
        known = model in MODELS and precision in _PRECISIONS and train in _TRAINED
    except ValueError:
        known = False
    if not known or case.name != name:
        raise ConfigError(
            [f'--case "{name}": no such training step; `--list` names those that there are']
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
    first = [flux, sdxl, sdxl_full]
    for case in first:
        yield case
        yield replace(case, compiled=True)
    yield replace(flux, activations="save")
    yield replace(flux, activations="save", compiled=True)
    yield replace(sdxl, batch_size=4)
    yield replace(sdxl, batch_size=4, compiled=True)
    yield from (replace(case, cap_gib=cap) for case in (sdxl, sdxl_full) for cap in CAPS_GIB)
    yield replace(flux, cap_gib=24)
    yield replace(flux, size=512, cap_gib=24)
    # the rest of what people try on such cards: where it does not fit, that is the row
    narrow = replace(sdxl_full, precision="bf16-weights")
    tried = (replace(sdxl, activations="save"), narrow, flux, flux_full)
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
