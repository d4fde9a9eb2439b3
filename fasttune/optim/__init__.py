"""Optimizers by name, their learning rate and their state for the checkpoint."""

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from fasttune.errors import ConfigError
from fasttune.optim.adafactor import build_adafactor
from fasttune.optim.adamw import build_adamw
from fasttune.optim.adamw8bit import build_adamw8bit
from fasttune.optim.lion import build_lion
from fasttune.optim.state import load_state_tensors, state_tensors

__all__ = ["OPTIMIZERS", "build_optimizer", "load_state_tensors", "set_lr", "state_tensors"]

NamedParameters = Iterable[tuple[str, nn.Parameter]]
Groups = Iterable[dict[str, Any]]
"""Each {"params": named parameters, and any of lr, betas, eps, weight_decay to differ in}."""


class Builder(Protocol):
    def __call__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        state_dtype: str,
        seed: int,
    ) -> Optimizer: ...


OPTIMIZERS: dict[str, Builder] = {
    "adamw": build_adamw,
    "adamw8bit": build_adamw8bit,
    "adafactor": build_adafactor,
    "lion": build_lion,
}


def build_optimizer(
    name: str,
    params: NamedParameters | Groups,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    state_dtype: str = "auto",
    seed: int = 0,
) -> Optimizer:
    """The optimizer `name` over named parameters, or groups of them.

    Parameters must be on the device they are trained on. `state_dtype` is "auto", or "fp32", "bf16" or
    "int8" for "adamw"; `seed` is that of what is rounded stochastically. Raises ConfigError for an
    unknown name and HardwareError if "adamw8bit" or a state's dtype works on this device with nothing
    that is installed.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(
            [f"optimizer.name = {name!r} is unknown; allowed are {', '.join(OPTIMIZERS)}"]
        )
    entries = [
        {**entry, "params": list(entry["params"])} if isinstance(entry, dict) else entry
        for entry in params
    ]
    return OPTIMIZERS[name](
        entries,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        state_dtype=state_dtype,
        seed=seed,
    )


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of all groups for the next step, without host synchronisation."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
