"""The compiled network that fused blocks are compared with: each plain block compiled as a whole, with
torch's partition of what it keeps, and graphs shared by equal blocks."""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fasttune.models.layers import Block

GRAPHS = 64
"""Most graphs of one kind of block: more than any list of buckets has shapes. The default of 8 would
leave the ninth bucket to eager mode without a word."""

Backend = str | Callable[..., Any]


def block_kinds(denoiser: nn.Module) -> dict[str, list[Block]]:
    """Blocks that compute the same on tensors of their own, under the class and the name of the
    first of them: "ResnetBlock down_blocks.0.resnets.0"."""
    kinds: dict[tuple[Any, ...], tuple[str, list[Block]]] = {}
    for name, block in denoiser.named_modules():
        if isinstance(block, Block):
            label = f"{type(block).__name__} {name}"
            kinds.setdefault(_structure(block), (label, []))[1].append(block)
    return dict(kinds.values())


def compile_blocks(
    denoiser: nn.Module, *, backend: Backend = "inductor", fullgraph: bool = True
) -> dict[str, list[Block]]:
    """Compiles the forward of every block's class for the shapes that it will see, and returns the
    kinds of blocks. `fullgraph=False` lets a graph break pass, so that it can be counted.

    torch keeps graphs by code object and tries their guards one after the other. Each kind therefore
    gets a copy of its class's code: its blocks share graphs, and try only those of their own kind.
    torch's limit of graphs is raised in the calling thread, which has to be the one that trains.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    kinds = block_kinds(denoiser)
    for name, blocks in kinds.items():
        forward = torch.compile(
            _own_code(type(blocks[0]).forward, name),
            backend=backend,
            fullgraph=fullgraph,
            dynamic=False,
        )
        for block in blocks:
            block.forward = types.MethodType(forward, block)
    return kinds


def _structure(block: Block) -> tuple[Any, ...]:
    """What decides the graph but for the inputs: classes, shapes, dtypes, and what is trained."""
    tensors = [*block.named_parameters(), *block.named_buffers()]
    return (
        *((name, type(module)) for name, module in block.named_modules()),
        *((name, t.shape, t.dtype, t.requires_grad) for name, t in tensors),
    )


def _own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same function, with a code object of its own."""
    assert isinstance(function, types.FunctionType)
    copy = types.FunctionType(
        function.__code__.replace(co_name=name),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
