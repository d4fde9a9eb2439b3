"""LoRA (arXiv 2106.09685): y = base(x) + alpha / rank * B A dropout(x).

`apply_lora` turns chosen Linear and Conv2d modules of a plain model into adapted ones in place: the
module keeps its weights, buffers and names, and gains the parameters `lora_A` and `lora_B`. So the
base keys of `model.state_dict()` stay those of the checkpoint, and any layer type with Linear's or
Conv2d's attributes can be adapted, whatever it stores.

A is the down-projection, B the up-projection:

    Linear    lora_A (rank, in)              lora_B (out, rank)
    Conv2d    lora_A (rank, in, kh, kw)      lora_B (out, rank, 1, 1)

Both are kept in float32 and cast to the input's dtype in the forward.
"""

import difflib
import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttune.errors import ConfigError

log = logging.getLogger(__name__)


class LoraPair(NamedTuple):
    """One adapted module: delta W = alpha / rank * B A, with rank = A.shape[0]."""

    A: Tensor
    B: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class _Adapted(nn.Module):
    """What adapted Linear and Conv2d share."""

    lora_A: nn.Parameter  # noqa: N815  # the names of the paper and of every LoRA file
    lora_B: nn.Parameter  # noqa: N815
    lora_alpha: float
    lora_dropout: float

    def _dropped(self, x: Tensor) -> Tensor:
        if self.lora_dropout == 0.0:
            return x
        return F.dropout(x, self.lora_dropout, self.training)

    def _scale(self) -> float:
        return self.lora_alpha / self.lora_A.shape[0]


class _AdaptedLinear(_Adapted):
    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        low = F.linear(self._dropped(x), self.lora_A.to(x.dtype))
        return super().forward(x) + F.linear(low * self._scale(), self.lora_B.to(x.dtype))


class _AdaptedConv2d(_Adapted):
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def forward(self, x: Tensor) -> Tensor:  # (B, in, H, W) -> (B, out, H', W')
        A = self.lora_A.to(x.dtype)
        low = F.conv2d(self._dropped(x), A, None, self.stride, self.padding, self.dilation)
        return super().forward(x) + F.conv2d(low * self._scale(), self.lora_B.to(x.dtype))


def apply_lora(
    model: nn.Module,
    *,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Freezes `model` and adapts every Linear and Conv2d whose name matches one of `targets`
    (fnmatch patterns; `*` also spans dots). Returns the names of the adapted modules.

    A starts Kaiming-uniform, B at zero, so the model's output does not change. A is a function of
    (seed, module name) alone, drawn on the CPU: more targets or another device change nothing.
    Call it when the weights are loaded; on a model on meta the adapter is on meta, too.
    ConfigError names each pattern that matches nothing.
    """
    names = adaptable_modules(model)
    problems = [_unmatched(t, list(names)) for t in targets if not _matching(t, names)]
    if not targets:
        problems = ["adapter.targets: empty; give a preset or patterns of module names"]
    chosen = [name for name in names if any(fnmatchcase(name, target) for target in targets)]
    problems += [
        f"adapter.targets: {name} is a convolution with groups or padding that LoRA cannot follow; "
        "leave it out"
        for name in chosen
        if getattr(names[name], "groups", 1) != 1
        or getattr(names[name], "padding_mode", "zeros") != "zeros"
    ]
    if problems:
        raise ConfigError(problems)
    model.requires_grad_(False)
    too_wide = []
    for name in chosen:
        module = names[name]
        weight = _weight(module)
        outs, ins = weight.shape[0], math.prod(weight.shape[1:])
        if rank > min(outs, ins):
            too_wide.append(name)
        A = torch.empty(rank, *weight.shape[1:])
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=_generator(seed, name))
        B = torch.zeros(outs, rank, *(1,) * (weight.ndim - 2))
        _adapt(module, A.to(weight.device), B.to(weight.device), alpha=alpha, dropout=dropout)
    # One narrow layer among many is usual; and checks run on meta, so that it is said once.
    if len(too_wide) * 10 > len(chosen) and not _weight(names[chosen[0]]).is_meta:
        log.warning(
            "adapter.rank = %d is more than the full rank of %d modules, such as %s; a smaller rank "
            "trains the same there",
            rank,
            len(too_wide),
            too_wide[0],
        )
    return chosen


def adaptable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Linear and Conv2d modules by name, adapted ones included."""
    found = model.named_modules()
    return {name: module for name, module in found if isinstance(module, nn.Linear | nn.Conv2d)}


def module_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Weight shapes of the adaptable modules: what the layouts of LoRA files are derived from.
    A model on meta will do."""
    return {name: tuple(_weight(m).shape) for name, m in adaptable_modules(model).items()}


def adapted_modules(model: nn.Module) -> dict[str, _Adapted]:
    """Modules that `apply_lora` adapted, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _Adapted)}


def lora_state(model: nn.Module) -> dict[str, LoraPair]:
    """The adapter of a model, by module name; shares memory with the parameters."""
    return {
        name: LoraPair(m.lora_A.detach(), m.lora_B.detach(), m.lora_alpha)
        for name, m in adapted_modules(model).items()
    }


def lora_from_parameters(parameters: Mapping[str, Tensor], *, alpha: float) -> dict[str, LoraPair]:
    """The same from saved parameters, "<module>.lora_A" and "<module>.lora_B"."""
    modules = [key.removesuffix(".lora_A") for key in parameters if key.endswith(".lora_A")]
    return {
        name: LoraPair(parameters[f"{name}.lora_A"], parameters[f"{name}.lora_B"], alpha)
        for name in modules
    }


def set_lora_(model: nn.Module, lora: Mapping[str, LoraPair], *, origin: str) -> None:
    """Copies `lora` into an adapted model, keeping each delta W.

    The model's rank and alpha hold: B is multiplied by the quotient of the scales, and a smaller
    rank is padded (rows of A as initialised, columns of B zero). ConfigError if a module of `lora`
    is not adapted or needs a higher rank; `origin` names the file in the message.
    """
    adapted = adapted_modules(model)
    problems = []
    left_out = [name for name in lora if name not in adapted]
    if left_out:
        problems.append(
            f"adapter.init_from: {origin} adapts {len(left_out)} modules that adapter.targets leaves "
            f"out, such as {left_out[0]}; add them to adapter.targets"
        )
    needed = max((pair.rank for pair in lora.values()), default=0)
    ranks = {module.lora_A.shape[0] for module in adapted.values()}
    if ranks and needed > min(ranks):
        problems.append(
            f"adapter.rank = {min(ranks)} is less than the rank {needed} of adapter.init_from "
            f"({origin}); set adapter.rank = {needed} or more"
        )
    if problems:
        raise ConfigError(problems)
    padded = 0
    with torch.no_grad():
        for name, pair in lora.items():
            module = adapted[name]
            module.lora_A[: pair.rank].copy_(pair.A)
            module.lora_B.zero_()
            B = pair.B.float()
            if pair.scale != module._scale():
                B = B * (pair.scale / module._scale())
            module.lora_B[:, : pair.rank].copy_(B)
            padded += pair.rank < module.lora_A.shape[0]
    log.info(
        "%s: %d of %d adapted modules start from it (%d of smaller rank, filled up with zeros)",
        origin,
        len(lora),
        len(adapted),
        padded,
    )


@cache
def _adapted_class(base: type) -> type:
    mixin = _AdaptedConv2d if issubclass(base, nn.Conv2d) else _AdaptedLinear
    return type(f"Lora{base.__name__}", (mixin, base), {"__module__": __name__})


def _adapt(module: nn.Module, A: Tensor, B: Tensor, *, alpha: float, dropout: float) -> None:
    if isinstance(module, _Adapted):
        raise ValueError("the model has an adapter already")
    # The class of this one object: its weights, hooks and place in the parent stay untouched.
    base: type = type(module)
    module.__class__ = _adapted_class(base)
    assert isinstance(module, _Adapted)
    module.lora_A = nn.Parameter(A)
    module.lora_B = nn.Parameter(B)
    module.lora_alpha = float(alpha)
    module.lora_dropout = dropout


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"lora {seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _matching(target: str, names: Mapping[str, nn.Module]) -> bool:
    return any(fnmatchcase(name, target) for name in names)


def _unmatched(target: str, names: Sequence[str]) -> str:
    """The problem of a pattern without a match, with the nearest module names."""
    head = f'adapter.targets: "{target}" matches no Linear or Conv2d of the network'
    below = [name for name in names if fnmatchcase(name, f"{target}.*")]
    if below:
        return f'{head}; for everything below it write "{target}.*"'
    inside = [name for name in names if fnmatchcase(name, f"*.{target}")]
    if inside:
        return f'{head} as a whole name; write "*.{target}"'
    bare = target.strip("*.")
    parts = bare.count(".") + 1
    tails: dict[str, str] = {}
    for name in names:
        tails.setdefault(".".join(name.split(".")[-parts:]), name)
    close = difflib.get_close_matches(bare, tails, n=3, cutoff=0.3) or list(tails)[:3]
    return f"{head}; nearest: {', '.join(tails[tail] for tail in close)}"
