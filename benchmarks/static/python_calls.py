"""Gate: calls of Python and C functions in one training step, the host's share of it.

Real steps on the CPU: networks with all blocks of the released ones, but narrow, so that the step is
nothing but calls. Counted are the calls that `sys.setprofile` sees in the second step, from the first
line of the micro-batch to the end of the update; the loader, metrics and log are the host gate's.
"""

import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils.checkpoint import DefaultDeviceType

from benchmarks.harness import Row
from benchmarks.static.models import MODEL_FOLDERS, config_named, with_lora
from benchmarks.static.versions import CPU_LIBRARY
from fasttune.config import Config
from fasttune.device import place
from fasttune.rehearsal import Rehearsal, rehearse

VERSIONS = ("torch", "python", CPU_LIBRARY)

NARROW: dict[str, dict[str, Any]] = {
    "flux-dev": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": [4, 6, 6],
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
    },
    "sdxl": {
        "block_out_channels": [32, 64, 128],
        "attention_head_dim": [2, 2, 4],
        "cross_attention_dim": 32,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
    "sd15": {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 32},
}
"""Model -> keys of its config.json that make it narrow and leave its blocks as many as they are."""
CONFIGS = {"flux-dev": "flux-lora-32gb", "sdxl": "sdxl-lora-12gb", "sd15": "sd1-lora-8gb"}
SIDE = 64
"""Pixels; the number of calls does not depend on it."""


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as temporary:
        for model, name in CONFIGS.items():
            folder = narrow(model, Path(temporary) / model)
            config = config_named(name)
            config = replace(
                config,
                run=replace(config.run, device="cpu"),
                train=replace(config.train, batch_size=1),
            )
            for activations in ("save", "recompute"):
                chosen = replace(config, memory=replace(config.memory, activations=activations))
                yield {
                    "case": f"{model}, lora attention, {activations}",
                    "calls": calls_of_a_step(chosen, folder),
                }
            full = with_lora(config, None)
            yield {"case": f"{model}, full, recompute", "calls": calls_of_a_step(full, folder)}


def narrow(model: str, folder: Path) -> Path:
    """A copy of the model's config files with narrow layers."""
    for path in sorted(MODEL_FOLDERS[model].rglob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "config.json":
            values |= NARROW[model]
        target = folder / path.relative_to(MODEL_FOLDERS[model])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(values), encoding="utf-8")
    return folder


def calls_of_a_step(config: Config, folder: Path) -> int:
    """Of the second step: the first one makes the optimizer's state."""
    placement = place(
        device="cpu", base="fp32", compute="fp32", adapter=config.adapter.type != "none"
    )
    rehearsal = rehearse(config, folder, placement=placement, size=(SIDE, SIDE))
    rehearsal.take_step()
    return count_calls(rehearsal)


def count_calls(rehearsal: Rehearsal) -> int:
    """Calls in one step."""
    calls = 0

    def seen(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        if event in ("call", "c_call"):
            calls += 1

    gc.collect()
    gc.disable()  # collections come when they like, and call finalizers
    with no_accelerator():
        sys.setprofile(seen)
        try:
            rehearsal.take_step()
        finally:
            sys.setprofile(None)
            gc.enable()
    return calls


@contextmanager
def no_accelerator() -> Iterator[None]:
    """Within, torch behaves as its CPU build does: builds for GPUs ask for one at every step of an
    optimizer and every checkpoint, in more calls."""
    device = DefaultDeviceType.get_device_type()
    DefaultDeviceType.set_device_type("cpu")
    try:
        with mock.patch.object(torch.accelerator, "current_accelerator", _none):
            yield
    finally:
        DefaultDeviceType.set_device_type(device)


def _none(*_: Any, **__: Any) -> None:
    return None
