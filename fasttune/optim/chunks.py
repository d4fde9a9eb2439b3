"""Parameters as optimizers need them: lists that one multi-tensor operation can take.

One operation over many tensors launches few kernels, but holds its temporaries for all of them at
once; chunks bound that.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

NamedParameter = tuple[str, nn.Parameter]

CPU_LIMIT = 1 << 20
GPU_LIMIT = 1 << 24
"""Elements of a chunk; its float32 temporaries take 4 bytes an element. On the CPU they should stay
in the cache: Adafactor on 17 M weights took 69 ms with 2^20, 99 with 2^22 and 155 with 2^24 (one
core of an EPYC). A GPU wants few launches."""


_device: ContextVar[str | None] = ContextVar("device of the chunks", default=None)


@contextmanager
def chunked_as_on(device_type: str) -> Iterator[None]:
    """Within, optimizers are those of this kind of device, and chunks as large as there, wherever the
    parameters are: for rehearsals, whose fake tensors stand for another device's."""
    token = _device.set(device_type)
    try:
        yield
    finally:
        _device.reset(token)


def device_type_of(p: Tensor) -> str:
    """The kind of device of a parameter, or that which a rehearsal says it stands for."""
    return _device.get() or p.device.type


def named_parameters(params: Sequence[Any]) -> list[NamedParameter]:
    """Flat (name, parameter) list of what an optimizer is built from: those pairs, or groups
    {"params": pairs, ...}."""
    return [
        pair
        for entry in params
        for pair in (entry["params"] if isinstance(entry, dict) else [entry])
    ]


def chunks(
    params: Iterable[nn.Parameter], *, same_shape: bool = False, limit: int | None = None
) -> Iterator[list[nn.Parameter]]:
    """Parameters with a gradient, in lists of one device and dtype (and shape) and `limit`
    elements at most (by device); a larger parameter is alone."""
    groups: dict[tuple[object, ...], list[nn.Parameter]] = {}
    for p in params:
        if p.grad is not None:
            key = (p.device, p.dtype, p.shape if same_shape else None)
            groups.setdefault(key, []).append(p)
    for group in groups.values():
        yield from bounded(group, limit=limit)


def bounded(
    params: Sequence[nn.Parameter], *, limit: int | None = None
) -> Iterator[list[nn.Parameter]]:
    """`params` in their order, in lists of `limit` elements at most (by device); a
    larger parameter is alone."""
    chunk: list[nn.Parameter] = []
    elements = 0
    for p in params:
        most = limit or (CPU_LIMIT if device_type_of(p) == "cpu" else GPU_LIMIT)
        if chunk and elements + p.numel() > most:
            yield chunk
            chunk, elements = [], 0
        chunk.append(p)
        elements += p.numel()
    if chunk:
        yield chunk


def float32(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors themselves where they are float32, else float32 copies."""
    return [t.float() for t in tensors]


def gradients(params: Iterable[nn.Parameter], found_inf: Tensor | None) -> list[Tensor]:
    """float32 gradients, zero where `found_inf` (0-dim) says that one of them overflowed."""
    grads = [p.grad.float() for p in params if p.grad is not None]
    if found_inf is None:
        return grads
    return [torch.where(found_inf > 0, 0.0, g) for g in grads]


def write_back_(params: list[nn.Parameter], weights: list[Tensor]) -> None:
    """Rounds float32 `weights` into `params`; nothing to do where they are the same tensors."""
    if params[0].dtype != torch.float32:
        torch._foreach_copy_(list[Tensor](params), weights)
