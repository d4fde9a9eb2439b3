"""Gate graphs: what compiling the blocks costs over all aspect buckets, and that it changes no loss.

Each model is taken at the structure of its released config.json with small widths and at the sizes of
all its buckets, so token counts are the real ones. Blocks are fused and compiled by the trainer's own
`Compiler`: a graph for each kind of block, direction and shape. Graphs are made by torch.compile and
counted; in their place runs nothing, as graphs and guards depend on shapes alone. Losses are compared on
small images, where everything runs, by graphs of forward and backward without code generation: what a
processor's C++ would add says nothing of a GPU's kernels, and takes a minute to compile.

A block that does not compile as one graph, is compiled again after every shape was met once, or goes on
in eager mode is not wanted: a row that has any of it is a problem even where it is expected.
"""

import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from benchmarks.harness import Row
from benchmarks.static.models import config_named, model_folder
from benchmarks.static.shrunk import write_shrunk
from benchmarks.static.stand_in import Like
from fasttune.config import Config
from fasttune.device import Placement
from fasttune.errors import HardwareError
from fasttune.memory.activations import policy_of
from fasttune.models import MODELS
from fasttune.models.compiled import Backend, Compiler
from fasttune.models.formulas import FORMULAS
from fasttune.models.fused import fuse
from fasttune.models.layers import set_recompute
from fasttune.rehearsal import bucket_sizes, random_batch, rehearse

VERSIONS = ("torch", "python")
CONFIGS = ("flux-lora-32gb", "sdxl-lora-12gb", "sd1-lora-8gb", "sd2-lora-8gb", "quickstart")
SEQUENCES = ("flux",)
"""Families whose blocks see a sequence of tokens; those of a U-Net see height and width."""
RANK = 2
TOLERANCE = 1e-4
"""Largest relative difference between losses, or norms of gradients, compiled and eager: float32 keeps
7 digits, and a compiled sum adds up in another order."""
UNWANTED = (
    "graph_breaks",
    "buckets_recompiled",
    "buckets_recompiled_under_recompute",
    "eager_calls",
)
"""Counts that are 0 where blocks compile."""
LOSS_STEPS = 4
LOSS_SIZE = (64, 64)
"""In pixels: what the coarsest level of a U-Net makes one position of."""
CPU = Placement(
    device=torch.device("cpu"),
    base_dtype=torch.float32,
    compute_dtype=torch.float32,
    reason="structure alone",
)

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Case:
    """A run on a model's structure."""

    name: str
    config: Config
    folder: Path
    """Config files of the shrunk model."""

    @property
    def sizes(self) -> tuple[Size, ...]:
        """(width, height) in pixels of all buckets, as the run would make them."""
        return bucket_sizes(self.config, MODELS[self.config.model.family], self.folder)


def rows() -> Iterator[Row]:
    for name in CONFIGS:
        with shrunk_case(name, repeats=2) as case:  # a second block may differ from the first
            yield graphs_row(case, case.sizes)
        with shrunk_case(name, repeats=1) as case:
            yield losses_row(case, "aot_eager")


@contextmanager
def shrunk_case(name: str, *, repeats: int) -> Iterator[Case]:
    """A config of configs/ on its model's structure at small widths, and at most so many of what
    repeats."""
    config = config_named(name)
    config = replace(config, adapter=replace(config.adapter, rank=RANK, alpha=float(RANK)))
    with tempfile.TemporaryDirectory() as folder:
        shrunk = write_shrunk(model_folder(name, config), Path(folder), repeats=repeats)
        yield Case(name, config, shrunk)


@dataclass(slots=True)
class Watch:
    """Counts graphs as they are made and as they run, by the kind of block and the direction."""

    graphs: Counter[str] = field(default_factory=Counter)
    shapes: dict[str, set[torch.Size]] = field(default_factory=lambda: defaultdict(set))
    """Of the first tensor."""
    eager_calls: int = 0
    """Calls that did not run in exactly one graph."""
    _name: str = ""
    _runs: int = 0
    _compiler: Compiler = field(init=False)

    def __post_init__(self) -> None:
        self._compiler = Compiler(backend=self.backend)

    def backend(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """For torch.compile: counts the graph, and leaves its computation out."""
        self.graphs[self._name] += 1
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        outputs = [Like.of(node.meta["example_value"]) for node in output.args[0]]

        def run(*inputs: Any) -> list[Tensor]:
            self._runs += 1
            return [like.empty() for like in outputs]

        return run

    def compile(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """As the trainer's compiler."""
        compiled = self._compiler(function, name)

        def run(*tensors: Tensor) -> Any:
            self._name, before = name, self._runs
            self.shapes[name].add(tensors[0].shape)
            found = compiled(*tensors)
            self.eager_calls += self._runs != before + 1
            return found

        return run


def graphs_row(case: Case, sizes: Sequence[Size]) -> Row:
    """Graphs of all kinds of blocks over buckets of these sizes, and in how many of the buckets
    something is compiled again after each distinct shape was met once. `graphs_beyond_one_a_shape` is
    of those that another stride, or another set of wanted gradients, asks for."""
    torch._dynamo.reset()
    config, folder = case.config, case.folder
    rehearsal = rehearse(config, folder, placement=CPU, size=sizes[0])
    spec = MODELS[config.model.family]
    batches = {size: random_batch(config, spec, folder, CPU, size) for size in sizes}
    watch = Watch()
    policy = policy_of(config.memory.activations)
    kinds = fuse(rehearsal.denoiser, FORMULAS, policy=policy, compile=watch.compile)

    def run(size: Size) -> None:
        rehearsal.batch = batches[size]
        rehearsal.micro_batch()

    by_tokens = {width * height: (width, height) for width, height in sizes}
    set_recompute(rehearsal.denoiser, False)
    warmed = by_tokens.values() if config.model.family in SEQUENCES else sizes
    row: Row = {
        "case": f"{case.name}, blocks",
        "buckets": len(sizes),
        "token_counts": len(by_tokens),
        "shapes_warmed": len(warmed),
        "block_kinds": len(kinds),
    }
    try:
        for size in warmed:
            run(size)
    except HardwareError as error:  # the trainer's, of what the compiler said
        reason = str(error.__cause__).strip().splitlines()[0]
        return {**row, "graph_breaks": 1, "problem": f"does not compile as one graph: {reason}"}
    again = {}
    with torch.compiler.set_stance("fail_on_recompile"):
        for recompute in (False, True):  # whole blocks, as checkpointing does
            set_recompute(rehearsal.denoiser, recompute)
            again[recompute] = sum(_recompiles(run, size) for size in sizes)
    by_class: Counter[str] = Counter()
    for name, count in watch.graphs.items():
        by_class[f"graphs_of_{name.split()[0]}"] += count
    row |= {
        "graphs": watch.graphs.total(),
        **by_class,
        "graphs_of_one_kind": max(watch.graphs.values(), default=0),
        "graphs_beyond_one_a_shape": watch.graphs.total() - sum(map(len, watch.shapes.values())),
        "graph_breaks": 0,
        "buckets_recompiled": again[False],
        "buckets_recompiled_under_recompute": again[True],
        "eager_calls": watch.eager_calls,
    }
    found = ", ".join(f"{name} {row[name]}" for name in UNWANTED if row[name])
    return {**row, "problem": f"{found}; 0 wanted"} if found else row


def _recompiles(run: Callable[[Size], None], size: Size) -> bool:
    try:
        run(size)
    except (RuntimeError, HardwareError) as error:
        if "recompile" not in str(error):
            raise
        return True
    return False


def losses_row(case: Case, backend: Backend) -> Row:
    """Whether training goes as in eager mode."""
    torch._dynamo.reset()
    same = agree(losses(case, None), losses(case, backend))
    row: Row = {
        "case": f"{case.name}, losses",
        "steps": LOSS_STEPS,
        "tolerance": TOLERANCE,
        "losses_agree": same,
    }
    return row if same else {**row, "problem": "compiled blocks train otherwise than eager ones"}


def losses(case: Case, backend: Backend | None) -> list[float]:
    """Losses and gradient norms of a short training on a small image, both of every step; eager
    without a backend."""
    config = replace(
        case.config,
        train=replace(case.config.train, batch_size=2, gradient_accumulation=1),
        optimizer=replace(case.config.optimizer, lr=1e-2),
        schedule=replace(case.config.schedule, name="constant", warmup_steps=0),
    )
    rehearsal = rehearse(config, case.folder, placement=CPU, size=LOSS_SIZE)
    if backend is not None:
        policy = policy_of(config.memory.activations)
        fuse(rehearsal.denoiser, FORMULAS, policy=policy, compile=Compiler(backend=backend))
    found: list[float] = []
    for step in range(LOSS_STEPS):
        rehearsal.trained.set_lr(step)
        found.append(float(rehearsal.micro_batch()))
        found.append(float(rehearsal.update()))
    return found


def agree(eager: Sequence[float], compiled: Sequence[float]) -> bool:
    """Within TOLERANCE; never if one is not finite."""
    pairs = zip(eager, compiled, strict=True)
    return all(abs(b - a) <= TOLERANCE * abs(a) for a, b in pairs)
