"""Gate compiled_launches: kernels of a training step whose blocks are compiled, by kind.

A step of each config at its real size is followed once to see which graphs it calls with what; each
different one is compiled as far as its schedule, and multiplied by how often it is called. What runs
outside of graphs runs op by op, and is counted with the graphs left out. Bytes are those that the
kernels read and write.

Fused blocks are compiled as the trainer does, forward and backward apart; what their operations launch is
found by own_launches.py. They are compared with the same network of plain blocks, each compiled as a
whole: `launches_percent_of_plain`. Both do the same with activations. `copies_in_blocks` are launches in
graphs that move values, join them or convert their dtype, and `copies` says which.

A kernel of Inductor's is one launch here, an operation of torch one in gate launches, which may take
several kernels. The numbers of the two gates are in different units and are not compared.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from benchmarks.harness import Row
from benchmarks.static.compiled import block_kinds, compile_blocks
from benchmarks.static.costs import Costs
from benchmarks.static.kinds import LAUNCHED
from benchmarks.static.models import config_named, model_folder
from benchmarks.static.schedule import Schedule, Scheduled
from benchmarks.static.stand_in import Like, stand_in
from benchmarks.static.step import costs_of_a_step, gib, rehearsed
from fasttune.build import adapt
from fasttune.config import Config
from fasttune.memory.activations import Choice, policy_of
from fasttune.models import MODELS
from fasttune.models.compiled import Compiler
from fasttune.models.formulas import FORMULAS
from fasttune.models.fused import fuse, unfuse
from fasttune.models.layers import Block, set_recompute
from fasttune.models.weights import build_on_meta, set_tensor
from fasttune.rehearsal import Rehearsal

VERSIONS = ("torch", "triton", "python")
CONFIGS: dict[str, tuple[Choice, ...]] = {
    "flux-lora-32gb": ("recompute", "save"),
    "sdxl-lora-12gb": ("recompute",),
}
"""One of each architecture, by what becomes of activations: a graph of a U-Net takes seconds, and the
others are of the same code."""


def rows() -> Iterator[Row]:
    for name, activations in CONFIGS.items():
        config = config_named(name)
        yield from rows_of(name, config, model_folder(name, config), activations)


def rows_of(
    name: str, config: Config, folder: Path, activations: tuple[Choice, ...]
) -> Iterator[Row]:
    """Launches of a step of plain and of fused blocks, and how many of them are in graphs."""
    plain = plain_blocks(config, folder)
    for choice in activations:
        said = f"{name}, {choice}"
        expected = plain.row(f"{said}, plain blocks compiled", twice=choice == "recompute")
        yield expected
        memory = replace(config.memory, activations=choice)
        fused = fused_blocks(replace(config, memory=memory), folder)
        row = fused.row(f"{said}, blocks compiled")
        percent = round(100 * row["launches"] / expected["launches"])
        copies = [f"{count} of {what}" for what, count in fused.graphs().copies.most_common()]
        yield {**row, "launches_percent_of_plain": percent, "copies": copies}


@dataclass(kw_only=True, slots=True)
class Launches:
    """Of a step: what runs op by op, and the graphs with how often they are called."""

    outside: Costs
    forward: list[tuple[Scheduled, int]] = field(default_factory=list)
    """Of plain blocks, which are recomputed as a whole. Fused blocks do so in their backward."""
    backward: list[tuple[Scheduled, int]] = field(default_factory=list)

    def graphs(self, *, twice: bool = False) -> Scheduled:
        """All calls of graphs, those of forwards once or twice."""
        called = [*self.forward * (2 if twice else 1), *self.backward]
        return sum((found.times(count) for found, count in called), Scheduled())

    def row(self, case: str, *, twice: bool = False) -> Row:
        """The numbers."""
        graphs = self.graphs(twice=twice)
        total = self.outside.launches + graphs.launches
        return {
            "case": case,
            "launches": total.total(),
            **{kind: total[kind] for kind in LAUNCHED},
            "launches_outside_of_graphs": self.outside.launches.total(),
            "copies_in_blocks": graphs.launches["copy"],
            "moved_gib": gib(self.outside.bytes + graphs.bytes),
            "graphs": sum(bool(found.launches) for found, _ in [*self.forward, *self.backward]),
        }


# --- Fused blocks


class LeftOut:
    """In the place of a compiler: notes what is called and how often, and computes nothing after the
    first call. Under a FakeTensorMode."""

    def __init__(self) -> None:
        self.graphs: list[tuple[str, Callable[..., Any], tuple[Like, ...]]] = []
        self.calls: Counter[int] = Counter()

    def __call__(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        number = len(self.graphs)
        outputs: list[Any] = []

        def run(*tensors: Tensor) -> Any:
            if not outputs:
                self.graphs[number] = name, function, tuple(Like.of(x) for x in tensors)
                outputs.append(tree_map(Like.of, function(*tensors)))
            self.calls[number] += 1
            return tree_map(Like.empty, outputs[0])

        self.graphs.append((name, function, ()))
        return run


def fused_blocks(config: Config, folder: Path) -> Launches:
    """Of a step whose fused blocks are compiled."""
    with rehearsed(config, folder) as rehearsal:
        left_out, policy = LeftOut(), policy_of(config.memory.activations)
        dtype = rehearsal.placement.compute_dtype
        kinds = fuse(rehearsal.denoiser, FORMULAS, policy=policy, compile=left_out, dtype=dtype)
        assert "plain" not in kinds
        rehearsal.micro_batch()
        calls = left_out.calls.copy()
        launches = Launches(outside=costs_of_a_step(rehearsal, config.train.gradient_accumulation))
    for number, (name, function, likes) in enumerate(left_out.graphs):
        count = calls[number] * config.train.gradient_accumulation
        found = schedule_of_function(function, name, likes)
        (launches.backward if name.endswith("backward") else launches.forward).append(
            (found, count)
        )
    return launches


def schedule_of_function(
    function: Callable[..., Any], name: str, likes: tuple[Like, ...]
) -> Scheduled:
    """What the function would launch, compiled as the trainer does for tensors like these. Theirs is
    memory that nobody touches, which takes up none."""
    torch._dynamo.reset()
    schedule = Schedule()
    with torch.no_grad():
        Compiler(backend=schedule)(function, name)(*(like.empty() for like in likes))
    return schedule.forward


# --- Plain blocks


@dataclass(frozen=True, slots=True)
class Call:
    """A plain block's call: all that its graphs depend on."""

    kind: str
    inputs: tuple[Like | None, ...]


def plain_blocks(config: Config, folder: Path) -> Launches:
    """Of a step whose plain blocks are compiled."""
    with rehearsed(config, folder) as rehearsal:
        unfuse(rehearsal.denoiser)
        calls = leave_out_blocks(rehearsal)
        launches = Launches(outside=costs_of_a_step(rehearsal, config.train.gradient_accumulation))
        dtypes = {key: p.dtype for key, p in rehearsal.denoiser.named_parameters()}
    network = _on_meta(config, folder)
    for call, count in calls.items():
        schedule = schedule_of(_block(network, call.kind, dtypes), call)
        count *= config.train.gradient_accumulation
        launches.forward.append((schedule.forward, count))
        launches.backward.append((schedule.backward, count))
    return launches


def leave_out_blocks(rehearsal: Rehearsal) -> Counter[Call]:
    """Puts nothing in the place of each block, and returns the calls of one micro-batch, without
    those of a recomputation. Under a FakeTensorMode."""
    calls: Counter[Call] = Counter()
    outputs: dict[Call, Any] = {}
    for kind, blocks in block_kinds(rehearsal.denoiser).items():
        for block in blocks:
            _leave_out(kind, block, calls, outputs)
    set_recompute(rehearsal.denoiser, False)
    rehearsal.micro_batch()
    return calls.copy()


def _leave_out(kind: str, block: Block, calls: Counter[Call], outputs: dict[Call, Any]) -> None:
    inner, parameters = block.forward, list(block.parameters())

    def forward(*args: Tensor | None) -> Any:
        call = Call(kind, tuple(None if x is None else Like.of(x) for x in args))
        calls[call] += 1
        if call not in outputs:
            outputs[call] = tree_map(Like.of, inner(*args))
        likes, structure = tree_flatten(outputs[call])
        return tree_unflatten(stand_in(likes, [*args, *parameters]), structure)

    block.forward = forward


def _on_meta(config: Config, folder: Path) -> nn.Module:
    spec = MODELS[config.model.family]
    network = build_on_meta(spec, folder)
    adapt(config, spec, network)
    return network.train()


def _block(network: nn.Module, kind: str, dtypes: dict[str, torch.dtype]) -> Block:
    """The first block of a kind with memory that nobody has touched, which takes up none."""
    _, name = kind.split()
    block = network.get_submodule(name)
    assert isinstance(block, Block)
    for key, parameter in list(block.named_parameters()):
        value = torch.empty(parameter.shape, dtype=dtypes[f"{name}.{key}"])
        set_tensor(block, key, value)
        block.get_parameter(key).requires_grad_(parameter.requires_grad)
    return block


def schedule_of(block: Block, call: Call) -> Schedule:
    """What the block would launch when called so, forward and backward."""
    torch._dynamo.reset()
    schedule = Schedule()
    compile_blocks(block, backend=schedule)
    inputs = [None if like is None else _made(like) for like in call.inputs]
    outputs = [x for x in tree_leaves(block(*inputs)) if x.requires_grad]
    wanted = [x for x in (*inputs, *block.parameters()) if x is not None and x.requires_grad]
    if outputs:
        torch.autograd.grad(outputs, wanted, [torch.empty_like(x) for x in outputs])
    return schedule


def _made(like: Like) -> Tensor:
    return like.empty().requires_grad_(like.requires_grad)
