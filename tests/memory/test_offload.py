"""Activations in host memory: the gradients are those of saved ones, whenever copies happen to end."""

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fasttune.adapters.lora import apply_lora
from fasttune.memory.activations import Policy
from fasttune.memory.offload import Absent, CudaRoad, Offload, RehearsedRoad
from fasttune.memory.trace import MemoryTrace, exact_size
from fasttune.models.compiled import Compiler
from fasttune.models.flux import SingleBlock
from fasttune.models.formulas import FORMULAS
from fasttune.models.fused import fuse
from fasttune.models.layers import run_block, set_recompute
from fasttune.models.rope import rope_table

WIDTH, HEADS, TOKENS = 32, 2, 17
BLOCKS = 4


class LateRoad:
    """Copies as late as a GPU may make them: when the computation waits for their end. Until then host
    tensors, and those that are coming back, hold NaN. Fails if a source is gone by then."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.sent: list[weakref.ref[Tensor]] = []
        """Every device tensor that went out or came back."""
        self._pending: list[Callable[[], None]] = []
        self._count = 0

    def out(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], int]:
        self.log.append("out")
        hosts = [torch.full_like(x, torch.nan) for x in tensors]
        self.sent += [weakref.ref(x) for x in tensors]
        return hosts, self._later(self.sent[-len(hosts) :], [lambda x=x: x for x in hosts])

    def back(self, hosts: Sequence[Tensor]) -> tuple[list[Tensor], int]:
        self.log.append("back")
        found = [torch.full_like(x, torch.nan) for x in hosts]
        self.sent += [weakref.ref(x) for x in found]
        sources = list(hosts)  # torch's allocator holds pinned memory until its copies are done
        return found, self._later([lambda x=x: x for x in sources], self.sent[-len(found) :])

    def wait(self, event: int) -> None:
        while self._count < event:
            self._pending.pop(0)()
            self._count += 1

    def here(self) -> int:
        """Device tensors that are alive."""
        return sum(x() is not None for x in self.sent)

    def _later(self, sources: Sequence[Any], targets: Sequence[Any]) -> int:
        def run() -> None:
            for source, target in zip(sources, targets, strict=True):
                given, taker = source(), target()
                assert given is not None, "freed while its copy is under way"
                if taker is not None:
                    taker.copy_(given)

        self._pending.append(run)
        return self._count + len(self._pending)


class Network(nn.Module):
    """Flux single blocks one after the other."""

    def __init__(
        self, count: int, width: int, grid: tuple[int, int], axes: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SingleBlock(width, width // sum(axes)) for _ in range(count))
        self.tables = rope_table(*grid, 5, axes=axes, device=torch.device("cpu"))

    def forward(self, x: Tensor) -> Tensor:
        vector = x.mean(1)
        for block in self.blocks:
            x = run_block(block, x, vector, *self.tables, None)
        return x


def network(
    count: int = BLOCKS,
    *,
    width: int = WIDTH,
    grid: tuple[int, int] = (3, 4),
    axes: tuple[int, ...] = (4, 6, 6),
) -> Network:
    torch.manual_seed(0)
    made = Network(count, width, grid, axes)
    apply_lora(made, targets=["*"], rank=3, alpha=2.0)
    for name, p in made.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.1)
    return made.train()


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def with_formula(block: nn.Module, **changed: Any) -> Any:
    """Gives the block a kind of its own whose formula differs in this; returns the kind it had."""
    kind = block.forward.kind
    block.forward.kind = replace(kind, formula=replace(kind.formula, **changed))
    return kind


def gradients(trained: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}
    for p in trained.parameters():
        p.grad = None
    return found


def step(trained: nn.Module, *seeds: int) -> dict[str, Tensor]:
    """Gradients of as many micro-batches."""
    for seed in seeds or (0,):
        trained(inputs(seed)).square().mean().backward()
    return gradients(trained)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    assert found.keys() == expected.keys() and expected
    return all(found[key].equal(value) for key, value in expected.items())


OFFLOADED = Policy(choices={"mlp": "offload", "qkv": "offload"})


def pair(
    policy: Policy = OFFLOADED, road: Any = None, **options: Any
) -> tuple[Network, Network, Any]:
    """A network that saves, its twin that moves, and the twin's road."""
    saves = network()
    moves = copy.deepcopy(saves)
    fuse(saves, FORMULAS)
    road = LateRoad() if road is None else road
    fuse(moves, FORMULAS, policy=policy, offload=Offload(road=road), **options)
    return saves, moves, road


@pytest.mark.parametrize("policy", [OFFLOADED, Policy("offload")])
def test_gradients_are_those_of_saved_tensors(policy: Policy) -> None:
    saves, moves, road = pair(policy)
    for seeds in [(0,), (1,), (2, 3, 4)]:  # and over several steps and micro-batches
        assert same(step(moves, *seeds), step(saves, *seeds))
    assert road.log.count("out") == 5 * BLOCKS
    assert road.here() == 0 and not road._pending


def test_tensors_come_back_one_block_ahead() -> None:
    _, moves, road = pair()
    for index, block in enumerate(moves.blocks):
        given = block.forward.kind.formula.backward

        def backward(*args: Any, index: int = index, given: Any = given) -> Any:
            road.log.append(f"backward {index}")
            return given(*args)

        with_formula(block, backward=backward)
    step(moves)
    # The last block's are on the device still; each of the others starts a block ahead.
    assert road.log == [
        "out", "out", "out", "out",
        "back", "backward 3", "back", "backward 2", "back", "backward 1", "backward 0",
    ]  # fmt: skip


def test_at_most_two_blocks_are_on_the_device() -> None:
    _, moves, road = pair()
    most: list[int] = []
    for block in moves.blocks:
        given = block.forward.kind.formula.backward

        def backward(*args: Any, given: Any = given) -> Any:
            most.append(road.here())
            return given(*args)

        with_formula(block, backward=backward)
        block.register_forward_hook(lambda *_: most.append(road.here()))
    for _ in range(2):
        step(moves)
        # "qkv" and "mlp": of the block whose copy is under way; of the one at work and the next
        assert most == [2, 2, 2, 2, 4, 4, 4, 2]
        most.clear()


def test_a_forward_without_a_backward_leaves_nothing() -> None:
    saves, moves, road = pair()
    expected = step(saves)
    abandoned = moves(inputs(5)).sum()
    del abandoned
    gc.collect()
    assert road.here() == 0
    with torch.no_grad():  # validation
        count = len(road.log)
        moves(inputs(6))
        assert len(road.log) == count
    assert same(step(moves), expected)

    held = moves(inputs(7)).sum()  # a graph that lives on
    assert same(step(moves), expected)
    assert same(step(moves), expected)
    held.backward()
    gradients(moves)
    assert same(step(moves), expected)
    assert road.here() == 0


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_an_exception_in_the_middle_of_a_step_leaves_nothing(direction: str) -> None:
    saves, moves, road = pair()
    expected = step(saves)

    def fail(*_: Any) -> Any:
        raise ArithmeticError("no")

    kind = with_formula(moves.blocks[1], **{direction: fail})
    with pytest.raises(ArithmeticError):
        step(moves)
    moves.blocks[1].forward.kind = kind
    gradients(moves)
    gc.collect()
    assert road.here() == 0
    assert same(step(moves), expected)


def test_what_a_broken_backward_fetched_ahead_is_dropped_by_the_next_forward() -> None:
    saves, moves, road = pair()

    def fail(*_: Any) -> Any:
        raise ArithmeticError("no")

    kind = with_formula(moves.blocks[-1], backward=fail)
    loss = moves(inputs()).sum()
    with pytest.raises(ArithmeticError):
        loss.backward()
    moves.blocks[-1].forward.kind = kind
    assert road.here() == 2  # those of the block before, and the graph lives
    other = moves(inputs(1)).sum()
    assert road.here() == 2  # of the new graph's last block
    del other
    assert road.here() == 0
    assert same(step(moves), step(saves))


def test_a_graph_may_be_kept() -> None:
    saves, moves, road = pair()
    losses = [made(inputs()).square().mean() for made in (saves, moves)]
    found = []
    for loss, made in zip(losses, (saves, moves), strict=True):
        loss.backward(retain_graph=True)
        first = gradients(made)
        loss.backward()
        found.append([first, gradients(made)])
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    assert same(found[1][0], found[0][0]) and same(found[1][1], found[0][1])
    assert road.here() == 0


def test_recomputed_blocks_send_nothing() -> None:
    saves, moves, road = pair()
    set_recompute(moves, True)
    assert same(step(moves), step(saves))
    assert road.log == []
    moves.blocks[0].recompute = False  # and among others
    assert same(step(moves), step(saves))
    assert road.log == ["out"]  # the last that was sent, so it is here still


def test_checkpointing_from_outside_is_right() -> None:
    """Copies are made twice then, as the checkpoint knows nothing of them."""
    saves, moves, road = pair()
    x = inputs()
    y = torch.utils.checkpoint.checkpoint(moves, x, use_reentrant=False)
    y.square().mean().backward()
    assert same(gradients(moves), step(saves))
    del y
    gc.collect()
    assert road.here() == 0


def test_compiled_blocks_are_moved_outside_of_their_graphs() -> None:
    saves, moves, road = pair(compile=Compiler(backend="aot_eager"))
    compiler = moves.blocks[0].forward.kind.compile
    for seed in range(2):
        expected, found = step(saves, seed), step(moves, seed)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value)
    assert len(compiler.graphs) == 2 and road.log.count("out") == 2 * BLOCKS


def test_strides_survive() -> None:
    offload = Offload(road=LateRoad())
    x = torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last)
    away = offload.send({"x": x.clone()})
    assert away is not None
    found = offload.fetch(away)["x"]
    assert found.equal(x) and found.stride() == x.stride()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_where_the_device_is_the_host_tensors_stay(device: str) -> None:
    # and on MPS, of which "meta" has as little to move as any device that is not CUDA
    assert Offload().send({"x": torch.ones(2, device=device)}) is None
    assert Offload(stands_for="cuda").send({"x": torch.ones(2)}) is None  # a real tensor
    assert Offload(road=LateRoad()).send({}) is None
    saves, _, _ = pair()
    stays = copy.deepcopy(network())
    fuse(stays, FORMULAS, policy=OFFLOADED)
    loss = stays(inputs()).square().mean()
    loss.backward()
    assert same(gradients(stays), step(saves))


def held_after_forward(stands_for: str, policy: Policy) -> tuple[int, int]:
    """Bytes that a network of fake tensors holds after its forward, and after its backward."""
    with FakeTensorMode():
        made = network()
        fuse(made, FORMULAS, policy=policy, offload=Offload(stands_for=stands_for))
        x = torch.empty(2, TOKENS, WIDTH)
        made(x).sum().backward()  # gradients in place
        with MemoryTrace(made, rounding=exact_size) as trace:
            trace.label("weights", made.parameters())
            before = trace.live
            loss = made(x).sum()
            held = trace.live - before
            loss.backward()
            del loss
            return held, trace.live - before


def test_a_rehearsal_counts_no_device_memory_for_what_is_away() -> None:
    kept, rest = held_after_forward("cpu", Policy("save"))
    stays, _ = held_after_forward("cpu", OFFLOADED)
    moves, after = held_after_forward("cuda", OFFLOADED)
    assert stays == kept
    block = (4 + 3) * 2 * TOKENS * WIDTH * 4  # "mlp" and "qkv"
    # the last block's are on their way still
    assert kept - moves == (BLOCKS - 1) * block
    assert after == rest


def test_the_rehearsed_road_makes_tensors_anew() -> None:
    road = RehearsedRoad()
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).to(torch.bfloat16)
    hosts, event = road.out([x])
    assert isinstance(hosts[0], Absent)
    (found,), event = road.back(hosts)
    road.wait(event)
    assert (found.shape, found.stride(), found.dtype) == (x.shape, x.stride(), x.dtype)


# --- On a GPU


def on_gpu(made: Network, dtype: torch.dtype) -> Network:
    made.tables = tuple(x.cuda() for x in made.tables)
    return made.to("cuda", dtype)


@pytest.mark.gpu
def test_on_a_gpu_gradients_are_bitwise_those_of_saved_tensors() -> None:
    # Few tokens: attention's backward then has no sums whose order changes from run to run.
    saves = on_gpu(network(12), torch.float32)
    moves = copy.deepcopy(saves)
    fuse(saves, FORMULAS)
    offload = Offload()
    fuse(moves, FORMULAS, policy=Policy("offload"), offload=offload)
    for seed in range(20):
        x = inputs(seed).cuda()
        for made in (saves, moves):
            for part in x.chunk(2):  # two micro-batches
                made(part).square().mean().backward()
        assert same(gradients(moves), gradients(saves))
    assert isinstance(offload._road, CudaRoad)


@pytest.mark.gpu
def test_on_a_gpu_the_peak_falls_and_pinned_memory_is_used_again() -> None:
    tokens, width, count = 64 * 64 + 5, 512, 8
    saves = network(count, width=width, grid=(64, 64), axes=(16, 56, 56))
    saves = on_gpu(saves, torch.bfloat16)
    moves = copy.deepcopy(saves)
    fuse(saves, FORMULAS)
    fuse(moves, FORMULAS, policy=OFFLOADED)
    x = torch.randn(1, tokens, width, device="cuda", dtype=torch.bfloat16)

    def peak(made: Network) -> int:
        for _ in range(2):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            made(x).float().square().mean().backward()
            found = torch.cuda.max_memory_allocated() - before
            gradients(made)
        return found

    block = (3 + 4) * tokens * width * 2
    assert peak(saves) - peak(moves) > (count - 3) * block  # all but two blocks' are away
    pinned = torch.cuda.host_memory_stats()["num_host_alloc"]
    peak(moves)
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == pinned


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_wait() -> None:
    made = on_gpu(network(), torch.float32)
    fuse(made, FORMULAS, policy=Policy("offload"))
    x = inputs().cuda()
    for mode in ("default", "error"):  # the first step makes what the others use
        torch.cuda.set_sync_debug_mode(mode)
        try:
            made(x).square().mean().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
