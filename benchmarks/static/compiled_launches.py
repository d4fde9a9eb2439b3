"""Gate compiled_launches: kernels of a training step whose blocks are compiled, by kind.

A step of each config at its real size is followed once to see which blocks it calls with what; each
different call is compiled as far as its schedule, forward and backward, and multiplied by how often it
occurs. What runs outside of the blocks runs op by op, and is counted with the blocks left out. Bytes
are those that the kernels read and write.

A kernel of Inductor's is one launch here, an operation of torch one in gate launches, which may take
several kernels. The numbers of the two gates are in different units and are not compared.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from benchmarks.harness import Row
from benchmarks.static.compiled import block_kinds, compile_blocks
from benchmarks.static.kinds import LAUNCHED
from benchmarks.static.models import config_named, model_folder
from benchmarks.static.schedule import Schedule, Scheduled
from benchmarks.static.stand_in import Like, stand_in
from benchmarks.static.step import costs_of_a_step, gib, rehearsed
from fasttune.build import adapt
from fasttune.config import Config
from fasttune.models import MODELS
from fasttune.models.layers import Block, set_recompute
from fasttune.models.weights import build_on_meta, set_tensor
from fasttune.rehearsal import Rehearsal

VERSIONS = ("torch", "triton", "python")
CONFIGS = ("flux-lora-32gb", "sdxl-lora-12gb")
"""One of each architecture: a graph of a U-Net takes seconds, and the others are of the same code."""


def rows() -> Iterator[Row]:
    for name in CONFIGS:
        config = config_named(name)
        yield row_of(name, config, model_folder(name, config))


@dataclass(frozen=True, slots=True)
class Call:
    """A block's call: all that its graphs depend on."""

    kind: str
    inputs: tuple[Like | None, ...]


def row_of(name: str, config: Config, folder: Path) -> Row:
    """Launches of a step, and how many of them are in blocks."""
    with rehearsed(config, folder, micro_batches=1) as rehearsal:
        calls = leave_out_blocks(rehearsal)
        outside = costs_of_a_step(rehearsal, config.train.gradient_accumulation)
        dtypes = {key: p.dtype for key, p in rehearsal.denoiser.named_parameters()}
    forwards = 2 if config.memory.activations == "recompute" else 1
    network = _on_meta(config, folder)
    blocks = Scheduled()
    for call, count in calls.items():
        schedule = schedule_of(_block(network, call.kind, dtypes), call)
        once = schedule.forward.times(forwards) + schedule.backward
        blocks += once.times(count * config.train.gradient_accumulation)
    total = outside.launches + blocks.launches
    return {
        "case": f"{name}, blocks compiled",
        "launches": total.total(),
        **{kind: total[kind] for kind in LAUNCHED},
        "launches_outside_of_blocks": outside.launches.total(),
        "moved_gib": gib(outside.bytes + blocks.bytes),
        "graphs": len(calls),
    }


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
    found = calls.copy()
    recompute = rehearsal.config.memory.activations == "recompute"
    set_recompute(rehearsal.denoiser, recompute)
    return found


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
