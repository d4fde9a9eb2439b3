"""What Inductor would launch for a compiled function, decided on a machine without a GPU.

Graphs go through dynamo, autograd's partitioner, lowering and fusion as in any compilation, with the
fusion rules of the Triton backend, and end there: no code is generated and nothing runs, so tensors of
any size will do as long as nobody touches their memory.

What a GPU may do otherwise: reductions over different dimensions of one tensor are fused with each other
there, loops are reordered to fuse more, matrix products may be padded; the operation of its attention may
ask for other strides, which is a copy more or less; and a bias gradient of a convolution is summed
apart. Concatenations are fused with what reads them, which a GPU's compilation does of up to eight
tensors if that saves a copy. Counts therefore compare two versions of a block and are not those of a
profiler.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch._inductor.config as inductor_config
from torch import fx
from torch._inductor import ir
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.scheduler import (
    BaseSchedulerNode,
    ExternKernelSchedulerNode,
    NopKernelSchedulerNode,
    SchedulerNode,
)
from torch._ops import OpOverload
from torch.utils._pytree import tree_map

from benchmarks.static.kinds import Kind, is_own, kind_of
from benchmarks.static.own_launches import PROCESSORS, launches_of
from benchmarks.static.stand_in import Like

CARD: dict[str, Any] = {
    "multi_processor_count": PROCESSORS,
    "max_threads_per_multi_processor": 1536,
    "regs_per_multiprocessor": 65536,
    "warp_size": 32,
}
"""The card whose size decides which reductions are split in two: an RTX 4090 (NVIDIA's Ada tuning guide;
128 multiprocessors). The processor at hand must not decide it."""

MOVES = frozenset(
    """
    load store output to_dtype to_dtype_bitcast constant index_expr get_index masked_subblock masked where
    set_indirect indirect_indexing check_bounds lt le gt ge eq ne and_ or_ logical_and logical_or
    """.split()
)
"""Operations of a kernel that moves values, joins or pads them, or converts their dtype."""


@dataclass(slots=True)
class Scheduled:
    """What one pass over a graph launches."""

    launches: Counter[str] = field(default_factory=Counter)
    """By kind."""
    bytes: int = 0
    """Read and written by all kernels, each buffer once a kernel."""
    copies: Counter[str] = field(default_factory=Counter)
    """The kernels of kind "copy": shape and dtype written, operations, the function they are in."""

    def __add__(self, other: "Scheduled") -> "Scheduled":
        return Scheduled(
            self.launches + other.launches, self.bytes + other.bytes, self.copies + other.copies
        )

    def times(self, count: int) -> "Scheduled":
        launches, copies = (
            Counter({key: n * count for key, n in counts.items()})
            for counts in (self.launches, self.copies)
        )
        return Scheduled(launches, self.bytes * count, copies)


@dataclass(slots=True)
class Schedule:
    """A torch.compile backend; holds what the graphs that it was given would launch."""

    forward: Scheduled = field(default_factory=Scheduled)
    backward: Scheduled = field(default_factory=Scheduled)

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return compile_fx(graph, inputs, inner_compile=self._compile)

    def _compile(self, graph: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        found = scheduled(graph, inputs, **kwargs)
        if kwargs.get("is_backward"):
            self.backward += found
        else:
            self.forward += found
        return _nothing(graph)


class _Scheduled(BaseException):
    """Ends a compilation. No Exception, which Inductor would wrap."""


def scheduled(graph: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Scheduled:
    """The schedule of a graph of aten operations; keywords are those of compile_fx_inner."""
    result: list[Scheduled] = []

    def stop(nodes: list[BaseSchedulerNode]) -> list[BaseSchedulerNode]:
        launches: Counter[str] = Counter()
        copies: Counter[str] = Counter()
        for node in nodes:
            found = launches_of_node(node)
            launches += found
            if found["copy"]:
                copies[_said(node)] += found["copy"]
        launched = [node for node in nodes if not isinstance(node, NopKernelSchedulerNode)]
        size = sum(int(node.get_read_write_buffers_sizes()) for node in launched)
        result.append(Scheduled(launches, size, copies))
        raise _Scheduled

    try:
        with _as_on_a_gpu(), inductor_config.patch(_post_fusion_custom_pass=stop):
            compile_fx_inner(graph, inputs, **kwargs)
    except _Scheduled:
        return result[0]
    return Scheduled()  # an empty graph is not scheduled


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    create = DeviceProperties.create

    def card(device: torch.device) -> DeviceProperties:
        return create(device)._replace(**CARD)

    with (
        # channels last or not is decided for convolutions as on a GPU, not by what oneDNN prefers
        mock.patch.object(torch.backends.mkldnn, "is_available", lambda: False),
        mock.patch.object(DeviceProperties, "create", card),
        inductor_config.patch(
            cpu_backend="triton",
            layout_optimization=True,
            fx_graph_cache=False,
            force_pointwise_cat=True,  # a processor copies the parts one by one
        ),
    ):
        yield


def launches_of_node(node: BaseSchedulerNode) -> Counter[str]:
    """By kind. An operation of ours launches what its code does."""
    kind = kind_of_node(node)
    if kind is None:
        return Counter()
    op = getattr(node.node, "op_overload", None)
    if not isinstance(op, OpOverload) or not is_own(op):
        return Counter([kind])
    args, kwargs = node.node.unflatten_args(node.node.inputs, node.node.constant_args)
    return launches_of(op, *tree_map(_without_memory, (args, {**node.node.kwargs, **kwargs})))


def _without_memory(x: Any) -> Any:
    if not isinstance(x, ir.IRNode):
        return x
    size, stride = ([int(n) for n in found] for found in (x.get_size(), x.get_stride()))
    return torch.empty_strided(size, stride, dtype=x.get_dtype(), device="meta")


def _said(node: BaseSchedulerNode) -> str:
    """Such as "48x3072 bfloat16, cat, convert_element_type in _adapters"."""
    op = getattr(node.node, "op_overload", None)
    if isinstance(op, OpOverload) and is_own(op):
        return f"inside of {op.name()}"
    buffers = [part.node for part in node.get_nodes() if part.node is not None]
    if any(isinstance(buffer.layout, ir.MultiOutputLayout) for buffer in buffers):
        return f"results of {op}"
    largest = max(buffers, key=lambda buffer: math.prod(int(n) for n in buffer.get_size()))
    origins = [x for x in largest.get_origins() if _computes(x)]
    names = dict.fromkeys(x.target._schema.name.partition("::")[2] for x in origins)
    dims = "x".join(str(n) for n in largest.get_size())
    dtype = str(largest.get_dtype()).removeprefix("torch.")
    places = dict.fromkeys(filter(None, map(_place, origins)))
    return f"{dims} {dtype}, {', '.join(names)} in {', '.join(places)}"


def _place(node: fx.Node) -> str:
    """The innermost function that the node was traced in."""
    frames = [line for line in (node.stack_trace or "").splitlines() if line.startswith("  File")]
    return frames[-1].rpartition(" in ")[2] if frames else ""


def _computes(node: fx.Node) -> bool:
    """Whether the node is an operation that a kernel of torch's can be for."""
    return isinstance(node.target, OpOverload) and not (
        kind_of(node.target) == "view" or is_own(node.target)
    )


def kind_of_node(node: BaseSchedulerNode) -> Kind | None:
    """The kind of a scheduled kernel; None for what launches nothing."""
    if isinstance(node, NopKernelSchedulerNode):
        return None
    if isinstance(node, ExternKernelSchedulerNode):
        if isinstance(node.node, ir.MultiOutput):  # one of a kernel's results
            return None
        op = getattr(node.node, "op_overload", None)
        if isinstance(op, OpOverload):
            kind = kind_of(op)
            return None if kind == "view" else kind
        return "custom"  # a Triton kernel of our own, or an operation that holds graphs
    bodies = [part._body for part in node.get_nodes() if isinstance(part, SchedulerNode)]
    moves = all(MOVES.issuperset(body.op_counts) for body in bodies)
    return "copy" if moves else "pointwise"


def _nothing(graph: fx.GraphModule) -> Callable[[list[Any]], list[Any]]:
    """In the place of compiled code: takes a list of inputs, gives uninitialised outputs."""
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    outputs = [
        Like.of(node.meta["val"]) if isinstance(node, fx.Node) else node for node in output.args[0]
    ]

    def run(inputs: list[Any]) -> list[Any]:
        inputs.clear()
        return [like.empty() if isinstance(like, Like) else like for like in outputs]

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
