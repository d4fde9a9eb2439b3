"""Gate blocks: what each repeated block holds for its backward, and the peak inside the backward.

All sizes are in u, the bytes of one activation of the block in bf16: tokens x width, of images and text
together in Flux; the input's for a ResNet block. A block is traced at its real size on fake tensors,
in the dtypes of a GPU with bf16 and with RMSNorm as one operation, as there; batch 1, feature maps in
channels_last. Of the fused block, by what its policy does with the tensors it keeps:

  saved_u            all as they are: held after the forward beyond the block's parameters, inputs and
                     outputs. An input that is kept is no further memory, and an output is the next
                     block's input: in a chain of blocks each counts 1 u on top.
  backward_peak_u    the most held in the backward beyond parameters and inputs: what was saved,
                     gradients of outputs, inputs and trained weights, temporaries. The outputs
                     are gone by then, unless saved, and so is their gradient once it is used.
  int8_u             all rounded to int8
  mixed_u            by the table in "mixed", nothing rounded: the MLP's first product is made again, and
                     what is left is at most 55 % of min_cut_u, also where saving all is not
  recompute_u        none kept, all computed again
  ..._backward_peak_u of each
  tensors            what makes up saved_u: count, shape, dtype, u of each, operation

and of the same block as plain modules, without a formula:

  plain_u, plain_backward_peak_u
                     in eager PyTorch
  min_cut_u          what torch.compile would save of it: AOTAutograd's min-cut partition of the
                     joint graph, after Inductor's decompositions
  percent_of_min_cut and so on: saved_u, int8_u and mixed_u in terms of it

In "full" all weights train, in bf16, and gradients of the conditioning are wanted; in "lora" the
adapters of a preset (rank 16, float32) and the block's input; "frozen" is a block without adapters in
such a run.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from benchmarks.harness import Row
from benchmarks.static.gpu_operations import as_on_gpu
from benchmarks.static.own_launches import scratch_of
from fasttune.adapters.lora import adaptable_modules, apply_lora
from fasttune.memory.activations import Policy
from fasttune.memory.trace import Held, MemoryTrace, exact_size
from fasttune.models import MODELS, layers
from fasttune.models.flux import DoubleBlock, SingleBlock
from fasttune.models.formulas import FORMULAS
from fasttune.models.fused import Formula, fuse
from fasttune.models.layers import run_block
from fasttune.models.unet import ResnetBlock, TransformerBlock
from fasttune.models.unet_config import read_unet_config
from fasttune.models.weights import set_tensor

VERSIONS = ("torch", "triton")
RANK = 16
SMALL = 0.0005
"""u below which tensors are summed up in one line."""

POLICIES = {"": Policy(), "int8": Policy("int8"), "recompute": Policy("recompute")}
"""Prefix of the columns -> what becomes of kept tensors."""
MIXED = Policy(choices={"mlp": "recompute"})

Formulas = Mapping[type[layers.Block], Formula]


@dataclass(frozen=True, slots=True)
class Input:
    """An argument of a block."""

    shape: tuple[int, ...]
    trains: str = "never"
    """When its gradient is wanted: "always", "full" or "never"."""
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A block as a model has it. `build` is called under torch.device("meta")."""

    name: str
    family: str
    place: str
    """Where the model has it, which is what the patterns of adapter presets are written for."""
    build: Callable[[], nn.Module]
    inputs: tuple[Input, ...]
    has_adapters: bool = True
    mixed: Policy | None = None
    """A further policy to look at."""

    @property
    def unit(self) -> int:
        """Bytes of a u."""
        return sum(2 * torch.Size(x.shape).numel() for x in self.inputs if x.trains == "always")


def _flux() -> Iterator[Kind]:
    text, image, width, heads = 512, 4096, 3072, 24
    tables = [Input((text + image, 1, 64), dtype=torch.float32)] * 2
    vector = Input((1, width), "full")
    yield Kind(
        name="flux double",
        family="flux",
        place="transformer_blocks",
        build=lambda: DoubleBlock(width, heads),
        inputs=(
            Input((1, image, width), "always"),
            Input((1, text, width), "always"),
            vector,
            *tables,
        ),
        mixed=MIXED,
    )
    yield Kind(
        name="flux single",
        family="flux",
        place="single_transformer_blocks",
        build=lambda: SingleBlock(width, heads),
        inputs=(Input((1, text + image, width), "always"), vector, *tables),
        mixed=MIXED,
    )


def _transformer(name: str, family: str, width: int, tokens: int, text: int, heads: int) -> Kind:
    def build() -> nn.Module:
        return TransformerBlock(width, text, heads)

    return Kind(
        name=f"{name} transformer {width}",
        family=family,
        place="transformer_blocks",
        build=build,
        inputs=(Input((1, tokens, width), "always"), Input((1, 77, text))),
        mixed=MIXED,
    )


def _resnet(channels: int, out_channels: int, side: int) -> Kind:
    def build() -> nn.Module:
        return ResnetBlock(channels, out_channels, 1280, read_unet_config({}))

    return Kind(
        name=f"sdxl resnet {channels} to {out_channels}",
        family="sdxl",
        place="resnets",
        build=build,
        inputs=(Input((1, channels, side, side), "always"), Input((1, 1280), "full")),
        has_adapters=False,
    )


KINDS = (
    *_flux(),
    _transformer("sdxl", "sdxl", 640, 4096, 2048, 10),
    _transformer("sdxl", "sdxl", 1280, 1024, 2048, 20),
    _transformer("sd1", "sd1", 320, 4096, 768, 8),
    _resnet(320, 320, 128),
    _resnet(1280, 1280, 32),
    _resnet(320, 640, 64),
)


def rows() -> Iterator[Row]:
    for kind in KINDS:
        presets = MODELS[kind.family].adapter_targets if kind.has_adapters else {"": ()}
        for preset, patterns in presets.items():
            yield row(kind, f"lora {preset}" if preset else "frozen", patterns)
        yield row(kind, "full", None)


def row(
    kind: Kind, variant: str, patterns: tuple[str, ...] | None, formulas: Formulas = FORMULAS
) -> Row:
    """One block and what trains: adapters at the places that match `patterns`, or all if None."""
    policies = POLICIES if kind.mixed is None else POLICIES | {"mixed": kind.mixed}
    with FakeTensorMode():
        block = Block(kind, patterns)
        min_cut = block.min_cut()
        plain = block.traced()
        fused = {name: block.fused(policy, formulas).traced() for name, policy in policies.items()}
    found: Row = {"case": f"{kind.name}, {variant}"}
    for name, traced in fused.items():
        found[f"{name or 'saved'}_u"] = traced.saved
        found[f"{name}_backward_peak_u".removeprefix("_")] = traced.peak
        if name != "recompute":
            percent = f"{name}_percent_of_min_cut".removeprefix("_")
            found[percent] = round(100 * traced.saved / min_cut)
    found |= {
        "plain_u": plain.saved,
        "plain_backward_peak_u": plain.peak,
        "min_cut_u": min_cut,
        "tensors": fused[""].tensors,
    }
    if kind.mixed is not None:
        found["mixed"] = ", ".join(f"{name} {how}" for name, how in kind.mixed.choices.items())
    return found


class Block:
    """A block of fake weights with its inputs, plain at first. Make it under a FakeTensorMode."""

    def __init__(self, kind: Kind, patterns: tuple[str, ...] | None) -> None:
        with torch.device("meta"):
            root = nn.ModuleDict({kind.place: nn.ModuleList([kind.build()])})
        for name, p in list(root.named_parameters()):
            set_tensor(root, name, torch.empty(p.shape, dtype=torch.bfloat16))
        names = adaptable_modules(root)
        found = [p for p in patterns or () if any(fnmatchcase(name, p) for name in names)]
        if found:
            apply_lora(root, targets=found, rank=RANK, alpha=RANK)
        else:
            root.requires_grad_(patterns is None)
        self.module: nn.Module = root.get_submodule(f"{kind.place}.0")
        self.unit = kind.unit
        self.inputs: list[Tensor | None] = [
            _empty(x).requires_grad_(
                x.trains == "always" or (x.trains == "full" and patterns is None)
            )
            for x in kind.inputs
        ]
        if kind.family == "flux":
            self.inputs.append(None)  # no text mask

    def fused(self, policy: Policy, formulas: Formulas = FORMULAS) -> "Block":
        """The block itself, by its formula from here on."""
        kinds = fuse(self.module, formulas, policy=policy)
        assert len(kinds) == 1 and "plain" not in kinds
        return self

    def traced(self) -> "Traced":
        """One forward and backward."""
        gc.collect()
        trace = MemoryTrace(self.module, rounding=exact_size, scratch=scratch_of(exact_size))
        trace.label("weights", self.module.parameters())
        trace.label("inputs", [x for x in self.inputs if x is not None])
        given = trace.live
        with as_on_gpu(self.module), trace:
            outputs = run_block(self.module, *self.inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            trace.label("inputs", outputs)  # the next block's
            saved = [held for held in trace.held() if held.category not in ("weights", "inputs")]
            end = _End.apply(*outputs)
            del outputs
            trace.reset_peak()
            end.backward()
            peak = trace.peak.bytes - given
        for tensor in [*self.inputs, *self.module.parameters()]:
            if tensor is not None:
                tensor.grad = None
        return Traced(
            saved=_in_units(sum(held.bytes for held in saved), self.unit),
            tensors=_lines(saved, self.unit),
            peak=_in_units(peak, self.unit),
        )

    def min_cut(self) -> float:
        """u that torch.compile would save."""
        from torch._inductor.decomposition import select_decomp_table  # slow to import

        graphs: list[torch.fx.GraphModule] = []

        def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        named = dict(self.module.named_parameters())
        given = [x for x in self.inputs if x is not None]

        def forward(*tensors: Tensor) -> Any:
            parameters = dict(zip(named, tensors[len(given) :], strict=True))
            rest = [None] * (len(self.inputs) - len(given))
            return functional_call(self.module, parameters, (*tensors[: len(given)], *rest))

        compiled = aot_function(
            forward,
            fw_compiler=keep,
            bw_compiler=keep,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        outputs = compiled(*given, *named.values())
        count = len(outputs) if isinstance(outputs, tuple) else 1
        return _in_units(_bytes_kept(graphs[0].graph, count), self.unit)


def _empty(x: Input) -> Tensor:
    if len(x.shape) == 4:
        return torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last)
    return torch.empty(x.shape, dtype=x.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Traced:
    """In u, as the columns of the row."""

    saved: float
    tensors: list[str]
    peak: float


class _End(torch.autograd.Function):
    """Stands for what follows the block: makes the gradients of its outputs and keeps nothing."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        ctx.like = [(x.shape, x.dtype) for x in outputs]
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(_empty(Input(shape, dtype=dtype)) for shape, dtype in ctx.like)


def _bytes_kept(forward: torch.fx.Graph, num_outputs: int) -> int:
    """Of the storages that a partitioned forward hands to its backward and were made in it."""
    (outputs,) = forward.find_nodes(op="output")[0].args

    def storages(nodes: Any) -> dict[int, int]:
        values = [node.meta.get("val") for node in nodes if isinstance(node, torch.fx.Node)]
        found = [value.untyped_storage() for value in values if isinstance(value, Tensor)]
        return {storage._cdata: storage.nbytes() for storage in found}

    known = storages(forward.find_nodes(op="placeholder")) | storages(outputs[:num_outputs])
    return sum(n for key, n in storages(outputs[num_outputs:]).items() if key not in known)


def _lines(saved: Sequence[Held], unit: int) -> list[str]:
    """Such as "2 of 1x4608x3072 bfloat16, 1.0 u, addmm"; the largest first, the smallest as one."""
    counts = Counter((h.bytes, h.shape, h.dtype, h.made_by) for h in saved)
    lines, small = [], 0
    for (nbytes, shape, dtype, made_by), count in sorted(counts.items(), key=_by_size):
        size = _in_units(nbytes, unit)
        if nbytes < SMALL * unit:
            small += count * nbytes
        else:
            dims = "x".join(map(str, shape))
            name = str(dtype).removeprefix("torch.")
            operation = made_by.removeprefix("aten.").removesuffix(".default")
            lines.append(f"{count} of {dims} {name}, {size} u, {operation}")
    rest = _in_units(small, unit)
    return [*lines, f"smaller ones, {rest} u"] if rest else lines


def _by_size(entry: tuple[tuple[Any, ...], int]) -> tuple[Any, ...]:
    (nbytes, shape, dtype, made_by), _ = entry
    return -nbytes, shape, str(dtype), made_by


def _in_units(nbytes: int, unit: int) -> float:
    return round(nbytes / unit, 3)
