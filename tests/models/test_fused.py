"""Fused blocks are the plain ones: outputs, every gradient, and training."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fasttune.adapters.lora import apply_lora
from fasttune.memory.activations import Policy
from fasttune.models.compiled import Compiler
from fasttune.models.flux import DoubleBlock, SingleBlock
from fasttune.models.formulas import FORMULAS
from fasttune.models.fused import fuse, unfuse
from fasttune.models.layers import Block, run_block, set_recompute
from fasttune.models.rope import rope_table
from fasttune.models.unet import ResnetBlock, TransformerBlock
from fasttune.models.unet_config import read_unet_config
from fasttune_kernels.dispatch import forced

WIDTH, HEADS, TEXT = 32, 2, 5
GRID = 3, 4
Case = tuple[Block, tuple[Tensor | None, ...]]


def flux_single(batch: int, dtype: torch.dtype) -> Case:
    cos, sin = rope_table(*GRID, TEXT, axes=(4, 6, 6), device=torch.device("cpu"))
    tokens = TEXT + GRID[0] * GRID[1]
    x = torch.randn(batch, tokens, WIDTH, dtype=dtype)
    return SingleBlock(WIDTH, HEADS), (x, torch.randn(batch, WIDTH, dtype=dtype), cos, sin, None)


def flux_double(batch: int, dtype: torch.dtype) -> Case:
    cos, sin = rope_table(*GRID, TEXT, axes=(4, 6, 6), device=torch.device("cpu"))
    x = torch.randn(batch, GRID[0] * GRID[1], WIDTH, dtype=dtype)
    text = torch.randn(batch, TEXT, WIDTH, dtype=dtype)
    vector = torch.randn(batch, WIDTH, dtype=dtype)
    return DoubleBlock(WIDTH, HEADS), (x, text, vector, cos, sin, None)


def masked(case: Case) -> Case:
    """With every sample's last text token hidden."""
    block, inputs = case
    batch = inputs[0].shape[0]
    mask = torch.ones(batch, TEXT + GRID[0] * GRID[1], dtype=torch.bool)
    mask[:, TEXT - 1] = False
    return block, (*inputs[:-1], mask)


def unet_transformer(batch: int, dtype: torch.dtype) -> Case:
    x, text = torch.randn(batch, 12, WIDTH, dtype=dtype), torch.randn(batch, 7, 24, dtype=dtype)
    return TransformerBlock(WIDTH, 24, HEADS), (x, text)


def resnet(channels: int, out_channels: int, skip: int | None) -> Callable[..., Case]:
    def make(batch: int, dtype: torch.dtype) -> Case:
        joined = channels + (skip or 0)
        config = read_unet_config({"norm_num_groups": 8, "block_out_channels": [32, 32, 32, 32]})
        block = ResnetBlock(joined, out_channels, 20, config)

        def features(count: int) -> Tensor:
            x = torch.randn(batch, count, 6, 5, dtype=dtype)
            return x.to(memory_format=torch.channels_last)

        inputs = [features(channels), torch.randn(batch, 20, dtype=dtype)]
        return block, (*inputs, *([] if skip is None else [features(skip)]))

    return make


CASES: dict[str, Callable[[int, torch.dtype], Case]] = {
    "flux single": flux_single,
    "flux double": flux_double,
    "flux single, masked": lambda *a: masked(flux_single(*a)),
    "flux double, masked": lambda *a: masked(flux_double(*a)),
    "unet transformer": unet_transformer,
    "resnet": resnet(32, 32, None),
    "resnet, shortcut": resnet(32, 16, None),
    "resnet, skip": resnet(32, 24, 8),
}
LORA = [name for name in CASES if "resnet" not in name]


def made(name: str, targets: str, *, batch: int = 2, dtype: torch.dtype = torch.float64) -> Case:
    """A block that trains: "full", "frozen", or adapters on what matches `targets`."""
    torch.manual_seed(0)
    block, inputs = CASES[name](batch, dtype)
    root = nn.ModuleDict({"block": block}).to(dtype)
    if targets not in ("full", "frozen"):
        apply_lora(root, targets=[targets], rank=3, alpha=2.0)
        for key, p in root.named_parameters():
            if key.endswith("lora_B"):
                nn.init.normal_(p)
    else:
        root.requires_grad_(targets == "full")
    for key, p in root.named_parameters():
        if "norm" in key and p.ndim == 1:
            nn.init.normal_(p, 1.0)
    return block.train(), inputs


def gradients(block: Block, inputs: tuple[Tensor | None, ...], conditions: bool) -> dict[str, Any]:
    """Outputs and gradients by name, with those of the conditioning or the stream's alone."""
    given = [x if x is None else x.detach().clone() for x in inputs]
    for index, x in enumerate(given):
        is_table = x is not None and (x.ndim == 3 and x.shape[1] == 1 or not x.is_floating_point())
        if x is not None and not is_table and (index == 0 or conditions):
            x.requires_grad_(True)
    outputs = run_block(block, *given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    ends = [torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator)) for x in outputs]
    torch.autograd.backward(outputs, ends)
    found: dict[str, Any] = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    found |= {
        f"input {i}": x.grad for i, x in enumerate(given) if x is not None and x.requires_grad
    }
    found |= {key: p.grad for key, p in block.named_parameters() if p.requires_grad}
    for p in block.parameters():
        p.grad = None
    return found


def check(expected: dict[str, Any], found: dict[str, Any], tolerance: float) -> None:
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert value is not None and found[key] is not None, key
        assert found[key].dtype == value.dtype and found[key].shape == value.shape, key
        error = (found[key].double() - value.double()).norm()
        assert error <= tolerance * value.double().norm() + 1e-12, (key, float(error))


VARIANTS = [(name, targets) for name in CASES for targets in ("full", "frozen")]
VARIANTS += [(name, "*") for name in LORA] + [(name, "*attn*to_?") for name in LORA]


@pytest.mark.parametrize(("name", "targets"), VARIANTS)
@pytest.mark.parametrize("conditions", [False, True])
def test_fused_is_plain(name: str, targets: str, conditions: bool) -> None:
    block, inputs = made(name, targets)
    expected = gradients(block, inputs, conditions)
    fuse(block, FORMULAS)
    # float32 inside (tables, statistics) keeps it from float64's 1e-13
    check(expected, gradients(block, inputs, conditions), 1e-6)


@pytest.mark.parametrize(
    ("name", "targets", "batch", "choice"),
    [
        (name, *how)
        for name in CASES
        if "masked" not in name
        for how in (("full", 1, "save"), ("*" if name in LORA else "frozen", 2, "recompute"))
    ],
)
def test_fused_on_triton_is_plain(name: str, targets: str, batch: int, choice: Any) -> None:
    block, inputs = made(name, targets, batch=batch, dtype=torch.float32)
    expected = gradients(block, inputs, conditions=False)
    fuse(block, FORMULAS, policy=Policy(choice))
    with forced("triton"):
        check(expected, gradients(block, inputs, conditions=False), 1e-4)


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("flux single", "attn.norm_k.weight"),
        ("flux double", "attn.norm_added_q.weight"),
        ("flux single", "attn.to_q.bias"),
        ("unet transformer", "norm2.bias"),
        ("resnet", "norm1.bias"),
        ("resnet", "norm2.bias"),
        ("resnet", "conv1.bias"),
    ],
)
def test_one_parameter_trains_alone(name: str, parameter: str) -> None:
    block, inputs = made(name, "frozen")
    block.get_parameter(parameter).requires_grad_()
    expected = gradients(block, inputs, conditions=False)
    fuse(block, FORMULAS)
    check(expected, gradients(block, inputs, conditions=False), 1e-6)


class Convolutions(TorchDispatchMode):
    """The tensors that convolutions and their backwards are given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in str(op):
            self.given += [x for x in args[:2] if isinstance(x, Tensor)]
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("targets", ["full", "frozen"])
@pytest.mark.parametrize("name", [name for name in CASES if "resnet" in name])
def test_convolutions_get_channels_last(name: str, targets: str) -> None:
    """A library that is given another layout copies: cuDNN's backward goes by that of its input."""
    block, inputs = made(name, targets, dtype=torch.float32)
    fuse(block.to(memory_format=torch.channels_last), FORMULAS)
    with Convolutions() as seen:
        gradients(block, inputs, conditions=False)
    maps = [x for x in seen.given if x.shape[2:] == (6, 5)]
    assert len(maps) >= 4
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("choice", ["int8", "recompute", "offload"])
def test_every_policy_trains(name: str, choice: Any) -> None:
    """Recomputed and offloaded tensors give the same gradients; int8 ones nearly."""
    block, inputs = made(name, "*" if name in LORA else "full", dtype=torch.float32)
    expected = gradients(block, inputs, conditions=True)
    fuse(block, FORMULAS, policy=Policy(choice))
    # a row's int8 step is amax / 127: with rows of 32 about 1 % of the row's norm
    check(expected, gradients(block, inputs, conditions=True), 0.1 if choice == "int8" else 1e-4)


@pytest.mark.parametrize("name", ["flux single", "flux double", "unet transformer"])
@pytest.mark.parametrize("tensor", ["qkv", "attention", "mlp"])
def test_a_policy_is_per_tensor(name: str, tensor: str) -> None:
    block, inputs = made(name, "*", dtype=torch.float32)

    def bytes_kept(policy: Policy) -> int:
        fuse(block, FORMULAS, policy=policy)
        sizes: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            given = [
                x if x is None else x.clone().requires_grad_(i == 0) for i, x in enumerate(inputs)
            ]
            block(*given)
        return sum(sizes.values())

    every = bytes_kept(Policy())
    less = bytes_kept(Policy(choices={tensor: "recompute"}))
    eight = bytes_kept(Policy(choices={tensor: "int8"}))
    assert less < eight < every
    # int8 keeps a quarter of float32's bytes, and a scale a row
    assert 0.2 * (every - less) < eight - less < 0.35 * (every - less)


@pytest.mark.parametrize("name", CASES)
def test_recomputed_blocks_and_inference(name: str) -> None:
    block, inputs = made(name, "*" if name in LORA else "full")
    expected = gradients(block, inputs, conditions=True)
    fuse(block, FORMULAS)
    set_recompute(block, True)
    check(expected, gradients(block, inputs, conditions=True), 1e-6)
    with torch.no_grad():
        outputs = block.eval()(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for index, x in enumerate(outputs):
        assert not x.requires_grad
        torch.testing.assert_close(x, expected[f"output {index}"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["flux single", "unet transformer"])
def test_dropout_is_one_mask_for_forward_and_backward(name: str) -> None:
    """With the same seed the loss is a function that finite differences agree with."""
    torch.manual_seed(0)
    block, inputs = CASES[name](1, torch.float64)
    root = nn.ModuleDict({"block": block}).double()
    apply_lora(root, targets=["*"], rank=3, alpha=2.0, dropout=0.5)
    for p in root.parameters():
        if p.requires_grad:
            p.data = 0.2 * torch.randn_like(p, dtype=torch.float64)
    fuse(block.train(), FORMULAS)
    p = next(q for key, q in block.named_parameters() if key.endswith("lora_A"))

    def loss() -> Tensor:
        torch.manual_seed(3)
        return (block(*inputs) ** 2).sum()

    (gradient,) = torch.autograd.grad(loss(), [p])
    direction = torch.randn_like(p)
    with torch.no_grad():
        step = 1e-3  # rope tables are float32, so the difference has some five digits
        p += step * direction
        up = loss()
        p -= 2 * step * direction
        down = loss()
    slope = float((gradient * direction).sum())
    assert abs(float(up - down) / (2 * step) - slope) < 1e-3 * abs(slope)
    torch.manual_seed(4)
    assert float((block(*inputs) ** 2).sum().detach()) != float(down)


@pytest.mark.parametrize(
    ("name", "targets"), [(n, t) for n in CASES for t in ("full", "*") if t == "full" or n in LORA]
)
def test_twenty_steps_of_training(name: str, targets: str) -> None:
    block, inputs = made(name, targets, dtype=torch.float32)
    twin = copy.deepcopy(block)
    fuse(block, FORMULAS)

    def train(network: Block) -> list[float]:
        trained = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        losses = []
        for _ in range(20):
            # torch's group norm crashes in its backward for channels_last inputs without a gradient
            x = inputs[0].detach().requires_grad_()
            outputs = run_block(network, x, *inputs[1:])
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            loss = torch.stack([(x.float() ** 2).mean() for x in outputs]).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    plain, fused = train(twin), train(block)
    assert plain[-1] < 0.9 * plain[0]
    # AdamW divides rounding by rounding where a gradient is nearly zero
    torch.testing.assert_close(fused, plain, rtol=2e-3, atol=0)


def test_equal_blocks_share_their_kind_and_a_plain_block_stays() -> None:
    blocks = nn.ModuleList([SingleBlock(WIDTH, HEADS), SingleBlock(WIDTH, HEADS)])
    adapted = resnet(32, 32, None)(1, torch.float32)[0]
    root = nn.ModuleDict({"single": blocks, "resnet": adapted})
    apply_lora(root, targets=["resnet.conv1"], rank=2, alpha=2.0)
    kinds = fuse(root, FORMULAS)
    assert {name: len(found) for name, found in kinds.items()} == {
        "SingleBlock single.0": 2,
        "plain": 1,
    }
    unfuse(root)
    assert all("forward" not in vars(block) for block in root.modules())


def test_packed_weights_keep_their_names_and_values() -> None:
    block, _ = made("flux single", "full", dtype=torch.float32)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    fuse(block, FORMULAS)
    after = block.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    storages = {after[f"attn.to_{x}.weight"].untyped_storage().data_ptr() for x in "qkv"}
    assert len(storages) == 1
    with torch.no_grad():
        block.get_parameter("attn.to_k.weight").zero_()
    joint = block.forward._tensors["attn.to_q+attn.to_k+attn.to_v.weight"]  # type: ignore[attr-defined]
    assert joint[WIDTH : 2 * WIDTH].abs().max() == 0


@pytest.mark.parametrize("name", ["flux single", "unet transformer"])
def test_weights_that_moved_are_noticed(name: str) -> None:
    block, inputs = made(name, "full", dtype=torch.float32)
    fuse(block, FORMULAS)
    gradients(block, inputs, conditions=False)
    block.double()
    with pytest.raises(RuntimeError, match="have been moved since fuse"):
        block(*(None if x is None else x.double() for x in inputs))


def test_adapters_that_moved_are_noticed() -> None:
    class Network(nn.Module):
        def __init__(self, block: Block) -> None:
            super().__init__()
            self.block = block

        def forward(self, *inputs: Tensor | None) -> Any:
            return self.block(*inputs)

    block, inputs = made("flux single", "*", dtype=torch.float32)
    network = Network(block)
    fuse(network, FORMULAS, dtype=torch.bfloat16)
    given = [x if x is None or x.shape[1] == 1 else x.bfloat16() for x in inputs]
    network(*given)
    p = block.get_parameter("attn.to_q.lora_B")
    p.data = p.data.clone()
    with pytest.raises(RuntimeError, match="adapters have been moved since fuse"):
        network(*given)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_exact_as_plain_blocks(name: str, dtype: torch.dtype) -> None:
    """Against float64, by norm: each gradient has at most 2.5 times the error that the plain block's has,
    and 1 % of the tensor: sums of a few dozen terms that are rounded in another order."""
    block, inputs = made(name, "*" if name in LORA else "full", dtype=torch.float64)
    plain, fused = copy.deepcopy(block).to(dtype), copy.deepcopy(block).to(dtype)

    def rounded(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.dtype != torch.float64 else x.to(dtype)

    given = tuple(map(rounded, inputs))
    if "resnet" in name:  # whose group norm on the CPU loses digits for channels_last
        given = tuple(x if x is None else x.contiguous() for x in given)
    block.load_state_dict({key: value.double() for key, value in plain.state_dict().items()})
    exact = gradients(
        block, tuple(x if x is None or x.dtype != dtype else x.double() for x in given), True
    )
    fuse(fused, FORMULAS, dtype=dtype)
    theirs, ours = gradients(plain, given, True), gradients(fused, given, True)
    assert exact.keys() == ours.keys()
    for key, value in exact.items():
        wrong = [float((x[key].double() - value).norm()) for x in (ours, theirs)]
        assert wrong[0] <= 2.5 * wrong[1] + 0.01 * float(value.norm()), (key, wrong)


@pytest.mark.parametrize("name", ["flux single", "flux double"])
def test_float16_passes_no_gradient_where_it_is_clipped(name: str) -> None:
    block, inputs = made(name, "full", dtype=torch.float16)
    index = 0 if name == "flux single" else 1  # the text
    stream = inputs[index]
    assert stream is not None
    every_third = torch.arange(WIDTH) % 3 == 0
    large = torch.where(every_third, stream.sign() * 64000, stream)
    given = tuple(large if i == index else x for i, x in enumerate(inputs))
    for key, p in block.named_parameters():
        if key.endswith(("proj_out.bias", "ff_context.net.2.bias")):
            nn.init.constant_(p, 6000.0)
    expected = gradients(block, given, conditions=False)
    clipped = expected[f"output {index}"].abs() == 65504
    assert 0.01 < clipped.float().mean() < 0.5
    fuse(block, FORMULAS)
    found = gradients(block, given, conditions=False)
    key = "proj_out.bias" if name == "flux single" else "ff_context.net.2.bias"
    error = (found[key].double() - expected[key].double()).norm()
    assert error < 0.02 * expected[key].double().norm()


# --- Compiled


@pytest.mark.parametrize("name", ["flux single", "flux double", "unet transformer"])
def test_compiled_is_eager(name: str) -> None:
    """aot_eager traces as inductor does; one graph each way, whatever is called how often."""
    block, inputs = made(name, "*" if name in LORA else "full")
    expected = gradients(block, inputs, conditions=True)
    compiler = Compiler(backend="aot_eager")
    fuse(block, FORMULAS, compile=compiler)
    for _ in range(2):
        check(expected, gradients(block, inputs, conditions=True), 1e-6)
    assert len(compiler.graphs) == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        check(expected, gradients(block, inputs, conditions=True), 1e-6)


def test_auto_falls_back_once_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise ValueError("no compiler here")

    block, inputs = made("flux single", "*")
    expected = gradients(block, inputs, conditions=True)
    compiler = Compiler(mode="auto", backend=broken)
    fuse(block, FORMULAS, compile=compiler)
    for _ in range(2):
        check(expected, gradients(block, inputs, conditions=True), 1e-6)
    (record,) = (r for r in caplog.records if r.name == "fasttune.models.compiled")
    assert "no compiler here" in record.getMessage() and compiler.graphs == []
    unfuse(block)
    fuse(block, FORMULAS, compile=Compiler(backend=broken))
    with pytest.raises(Exception, match="no compiler here"):
        gradients(block, inputs, conditions=True)
