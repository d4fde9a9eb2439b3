"""The graph gate sees a break, a recompilation in one bucket, a limit that is hit, and wrong losses."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.static import graphs
from benchmarks.static.compiled import block_kinds, compile_blocks
from benchmarks.static.graphs import Case, agree, graphs_row, losses_row, shrunk_case
from benchmarks.static.models import MODEL_FOLDERS
from benchmarks.static.shrunk import write_shrunk
from fasttune.models import MODELS
from fasttune.models.compiled import Compiler
from fasttune.models.flux import Flux, SingleBlock
from fasttune.models.flux_formulas import SINGLE
from fasttune.models.formulas import FORMULAS
from fasttune.models.layers import Block
from fasttune.models.weights import build_on_meta

pytestmark = [  # what torch's own compiler does, and hides by means that an error escapes
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
]
SIZES = ((64, 64), (64, 96), (96, 64))
"""Two token counts, 16 and 24."""
LEVELS = (
    "block_out_channels",
    "attention_head_dim",
    "down_block_types",
    "transformer_layers_per_block",
)
UP = {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    # pytest's handler makes torch write its whole trace of a compilation
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    # torch keeps the raised limit, as a training would want it
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


@pytest.fixture
def flux() -> Iterator[Case]:
    with shrunk_case("flux-lora-32gb", repeats=1) as case:
        yield case


def plant(monkeypatch: pytest.MonkeyPatch, before: Any) -> None:
    """Has `before(x)` in the place of x in the forward of every single block."""

    def forward(c: Any, t: Any) -> Any:
        return SINGLE.forward(c, {**t, "x": before(t["x"])})

    monkeypatch.setitem(FORMULAS, SingleBlock, replace(SINGLE, forward=forward))


def test_blocks_have_two_graphs_for_each_number_of_tokens(flux: Case) -> None:
    row = graphs_row(flux, SIZES)
    assert row == {
        "case": "flux-lora-32gb, blocks",
        "buckets": 3,
        "token_counts": 2,
        "shapes_warmed": 2,
        "block_kinds": 2,
        "graphs": 8,
        "graphs_of_DoubleBlock": 4,
        "graphs_of_SingleBlock": 4,
        "graphs_of_one_kind": 2,
        "graphs_beyond_one_a_shape": 0,
        "graph_breaks": 0,
        "buckets_recompiled": 0,
        "buckets_recompiled_under_recompute": 0,
        "eager_calls": 0,
    }


def broken(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x


def printed(x: Tensor) -> Tensor:
    print(end="")  # noqa: T201
    return x


@pytest.mark.parametrize(
    "before",
    [broken, printed, lambda x: x if x.sum() > 0 else -x],
    ids=["asked for", "print", "branch"],
)
def test_a_graph_break_is_seen(flux: Case, monkeypatch: pytest.MonkeyPatch, before: Any) -> None:
    plant(monkeypatch, before)
    row = graphs_row(flux, SIZES[:1])
    assert row["graph_breaks"] == 1
    assert "does not compile as one graph" in row["problem"]


def test_a_recompilation_in_one_bucket_is_counted(
    flux: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the height of the grid as a number that the graph reads: two buckets of 24 tokens differ in it
    grid = {"height": 0}
    original = Flux.rope

    def rope(self: Any, height: int, *rest: Any) -> Any:
        grid["height"] = height
        return original(self, height, *rest)

    monkeypatch.setattr(Flux, "rope", rope)
    plant(monkeypatch, lambda x: x * grid["height"])
    row = graphs_row(flux, SIZES)
    assert row["shapes_warmed"] == 2
    assert row["buckets_recompiled"] == row["buckets_recompiled_under_recompute"] == 1
    assert "buckets_recompiled 1, buckets_recompiled_under_recompute 1; 0 wanted" in row["problem"]


def test_another_stride_is_a_graph_more(flux: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def inputs(block: Any, x: Tensor, *rest: Any) -> Any:
        wide = torch.cat([x, x], dim=1)[:, : x.shape[1]] if block in odd else x
        return SINGLE.inputs(block, wide, *rest)

    odd: list[Any] = []
    monkeypatch.setitem(FORMULAS, SingleBlock, replace(SINGLE, inputs=inputs))
    original = graphs.rehearse

    def rehearse(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        odd.append(made.denoiser.single_transformer_blocks[-1])
        return made

    monkeypatch.setattr(graphs, "rehearse", rehearse)
    with shrunk_case("flux-lora-32gb", repeats=2) as case:
        row = graphs_row(case, SIZES[:1])
    assert row["graphs_beyond_one_a_shape"] >= 2  # forward and backward
    assert "problem" not in row


def test_eager_mode_in_silence_is_counted(flux: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # what the compiler does once it has given up
    monkeypatch.setattr(Compiler, "__call__", lambda self, function, name: function)
    row = graphs_row(flux, SIZES[:1])
    assert row["graphs"] == 0
    # two blocks, forward and backward: warm-up, again, and recomputed with one forward more
    assert row["eager_calls"] == 2 * (2 + 2 + 3)
    assert "eager_calls 14" in row["problem"]


def test_transformer_blocks_of_a_unet_have_two_graphs_whatever_the_height() -> None:
    with shrunk_case("sdxl-lora-12gb", repeats=1) as case:
        path = case.folder / "unet" / "config.json"
        config = json.loads(path.read_text())
        # two levels will do, of which one has transformers
        path.write_text(json.dumps({**config, **{name: config[name][:2] for name in LEVELS}, **UP}))
        row = graphs_row(case, SIZES[1:])
        kinds = block_kinds(build_on_meta(MODELS["sdxl"], case.folder))
    resnets = sum(name.startswith("ResnetBlock") for name in kinds)
    assert (row["token_counts"], row["shapes_warmed"]) == (1, 2)
    assert resnets > 0 and "graphs_of_ResnetBlock" not in row  # they are not compiled
    # those of 24 tokens, whatever the height
    assert row["graphs_of_TransformerBlock"] == 2 * (len(kinds) - resnets)
    assert row["graphs_beyond_one_a_shape"] == 0
    assert "problem" not in row


@pytest.mark.parametrize(("model", "family"), [("flux-dev", "flux"), ("sdxl", "sdxl")])
def test_a_shrunk_model_has_the_kinds_of_blocks_of_the_real_one(
    tmp_path: Path, model: str, family: str
) -> None:
    real = block_kinds(build_on_meta(MODELS[family], MODEL_FOLDERS[model]))
    shrunk = write_shrunk(MODEL_FOLDERS[model], tmp_path, repeats=2)
    assert list(block_kinds(build_on_meta(MODELS[family], shrunk))) == list(real)


def test_buckets_are_those_of_the_run(flux: Case) -> None:
    assert (1024, 1024) in flux.sizes
    assert all(width % 16 == height % 16 == 0 for width, height in flux.sizes)
    assert len({width * height for width, height in flux.sizes}) == 3


def test_losses_agree_and_a_wrong_gradient_does_not(flux: Case) -> None:
    assert losses_row(flux, "aot_eager")["losses_agree"] is True

    def wrong(graph: Any, inputs: Any) -> Any:
        # a hundredth too large, as is the gradient's norm
        return lambda *args: tuple(1.01 * x for x in graph(*args))

    row = losses_row(flux, wrong)
    assert row["losses_agree"] is False
    assert row["problem"]


def test_what_is_not_finite_never_agrees() -> None:
    assert agree([1.0], [1.0 + graphs.TOLERANCE / 2])
    assert not agree([1.0], [1.0 + graphs.TOLERANCE * 2])
    assert not agree([float("nan")], [float("nan")])


def test_a_block_in_the_middle_gets_its_own_compiled_forward() -> None:
    class Plain(Block):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).relu()

    seen: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    network = torch.nn.Sequential(Plain(4), Plain(4), Plain(4).requires_grad_(False))
    x = torch.randn(2, 4, requires_grad=True)
    expected = network(x)
    kinds = compile_blocks(network, backend=backend)
    assert torch.equal(network(x), expected)
    # two blocks share a graph; the frozen one has another
    assert [len(blocks) for blocks in kinds.values()] == [2, 1]
    assert len(seen) == 2
