"""AdamW as one operation on all weights: clipping, update, rounding and average in one pass.

Clip, optimizer and average one after another read the gradients three times and the weights three
times. Here `gradient_norm` reads the gradients once, and `optimizer_step_` reads and writes the rest
once: 28 bytes a weight instead of 38 for bf16 weights with float32 state and an average. The factor
of the gradients, whether the update counts, the number of updates, the bias corrections and the seed
of the rounding stay on the device, so that nothing waits for it. That is 10 operations on a few numbers
beside the step, one more with a loss scale, and two for each parameter group, whose learning rate and
weight decay are written in every update.

State is in arenas, flat tensors in which every weight has its range: they pad each to 1024 elements.
What `Optimizer.state` holds are views into them, under the names that torch's AdamW has.

bf16 weights are rounded stochastically: to the nearest, an update below half a unit in the last place
(1/512 of the weight) is lost, and with lr = 1e-5 nearly all are. The random numbers are a function of
the seed and the number of updates, which the checkpoint has.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fasttune_kernels import cpu_library
from fasttune_kernels.arena import QUANTUM, WEIGHT_DTYPES, Arena, is_dense
from fasttune_kernels.ema_step import ema_step_
from fasttune_kernels.optimizer_step import optimizer_step_
from fasttune_kernels.triton_probe import why_no_triton

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}

_ZERO = 127
"""The code for 0 of a signed moment in 8 bits; that of an unsigned one is 0."""
_SEED_STRIDE = 0x9E3779B97F4A7C15
_LR, _WEIGHT_DECAY = 0, 1
_RATE, _FACTOR, _KEEP, _CORRECTIONS, _EMA_REST = 0, 1, 2, slice(3, 5), 5
"""Columns of `hyper` and of `scalars`, see `optimizer_step_`."""


def why_not(params: Sequence[nn.Parameter], *, eps: float, device_type: str) -> str | None:
    """Why `FusedAdamW` does not serve these weights on this kind of device, or is slower there than
    torch's own; None if it does."""
    if device_type == "cuda" and (reason := why_no_triton(params[0].device)):
        return reason
    if device_type == "cpu" and not cpu_library.available():
        return cpu_library.reason()
    if device_type not in ("cuda", "cpu"):
        return f"there is no kernel for {device_type}"
    if eps <= 0:
        return f"eps is {eps}, not above 0"
    if len({p.device for p in params}) > 1:
        return "the weights are on several devices"
    if not all(p.dtype in WEIGHT_DTYPES and is_dense(p) for p in params):
        return "a weight is of another dtype than fp32, bf16 and fp16, or has gaps"
    return None


@dataclass(slots=True)
class _Part:
    """Weights that one call updates: those with the same constants."""

    params: list[nn.Parameter]
    rows: list[int]
    """Of each weight: its parameter group."""
    arena: Arena
    constants: tuple[float, float, float]
    """beta1, beta2, eps."""
    rounding: str
    flat: dict[str, Tensor] = field(default_factory=dict)
    """Arenas by the name of the argument, made with the state."""
    views: list[dict[str, Tensor]] = field(default_factory=list)
    """Of each weight: its state."""

    def arenas(self, begin: int, end: int) -> dict[str, Tensor | None]:
        """Of the weights [begin, end): ranges follow each other in their order."""
        offsets = (*self.arena.offsets, self.arena.total)
        whole = slice(offsets[begin], offsets[end])
        blocks = slice(whole.start // QUANTUM, whole.stop // QUANTUM)
        names = ("m", "v", "m_absmax", "v_absmax", "ema", "compensation")
        found = {name: self.flat.get(name) for name in names}
        return {
            name: None if flat is None else flat[blocks if name.endswith("absmax") else whole]
            for name, flat in found.items()
        }


class FusedAdamW(Optimizer):
    """AdamW (https://arxiv.org/abs/1711.05101) by `fasttune_kernels.optimizer_step_`.

    `state_dtype` float32, bf16 (rounded stochastically) or uint8 (in blocks of 256, see `blockwise`).
    float32 weights are float32 throughout; fp16 ones are rounded to the nearest, bf16 ones
    stochastically from `seed`; with `kahan` either keep what was cut off, in 2 bytes a weight.
    Groups may differ in all hyperparameters; lr may be a tensor on the device.
    """

    _step_supports_amp_scaling = True  # reads found_inf, see loss_scale.py

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        state_dtype: torch.dtype = torch.float32,
        kahan: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self._state_dtype, self._kahan = state_dtype, kahan
        self._parts = list(self._make_parts())
        count, device = len(self._parts), self._parts[0].params[0].device
        # One count for all, on the device, because a skipped update must not count.
        self._num_updates = torch.zeros((), dtype=torch.float32, device=device)
        self._hyper = torch.zeros(len(self.param_groups), 2, device=device)
        self._scalars = torch.ones(count, 6, device=device)
        betas_of = [part.constants[:2] for part in self._parts]
        logs = [[math.log(beta) if beta else -math.inf for beta in pair] for pair in betas_of]
        self._logs = torch.tensor(logs, device=device)
        seeds = [(seed + index * _SEED_STRIDE) % 2**63 for index in range(count)]
        self._first_seeds = torch.tensor(seeds, dtype=torch.int64, device=device)[:, None]
        self._seeds = torch.empty_like(self._first_seeds)

    def _make_parts(self) -> Iterator[_Part]:
        members: dict[tuple[Any, ...], list[tuple[nn.Parameter, int]]] = {}
        for row, group in enumerate(self.param_groups):
            for p in group["params"]:
                rounding = "nearest" if p.dtype == torch.float16 else "stochastic"
                key = (*group["betas"], group["eps"], "kahan" if self._kahan else rounding)
                members.setdefault(key, []).append((p, row))
        for (beta1, beta2, eps, rounding), pairs in members.items():
            params, rows = [p for p, _ in pairs], [row for _, row in pairs]
            yield _Part(params, rows, Arena.of(params), (beta1, beta2, eps), rounding)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Of the constructor alone: the arenas have a place for what was given there."""
        if hasattr(self, "_parts"):
            raise RuntimeError("FusedAdamW takes its parameters when it is made")
        super().add_param_group(param_group)

    @torch.no_grad()
    def average(self) -> dict[nn.Parameter, Tensor]:
        """Makes float32 averages that start as the weights, and which `update` moves with them. They
        are views into an arena."""
        found: dict[nn.Parameter, Tensor] = {}
        for part in self._parts:
            flat = part.arena.zeros(torch.float32, part.params[0].device)
            for p, view in zip(part.params, part.arena.views(flat, part.params), strict=True):
                view.copy_(p)
                found[p] = view
            part.flat["ema"] = flat
        return found

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient, and none of the averages."""
        self.update(found_inf=getattr(self, "found_inf", None))

    @torch.no_grad()
    def update(
        self,
        *,
        factor: Tensor | None = None,
        found_inf: Tensor | None = None,
        ema_decay: float | None = None,
    ) -> None:
        """One update with the gradients times `factor`; none, of nothing, where `found_inf` is 1. Both
        are 0-dim float32 tensors on the device. `ema_decay`: of the averages, which stay as they are
        without it."""
        keep = 1.0 if found_inf is None else 1 - found_inf
        self._num_updates += keep
        torch.add(self._first_seeds, self._num_updates.long(), out=self._seeds)
        columns = self._scalars.unbind(1)
        _put(columns[_FACTOR], 1.0 if factor is None else factor)
        _put(columns[_KEEP], keep)
        _put(columns[_EMA_REST], 0.0 if ema_decay is None else 1 - ema_decay)
        # By expm1: in float32, 1 - 0.999 is off by 1e-5. Where the first update is skipped, the count is 0.
        exponents = self._logs * self._num_updates.clamp(min=1)
        torch.neg(exponents.expm1_(), out=self._scalars[:, _CORRECTIONS])
        for row, group in enumerate(self.param_groups):
            _put(self._hyper[row, _LR], group["lr"])
            _put(self._hyper[row, _WEIGHT_DECAY], group["weight_decay"])
        for index, part in enumerate(self._parts):
            self._update_part(index, part, with_ema=ema_decay is not None)

    def _update_part(self, index: int, part: _Part, *, with_ema: bool) -> None:
        self._keep_state(part, [p.grad is not None for p in part.params])
        scalars = self._scalars[index]
        for has_grad, begin, end in _runs(part.params):
            # A run has the random bits of its place in itself.
            seed = self._seeds[index] + (begin << 32) if begin else self._seeds[index]
            params = part.params[begin:end]
            arenas: dict[str, Any] = part.arenas(begin, end)
            if not with_ema:
                arenas["ema"] = None
            if has_grad:
                optimizer_step_(
                    params,
                    [p.grad for p in params if p.grad is not None],
                    groups=part.rows[begin:end],
                    hyper=self._hyper,
                    scalars=scalars,
                    beta1=part.constants[0],
                    beta2=part.constants[1],
                    eps=part.constants[2],
                    rounding=part.rounding,
                    seed=seed,
                    **arenas,
                )
            elif (ema := arenas["ema"]) is not None:
                ema_step_(params, ema, (scalars[_EMA_REST] * scalars[_KEEP]).view(1), seed)

    def _keep_state(self, part: _Part, chosen: list[bool]) -> None:
        """Lets `state` have what belongs to the chosen weights; the first time, makes it."""
        if not part.views and any(chosen):
            self._make_state(part)
        for index, p in enumerate(part.params):
            if chosen[index] and not self.state.get(p):
                self.state[p] = {"step": self._num_updates, **part.views[index]}

    def _make_state(self, part: _Part) -> None:
        device, eight = part.params[0].device, self._state_dtype == torch.uint8
        for name in ("m", "v"):
            part.flat[name] = part.arena.zeros(self._state_dtype, device)
            if eight:
                part.flat[f"{name}_absmax"] = part.arena.absmax(device)
        if eight:
            # Nothing loads what is between two ranges: there, 0 has to be 0 beside any largest magnitude.
            part.flat["m"].fill_(_ZERO)
        if self._kahan:
            part.flat["compensation"] = part.arena.zeros(torch.bfloat16, device)
        part.views = [self._views(part, index) for index in range(len(part.params))]

    def _views(self, part: _Part, index: int) -> dict[str, Tensor]:
        """State of one weight. 8-bit codes are in memory order, as their scales are: from a checkpoint
        of weights in another order they are refused for their shape."""
        like, offset = part.params[index], part.arena.offsets[index]
        found: dict[str, Tensor] = {}
        for key, name in (("exp_avg", "m"), ("exp_avg_sq", "v"), ("compensation", "compensation")):
            if name not in part.flat:
                continue
            view = part.flat[name].as_strided(like.shape, like.stride(), offset)
            if view.dtype != torch.uint8:
                found[key] = view
                continue
            first, count = offset // QUANTUM, -(-like.numel() // QUANTUM)
            found[f"{key}.codes"] = _in_memory_order(view)
            found[f"{key}.absmax"] = part.flat[f"{name}_absmax"][first : first + count]
        return found

    @torch.no_grad()
    def create_state(self) -> None:
        """State of zeros for all weights, for a checkpoint's to be copied into."""
        for part in self._parts:
            self._keep_state(part, [True] * len(part.params))
            for name, flat in part.flat.items():
                if name != "ema":
                    flat.fill_(_ZERO if name == "m" and flat.dtype == torch.uint8 else 0)


def _runs(params: list[nn.Parameter]) -> Iterator[tuple[bool, int, int]]:
    """(whether they have gradients, begin, end) of weights that follow each other."""
    begin = 0
    for has_grad, run in groupby(p.grad is not None for p in params):
        end = begin + len(list(run))
        yield has_grad, begin, end
        begin = end


def _in_memory_order(t: Tensor) -> Tensor:
    """A dense tensor with its dimensions in the order of memory, without those of size 1."""
    longer = [d for d in range(t.dim()) if t.shape[d] > 1]
    return t.squeeze().permute(
        [longer.index(d) for d in sorted(longer, key=lambda d: -t.stride()[d])]
    )


def _put(target: Tensor, value: float | Tensor) -> None:
    """Without waiting for the device."""
    if isinstance(value, Tensor):
        target.copy_(value)
    else:
        target.fill_(value)
