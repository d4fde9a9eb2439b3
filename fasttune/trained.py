"""What a run trains and what trains it: parameters, optimizer, loss scale and average."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fasttune.adapters.formats import load_lora
from fasttune.checkpoint import ResumeState, check_same_tensors
from fasttune.config import Config
from fasttune.data.loader import CachedSample
from fasttune.device import Placement, short
from fasttune.errors import CheckpointError
from fasttune.optim import build_optimizer, load_state_tensors, set_lr, state_tensors
from fasttune.optim.clip import clip_by_global_norm_, clip_factor
from fasttune.optim.ema import Ema
from fasttune.optim.fused_adamw import FusedAdamW
from fasttune.optim.loss_scale import LossScaler
from fasttune.optim.schedule import lr_factor
from fasttune.seeds import derive_seed
from fasttune_kernels.gradient_norm import gradient_norm

log = logging.getLogger(__name__)


class Trained:
    """The trainable parameters of a network and everything whose state a checkpoint holds."""

    def __init__(
        self, config: Config, denoiser: nn.Module, placement: Placement, *, resuming: bool = False
    ) -> None:
        if config.adapter.init_from is not None and not resuming:
            aside = load_lora(denoiser, Path(config.adapter.init_from))
            if aside:
                log.warning(
                    "adapter.init_from: %d tensors of text encoders in %s are left aside, such as %s;"
                    " text encoders are not trained",
                    len(aside),
                    config.adapter.init_from,
                    aside[0],
                )
        self._config = config
        self.parameters = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        o = config.optimizer
        self._optimizer = build_optimizer(
            o.name,
            self.parameters.items(),
            lr=o.lr,
            betas=o.betas,
            eps=o.eps,
            weight_decay=o.weight_decay,
            state_dtype=o.state_dtype,
            seed=derive_seed(config.run.seed, "rounding"),
        )
        self._ema = self._average() if config.ema.enabled else None
        fp16 = placement.compute_dtype == torch.float16
        self._scaler = LossScaler(placement.device) if fp16 else None
        self.scales_loss = fp16
        """Updates with a gradient that is not finite are skipped, not an error."""
        self._base_dtype = short(placement.base_dtype)

    def _average(self) -> Ema:
        own = self._optimizer.average() if isinstance(self._optimizer, FusedAdamW) else None
        return Ema(self.parameters.items(), decay=self._config.ema.decay, shadow=own)

    def set_lr(self, step: int) -> float:
        """Sets the learning rate of the update after `step` updates, and returns it."""
        s = self._config.schedule
        lr = self._config.optimizer.lr * lr_factor(
            step,
            name=s.name,
            total_steps=self._config.train.steps,
            warmup_steps=s.warmup_steps,
            min_lr_ratio=s.min_lr_ratio,
            cycles=s.cycles,
            power=s.power,
        )
        set_lr(self._optimizer, lr)
        return lr

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a micro-batch's loss."""
        (loss if self._scaler is None else self._scaler.scaled(loss)).backward()

    def update(self, step: int) -> Tensor:
        """Update number `step`, counted from 1: clips, updates weights and average, clears the
        gradients. Returns the gradient norm before clipping, on the device."""
        if isinstance(self._optimizer, FusedAdamW):
            norm = self._update_in_one_pass(self._optimizer, step)
        else:
            norm = self._update_in_turn(self._optimizer, step)
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _update_in_one_pass(self, optimizer: FusedAdamW, step: int) -> Tensor:
        """The gradients stay as they are: what they are multiplied with is a scalar on the device."""
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        scale = None if self._scaler is None else self._scaler.scale
        norm, factor = clip_factor(gradient_norm(grads), self._config.train.max_grad_norm, scale)
        optimizer.update(
            factor=factor,
            found_inf=None if self._scaler is None else self._scaler.adapt(norm),
            ema_decay=None if self._ema is None else self._ema.decay_at(step),
        )
        return norm

    def _update_in_turn(self, optimizer: Optimizer, step: int) -> Tensor:
        scale = None if self._scaler is None else self._scaler.scale
        norm = clip_by_global_norm_(
            list(self.parameters.values()), self._config.train.max_grad_norm, loss_scale=scale
        )
        if self._scaler is None:
            optimizer.step()
        else:
            self._scaler.step(optimizer, norm)
        if self._ema is not None:
            self._ema.update(step)
        return norm

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the network has the averaged weights, if there is an average."""
        return nullcontext() if self._ema is None else self._ema.swapped()

    def state(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """(tensors by file, JSON) for `save_checkpoint`."""
        tensors, numbers = state_tensors(self._optimizer)
        groups: dict[str, Mapping[str, Tensor]] = {
            "trainable": self.parameters,
            "optimizer": tensors,
        }
        if self._ema is not None:
            groups["ema"] = self._ema.state_tensors()
        if self._scaler is not None:
            groups["loss_scale"] = self._scaler.state_tensors()
        state = {"made_by": self._made_by(), "base_dtype": self._base_dtype, "optimizer": numbers}
        return groups, state

    def _made_by(self) -> dict[str, Any]:
        """What a checkpoint cannot be resumed without."""
        c = self._config
        return {
            "model.family": c.model.family,
            "model.path": _absolute(c.model.path),
            "optimizer.name": c.optimizer.name,
            "adapter.alpha": c.adapter.alpha,
            "precision.base": self._base_dtype,
        }

    @torch.no_grad()
    def restore(self, resumed: ResumeState) -> int:
        """Continues from a checkpoint and returns its step. CheckpointError if it is of another
        model, adapter, optimizer or precision."""
        saved, made_by = resumed.groups, resumed.state["made_by"]
        check_same_tensors(resumed.path, saved["trainable"], self.parameters)
        for key, now in self._made_by().items():
            if made_by[key] != now:
                raise CheckpointError(
                    f"{resumed.path} was trained with {key} = {made_by[key]!r}, the config says "
                    f"{now!r}; resume with the config.toml of its run folder"
                )
        if resumed.step > self._config.train.steps:
            raise CheckpointError(
                f"{resumed.path} is at step {resumed.step}, beyond train.steps = "
                f"{self._config.train.steps}; set train.steps higher"
            )
        for key, part in (("ema", self._ema), ("loss_scale", self._scaler)):
            if (part is not None) != (key in saved):
                there = "has" if key in saved else "lacks"
                raise CheckpointError(
                    f"{resumed.path} {there} the state {key!r}, unlike this config; resume with the "
                    "[ema] and [precision] it was trained with"
                )
        load_state_tensors(self._optimizer, saved.get("optimizer", {}), resumed.state["optimizer"])
        for name, parameter in self.parameters.items():
            parameter.copy_(saved["trainable"][name])
        if self._ema is not None:
            self._ema.load_state_tensors(saved["ema"])
        if self._scaler is not None:
            self._scaler.load_state_tensors(saved["loss_scale"])
        return resumed.step


def _absolute(model: str) -> str:
    """A model's path, however it is spelled; a hub id stays as it is."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else model


def settings_of(config: Config, samples: Sequence[CachedSample]) -> dict[str, Any]:
    """What decides how a run goes on, flat, as JSON has it: kept in checkpoints to be compared."""
    digest = hashlib.blake2b(digest_size=8)
    for cached in samples:
        digest.update(cached.latents_key + cached.text_key)
    found: dict[str, Any] = {
        "run.seed": config.run.seed,
        "the training images and captions": f"{len(samples)}, {digest.hexdigest()}",
    }
    for section in (
        *("adapter", "precision", "memory", "train", "objective", "optimizer", "schedule", "ema"),
    ):
        values = dataclasses.asdict(getattr(config, section))
        found |= {f"{section}.{key}": value for key, value in values.items()}
    loaded: dict[str, Any] = json.loads(json.dumps(found))
    return loaded


def warn_of_changes(resumed: ResumeState, settings: Mapping[str, Any]) -> None:
    """Names what differs from the settings a checkpoint was written under."""
    before = resumed.state["settings"]
    for key, now in settings.items():
        if before.get(key) != now:
            log.warning(
                "%s: was %s, now %s; from here the run differs from one that was not stopped",
                key,
                before.get(key),
                now,
            )
