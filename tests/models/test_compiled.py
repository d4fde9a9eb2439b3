"""Graphs of blocks: one for each bucket, whatever torch's limits, in any thread."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttune.errors import HardwareError
from fasttune.models import compiled
from fasttune.models.compiled import Compiler, compiler_for
from fasttune.models.formulas import FORMULAS
from fasttune.models.fused import fuse
from fasttune.models.unet import ResnetBlock, TransformerBlock
from fasttune.models.unet_config import read_unet_config

BUCKETS = tuple(range(1, 11))  # token counts
"""More than torch keeps of one function."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch.compiler.reset()


class Counting:
    """A backend that runs what dynamo traced, and counts."""

    def __init__(self) -> None:
        self.made = self.ran = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.made += 1

        def run(*args: Any) -> Any:
            self.ran += 1
            return graph(*args)

        return run


def trained_over_buckets(compiler: Compiler, rounds: int) -> list[Tensor]:
    """The weight's gradient for each bucket in each round, of a small transformer block."""
    torch.manual_seed(0)
    block = TransformerBlock(8, 5, 2)
    fuse(block, FORMULAS, compile=compiler)
    found = []
    for _ in range(rounds):
        for tokens in BUCKETS:
            block(torch.ones(1, tokens, 8), torch.ones(1, 3, 5)).square().sum().backward()
            weight = block.attn1.to_q.weight
            assert weight.grad is not None
            found.append(weight.grad.clone())
            weight.grad = None
    return found


@pytest.mark.parametrize(
    "in_a_thread",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["main thread", "another thread"],
)
def test_more_buckets_than_torch_keeps_graphs_of_a_function(in_a_thread: bool) -> None:
    """Backwards run in a thread of their own on a GPU, where settings of this one do not hold."""
    backend = Counting()
    compiler = Compiler(backend=backend)
    found: list[Tensor] = []

    def work() -> None:
        found.extend(trained_over_buckets(compiler, rounds=2))

    if in_a_thread:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    else:
        work()
    count = 2 * len(BUCKETS)  # forward and backward
    assert len(compiler.graphs) == backend.made == count
    assert backend.ran == 2 * count  # every call of both rounds was of a graph
    assert compiler.seconds > 0 and compiler.num_cached == 0
    first, second = found[: len(BUCKETS)], found[len(BUCKETS) :]
    assert len(found) == 2 * len(BUCKETS) and all(map(torch.equal, first, second))


@pytest.mark.slow
def test_without_code_of_their_own_the_ninth_graph_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `_own_code` is for. With fullgraph=True torch raises there, it does not run eagerly."""
    monkeypatch.setattr(compiled, "_own_code", lambda function, name: function)
    backend = Counting()
    with pytest.raises(HardwareError, match="FailOnRecompileLimitHit"):
        trained_over_buckets(Compiler(backend=backend), rounds=1)
    assert backend.made == 2 * 8


def test_what_is_said_of_compiling() -> None:
    compiler = Compiler(mode="auto", backend="eager")
    assert str(compiler) == "0 graphs in 0.0 s"
    calls = []

    def broken(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        calls.append(graph)
        raise RuntimeError("no compiler here\nand more")

    compiler.backend = broken

    def double(x: Tensor) -> Tensor:
        return x * 2

    one, two = compiler(double, "one"), compiler(double, "two")
    for function in (one, two, compiler(double, "three"), one):
        assert function(torch.ones(1)).item() == 2
    assert len(calls) == 1
    assert compiler.summary() == {
        "graphs": 0,
        "seconds": 0.0,
        "from_cache": 0,
        "given_up": "RuntimeError: no compiler here",
    }
    assert str(compiler) == "blocks run eagerly, as one did not compile"


def test_blocks_stops_where_auto_goes_on() -> None:
    def broken(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        raise RuntimeError("no compiler here")

    function = Compiler(mode="blocks", backend=broken)(lambda x: x * 2, "one")
    for _ in range(2):
        with pytest.raises(
            HardwareError, match=r'one does not compile here .*no compiler here.*"off"'
        ):
            function(torch.ones(1))


def test_a_graph_that_was_not_made_is_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with TORCHDYNAMO_DISABLE, under which torch.compile returns what it was given."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with pytest.raises(HardwareError, match="torch.compile made no graph"):
        Compiler(mode="blocks")(lambda x: x * 2, "one")(torch.ones(1))
    compiler = Compiler(mode="auto")
    assert compiler(lambda x: x * 2, "one")(torch.ones(1)).item() == 2
    assert compiler.graphs == [] and "made no graph" in str(compiler.given_up)


def test_after_some_graphs_the_rest_runs_eagerly() -> None:
    compiler = Compiler(mode="auto", backend="eager")
    assert compiler(lambda x: x * 2, "one")(torch.ones(1)).item() == 2

    def broken(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        raise RuntimeError("no compiler here")

    compiler.backend = broken
    assert compiler(lambda x: x * 3, "two")(torch.ones(1)).item() == 3
    assert str(compiler).startswith("1 graphs in ")
    assert str(compiler).endswith("; further ones run eagerly")


def test_resnet_blocks_are_left_to_eager_mode() -> None:
    config = read_unet_config({"norm_num_groups": 2, "block_out_channels": [8] * 4})
    block = ResnetBlock(8, 8, 5, config)
    compiler = Compiler(backend=Counting())
    fuse(block, FORMULAS, compile=compiler)
    block(torch.ones(1, 8, 3, 4), torch.ones(1, 5)).sum().backward()
    assert compiler.graphs == [] and block.conv1.weight.grad is not None


def test_a_cached_graph_is_of_these_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        seen.append(torch.compiler.config.cache_key_tag)
        return graph

    Compiler(backend=backend)(lambda x: x * 2, "one")(torch.ones(1))
    assert seen == [compiled._cache_tag()]
    assert torch.compiler.config.cache_key_tag == ""


@pytest.mark.parametrize(
    ("compile", "device", "mode"),
    [("off", "cuda", None), ("blocks", "cpu", "blocks"), ("auto", "cpu", None)],
)
def test_compiler_for(compile: str, device: str, mode: str | None) -> None:
    compiler, reason = compiler_for(compile, device)
    assert (compiler and compiler.mode) == mode
    assert f'train.compile = "{compile}"' in reason
