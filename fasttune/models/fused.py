"""Blocks computed by formulas: a forward and a backward over our own operations, in place of autograd.

A `Formula` is what a kind of block computes, written down twice: as a forward that names what may be
kept, and as the backward that uses it. `fuse` gives each block of a network its formula. The block keeps
its class, parameters and names, and the forward of its class stays the reference (`unfuse`).

Why by hand: autograd keeps what each operation wants, and a compiler keeps what a cut through the graph of
small operations costs least. Neither drops normed inputs, rotated queries or GELU's output, which are one
pass over memory away from what is kept anyway. Selective checkpointing over the same operations drops
them, but its backward has all of the block's forward alive at once (31 u for a Flux single block where
this one has 19), and it cannot keep a tensor in int8.

Forward and backward are pure functions that run without gradients, so each is one graph to a compiler,
with no partitioner between them: what is kept is decided here. The autograd function around them is all
that autograd sees of the block.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fasttune.memory.activations import Kept, Policy, moved, pack
from fasttune.memory.offload import Offload
from fasttune.models.adapter_copy import AdapterCopy, pack_adapters_
from fasttune.models.layers import Block
from fasttune.models.projection import SEED, Projection, pack_, projection

Tensors = Mapping[str, Tensor]
Compile = Callable[[Callable[..., Any], str], Callable[..., Any]]
"""(function of tensors, its name) -> the same, compiled for the shapes that it is first called with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What a formula knows beside tensors: constants to a compiled graph."""

    projections: Mapping[str, Projection]
    """By the name that the formula has for them."""
    numbers: Mapping[str, Any]
    """Head counts, eps and the like."""
    wanted: frozenset[str]
    """Inputs and parameters whose gradient is wanted."""
    training: bool
    """Whether adapters drop out."""

    def wants(self, *names: str) -> bool:
        """Whether the gradient of one of them is wanted, where an operation makes all or none."""
        return not self.wanted.isdisjoint(names)

    def project(
        self, name: str, t: Tensors, x: Tensor, x2: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`Projection.forward` of the projection of that name."""
        return self.projections[name].forward(t, x, x2, training=self.training)


Forward = Callable[[Context, Tensors], tuple[tuple[Tensor, ...], dict[str, Tensor]]]
"""(context, inputs and parameters by name) -> outputs, and what the backward can use, by name."""
Backward = Callable[[Context, Tensors, Kept, Sequence[Tensor]], dict[str, Tensor]]
"""(context, inputs and parameters, what was kept, gradients of the outputs) -> gradients by name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Formula:
    """What a kind of block computes."""

    projections: Mapping[str, tuple[str, ...]]
    """Name in the formula -> the Linear modules that it joins."""
    inputs: Callable[..., dict[str, Tensor | None]]
    """(block, *arguments of its forward) -> inputs by name. Runs under autograd: small projections of
    the conditioning are made here."""
    stream: frozenset[str]
    """Inputs whose gradient is always made, so that a network's first block shares the others' graph."""
    numbers: Callable[[Any], dict[str, Any]]
    forward: Forward
    backward: Backward
    kept: frozenset[str]
    """Names that a policy may mention. A kept tensor "qkv/text" goes by the name "qkv"."""
    supports: Callable[[Any], bool] = lambda block: True
    """Whether the formula covers the block, adapters included."""
    compiles: bool = True
    """Whether a compiler has something to fuse between the operations."""


@dataclass(frozen=True, eq=False)
class Kind:
    """What equal blocks share: their formula, its constants, and their compiled graphs."""

    name: str
    """Class and name of the first of them: "ResnetBlock down_blocks.0.resnets.0"."""
    formula: Formula
    projections: Mapping[str, Projection]
    numbers: Mapping[str, Any]
    policy: Policy
    compile: Compile | None
    graphs: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    def forward(
        self, context: Context, names: tuple[str, ...], tensors: Sequence[Tensor], keeps: bool
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Outputs and, if it `keeps`, what the policy keeps."""

        def forward(*given: Tensor) -> Any:
            outputs, kept = self.formula.forward(context, dict(zip(names, given, strict=True)))
            return outputs, pack(kept, self.formula.kept, self.policy) if keeps else {}

        found: tuple[tuple[Tensor, ...], dict[str, Tensor]]
        found = self._run("forward", forward, context, names, tensors, keeps)
        return found

    def backward(
        self,
        context: Context,
        names: tuple[str, ...],
        tensors: Sequence[Tensor],
        kept: Tensors,
        gradients: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Gradients by name, of what is wanted."""
        ends = len(tensors), len(tensors) + len(kept)
        keys = tuple(kept)

        def backward(*given: Tensor) -> Any:
            t = dict(zip(names, given[: ends[0]], strict=True))
            saved = Kept(dict(zip(keys, given[ends[0] : ends[1]], strict=True)), given[-1].dtype)
            return self.formula.backward(context, t, saved, given[ends[1] :])

        given = (*tensors, *kept.values(), *gradients)
        found: dict[str, Tensor]
        found = self._run("backward", backward, context, names, given, True)
        return found

    def _run(
        self,
        direction: str,
        function: Callable[..., Any],
        context: Context,
        names: tuple[str, ...],
        given: Sequence[Tensor],
        keeps: bool,
    ) -> Any:
        """Calls the function, or its graph for tensors like these."""
        if self.compile is None or not keeps:  # samples are few, and of other shapes
            return function(*given)
        likes = tuple((x.shape, x.stride(), x.dtype) for x in given)
        key = direction, names, context.wanted, context.training, likes
        if key not in self.graphs:
            self.graphs[key] = self.compile(function, f"{self.name} {direction}")
        # detached: a graph is not to depend on whether an input has a gradient
        return self.graphs[key](*(x.detach() for x in given))


class FusedBlock:
    """The forward of one block, by its formula."""

    def __init__(self, block: Block, kind: Kind, offload: Offload) -> None:
        self.block, self.kind, self.offload = block, kind, offload
        self._tensors: dict[str, Tensor] = dict(block.named_parameters())
        self._joint: list[tuple[nn.Parameter, Tensor]] = []
        """A member and the joint weight that it is part of."""
        for each in kind.projections.values():
            packed = pack_(block, each)
            self._tensors |= packed
            self._joint += [
                (block.get_parameter(f"{each.members[0]}.weight"), joint)
                for joint in list(packed.values())[:1]
            ]
        self._wanted = frozenset(n for n, p in block.named_parameters() if p.requires_grad)
        self._drops_out = any(each.dropout for each in kind.projections.values())

    def add(self, tensors: Tensors) -> None:
        """Further tensors that the formula reads by name, and that need no gradient."""
        self._tensors |= tensors

    def _check_places(self) -> None:
        """That joint weights still are the memory of their members: `to()` and copying give the members
        memory of their own, and the block would go on with values that nothing trains."""
        for part, joint in self._joint:
            if part.untyped_storage()._cdata != joint.untyped_storage()._cdata:
                raise RuntimeError(
                    f"{self.kind.name}: its weights have been moved since fuse(); call fuse() after "
                    "to(), copying and the like"
                )

    def __call__(self, *args: Any) -> Any:
        """As the block's own forward."""
        self._check_places()
        formula, training = self.kind.formula, self.block.training
        inputs = {k: x for k, x in formula.inputs(self.block, *args).items() if x is not None}
        tensors = inputs | self._tensors
        if self._drops_out and training:
            device = next(iter(inputs.values())).device
            # MPS draws int64 as int32 (aten/src/ATen/native/mps/operations/Distributions.mm).
            tensors[SEED] = torch.randint(0, 2**31 - 1, (1,), device=device)
        wanted = frozenset(k for k, x in inputs.items() if x.requires_grad)
        keeps = torch.is_grad_enabled() and bool(wanted or self._wanted)
        context = Context(
            projections=self.kind.projections,
            numbers=self.kind.numbers,
            wanted=wanted | self._wanted | formula.stream if keeps else frozenset(),
            training=training,
        )
        names = tuple(tensors)
        if keeps:
            # What a recomputed block keeps is made right before its use.
            offload = None if self.block.recompute else self.offload
            outputs = _Apply.apply(self.kind, context, offload, names, *tensors.values())
        else:
            outputs, _ = self.kind.forward(context, names, list(tensors.values()), keeps=False)
        return outputs if len(outputs) > 1 else outputs[0]


class _Apply(torch.autograd.Function):
    """A fused block to autograd. Tensors leave and come back here, outside of compiled graphs."""

    @staticmethod
    def forward(
        ctx: Any,
        kind: Kind,
        context: Context,
        offload: Offload | None,
        names: tuple[str, ...],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        outputs, kept = kind.forward(context, names, tensors, keeps=True)
        ctx.kind, ctx.context, ctx.names, ctx.keys = kind, context, names, tuple(kept)
        ctx.offload, ctx.away = offload, None
        if offload is not None:
            leaving = moved(kept, kind.formula.kept, kind.policy)
            ctx.away = offload.send({key: x for key, x in kept.items() if key in leaving})
            if ctx.away is not None:
                kept = {key: x for key, x in kept.items() if key not in leaving}
        ctx.here = tuple(kept)
        ctx.strides = [x.stride() for x in outputs]
        ctx.save_for_backward(*tensors, *kept.values())
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing unpacks them anew each time
        tensors = saved[: len(ctx.names)]
        kept = dict(zip(ctx.here, saved[len(ctx.names) :], strict=True))
        if ctx.away is not None:
            kept |= ctx.offload.fetch(ctx.away)
        kept = {key: kept[key] for key in ctx.keys}  # graphs take them in this order
        if ctx.kind.compile is not None:
            # A network's last block of a kind may get a slice: one copy there spares a graph of its own.
            gradients = tuple(map(_laid_out, gradients, ctx.strides))
        found = ctx.kind.backward(ctx.context, ctx.names, tensors, kept, gradients)
        wanted = (found.get(n) if n in ctx.context.wanted else None for n in ctx.names)
        return None, None, None, None, *wanted


def _laid_out(x: Tensor, strides: Sequence[int]) -> Tensor:
    """The tensor with these strides."""
    if x.stride() == strides:
        return x
    return x.new_empty_strided(x.shape, strides).copy_(x)


def fuse(
    denoiser: nn.Module,
    formulas: Mapping[type[Block], Formula],
    *,
    policy: Policy = Policy(),  # noqa: B008  # frozen
    compile: Compile | None = None,
    offload: Offload | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, list[Block]]:
    """Gives every block that a formula covers its formula, and returns the kinds of blocks by name.

    Call it when weights and adapters are in place: weights that are used together are moved together,
    and each parameter becomes a view. Blocks without a formula, or with adapters that theirs does not
    cover, keep the forward of their class and are returned under the name "plain", if there are any.
    `offload` moves what the policy says, by default as the device of the tensors wants it. `dtype` is that
    of the computation, in which the network keeps a copy of its adapters that each of its forwards makes
    anew; without it blocks cast them.
    """
    unfuse(denoiser)
    offload = Offload() if offload is None else offload
    kinds: dict[Any, Kind] = {}
    found: dict[str, list[Block]] = {}
    fused: list[FusedBlock] = []
    for name, block in denoiser.named_modules():
        if not isinstance(block, Block):
            continue
        formula = formulas.get(type(block))
        if formula is None or not formula.supports(block):
            found.setdefault("plain", []).append(block)
            continue
        projections = {key: projection(block, *m) for key, m in formula.projections.items()}
        numbers = formula.numbers(block)
        key = (
            type(block),
            *projections.values(),
            *numbers.items(),
            *((n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters()),
        )
        if key not in kinds:
            label = f"{type(block).__name__} {name}"
            compiler = compile if formula.compiles else None
            kinds[key] = Kind(label, formula, projections, numbers, policy, compiler)
        fused.append(FusedBlock(block, kinds[key], offload))
        block.forward = fused[-1]  # type: ignore[method-assign]
        found.setdefault(kinds[key].name, []).append(block)
    owners = [each for each in fused for _ in each.kind.projections]
    places = [(each.block, p) for each in fused for p in each.kind.projections.values()]
    matrices, copy = pack_adapters_(places, dtype)
    for each, tensors in zip(owners, matrices, strict=True):
        each.add(tensors)
    if copy is not None:
        denoiser.register_forward_pre_hook(copy)
    return found


def adapter_copy(denoiser: nn.Module) -> AdapterCopy | None:
    """The network's copy of its adapters, if `fuse` made one."""
    hooks = denoiser._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, AdapterCopy)), None)


def kept_names(denoiser: nn.Module, formulas: Mapping[type[Block], Formula]) -> frozenset[str]:
    """What the blocks of a network keep, by the names that a policy has for it."""
    kinds = {type(module) for module in denoiser.modules()}
    return frozenset().union(*(formula.kept for kind, formula in formulas.items() if kind in kinds))


def unfuse(denoiser: nn.Module) -> None:
    """Gives every block the forward of its class again; parameters stay where they are."""
    hooks = denoiser._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, AdapterCopy)]:
        del hooks[key]
    for block in denoiser.modules():
        if isinstance(block, Block) and isinstance(vars(block).get("forward"), FusedBlock):
            del block.forward
