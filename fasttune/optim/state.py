"""Optimizer state as plain named tensors, for safetensors, and back bitwise.

Keys are "<state>/<parameter>", such as "exp_avg/blocks.0.weight". State in tensor subclasses is taken
apart into its plain tensors: "exp_avg.codes/blocks.0.weight".
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fasttune.errors import CheckpointError
from fasttune.optim.fused_adamw import FusedAdamW

# Lookup tables of 8-bit optimizers: constants, and shared between parameters.
_CONSTANTS = {"qmap", "qmap1", "qmap2"}
_CHUNK = 32


def _named_parameters(optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


def _plain(key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor), or those that a tensor subclass consists of."""
    if key.rpartition(".")[2] in _CONSTANTS:
        return
    if type(value) in (Tensor, nn.Parameter):
        yield key, value.detach()
    else:
        for attribute in value.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield from _plain(f"{key}.{attribute}", getattr(value, attribute))


def state_tensors(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors for safetensors, numbers for JSON) of an optimizer built with named parameters.

    Hyperparameters are not in it: they come from the config, and lr from the step.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    without_state = []
    for name, p in _named_parameters(optimizer):
        state = optimizer.state.get(p)
        if not state:
            without_state.append(name)
            continue
        for key, value in state.items():
            if isinstance(value, Tensor):
                for plain_key, plain in _plain(key, value):
                    # A scalar can be one tensor for all parameters; safetensors wants them apart.
                    tensors[f"{plain_key}/{name}"] = plain.clone() if plain.dim() == 0 else plain
            else:
                numbers[f"{key}/{name}"] = value
    return tensors, {"numbers": numbers, "without_state": without_state}


@torch.no_grad()
def load_state_tensors(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> None:
    """Puts the state of `state_tensors` into a new optimizer, bitwise.

    Raises CheckpointError on a tensor that is missing, unknown, or of another shape or dtype, which
    happens when the checkpoint is of another optimizer or of other parameters.
    """
    without_state = set(scalars["without_state"])
    numbers = scalars["numbers"]
    _create_state(optimizer)
    left = set(tensors)
    problems = []
    for name, p in _named_parameters(optimizer):
        if name in without_state:
            optimizer.state.pop(p, None)
            continue
        for key, value in optimizer.state[p].items():
            if not isinstance(value, Tensor):
                if f"{key}/{name}" in numbers:
                    optimizer.state[p][key] = numbers[f"{key}/{name}"]
                else:
                    problems.append(f"{key}/{name} is missing")
                continue
            for plain_key, plain in _plain(key, value):
                full = f"{plain_key}/{name}"
                if full not in tensors:
                    problems.append(f"{full} is missing")
                    continue
                left.discard(full)
                given = tensors[full]
                if given.shape != plain.shape or given.dtype != plain.dtype:
                    problems.append(
                        f"{full} is {given.dtype} {tuple(given.shape)}, expected"
                        f" {plain.dtype} {tuple(plain.shape)}"
                    )
                else:
                    plain.copy_(given)
    problems += [f"{key} is unknown" for key in sorted(left)]
    if problems:
        raise CheckpointError(
            f"the optimizer state does not fit {type(optimizer).__name__}: {problems[0]} (and"
            f" {len(problems) - 1} more); resume with the [optimizer], [model] and [adapter] the"
            " checkpoint was trained with"
        )


def _create_state(optimizer: Optimizer) -> None:
    """Lets the optimizer allocate its state by steps at lr = 0, which leave all weights as they
    are. A few parameters at a time, so that the gradients for it need little memory."""
    if isinstance(optimizer, FusedAdamW):
        optimizer.create_state()
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    grads = [(p, p.grad) for _, p in _named_parameters(optimizer)]
    for group in optimizer.param_groups:
        lr = group["lr"]
        group["lr"] = torch.zeros_like(lr) if isinstance(lr, Tensor) else 0.0
    for p, _ in grads:
        p.grad = None
    for start in range(0, len(grads), _CHUNK):
        some = [p for p, _ in grads[start : start + _CHUNK]]
        for p in some:
            # Not zeros: 0 / sqrt(0) is NaN where eps is 0, and 0 times NaN is not 0.
            p.grad = torch.ones_like(p)
        optimizer.step()
        for p in some:
            p.grad = None
    for p, grad in grads:
        p.grad = grad
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
