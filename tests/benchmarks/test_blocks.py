"""Gate blocks: its numbers against saved-tensor hooks on real tensors, and what it says of planted waste."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.static.blocks import KINDS, MIXED, Block, Input, Kind, row
from benchmarks.static.gpu_operations import as_on_gpu, rms_norm
from fasttune.memory.activations import Kept, Policy
from fasttune.models.flux import DoubleBlock, SingleBlock
from fasttune.models.flux_formulas import SINGLE
from fasttune.models.fused import Context, Tensors
from fasttune.models.layers import RMSNorm
from fasttune.models.unet import TransformerBlock

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

WIDTH, TEXT, IMAGE = 64, 32, 96
TABLE = Input((TEXT + IMAGE, 1, 8), dtype=torch.float32)


def small(name: str) -> Kind:
    """A small block of one of the kinds."""
    inputs = {
        "transformer": (Input((1, IMAGE, WIDTH), "always"), Input((1, TEXT, WIDTH))),
        "single": (
            Input((1, TEXT + IMAGE, WIDTH), "always"),
            Input((1, WIDTH), "full"),
            TABLE,
            TABLE,
        ),
        "double": (
            Input((1, IMAGE, WIDTH), "always"),
            Input((1, TEXT, WIDTH), "always"),
            Input((1, WIDTH), "full"),
            TABLE,
            TABLE,
        ),
    }[name]
    return Kind(
        name=name,
        family="sdxl" if name == "transformer" else "flux",
        place="blocks",
        build=SMALL[name],
        inputs=inputs,
        mixed=MIXED if name == "transformer" else None,
    )


SMALL: dict[str, Callable[[], nn.Module]] = {
    "single": lambda: SingleBlock(WIDTH, 4),
    "double": lambda: DoubleBlock(WIDTH, 4),
    "transformer": lambda: TransformerBlock(WIDTH, WIDTH, 4),
}
LORA = ("*.to_q", "*.to_k", "*.ff.*", "*.proj_mlp")


def saved_by_autograd(block: Block) -> int:
    """Bytes of the storages that autograd packs in a forward on real tensors, beyond parameters,
    inputs and outputs."""
    packed: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        packed[x.untyped_storage()._cdata] = x.untyped_storage()
        return x.detach()

    with as_on_gpu(block.module), saved_tensors_hooks(pack, lambda x: x):
        outputs = block.module(*block.inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    given = [x for x in [*block.inputs, *block.module.parameters(), *outputs] if x is not None]
    for x in given:
        packed.pop(x.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in packed.values())


@pytest.mark.parametrize(
    ("name", "patterns"), [("single", None), ("double", LORA), ("transformer", LORA)]
)
def test_saved_bytes_are_those_that_autograd_packs(
    name: str, patterns: tuple[str, ...] | None
) -> None:
    kind = small(name)
    found = row(kind, "case", patterns)

    def packed(policy: Policy | None) -> float:
        block = Block(kind, patterns)
        if policy is not None:
            block.fused(policy)
        return saved_by_autograd(block) / kind.unit

    policies = {"saved": Policy(), "int8": Policy("int8"), "recompute": Policy("recompute")}
    policies |= {"mixed": MIXED} if name == "transformer" else {}
    for column, policy in policies.items():
        assert found[f"{column}_u"] == round(packed(policy), 3), column
    assert found["plain_u"] == round(packed(None), 3)
    assert found["recompute_u"] < found["int8_u"] < found["saved_u"] < found["plain_u"]
    assert found["backward_peak_u"] > found["saved_u"] > 8
    assert 0 < found["min_cut_u"] <= found["plain_u"] + 0.5
    assert found["percent_of_min_cut"] == round(100 * found["saved_u"] / found["min_cut_u"])
    assert sum(u_of(line) for line in found["tensors"]) == pytest.approx(found["saved_u"], abs=0.05)


def u_of(line: str) -> float:
    """What a line of tensors holds."""
    head, size, *_ = line.split(", ")
    count = 1 if head.startswith("smaller") else int(head.split(" ")[0])
    return count * float(size.removesuffix(" u"))


Outputs = tuple[tuple[Tensor, ...], dict[str, Tensor]]


def keeping(c: Context, t: Tensors) -> Outputs:
    """Keeps one tensor more, a mask's."""
    outputs, kept = SINGLE.forward(c, t)
    return outputs, kept | {"mask": t["x"].sigmoid()}


def widening(c: Context, t: Tensors) -> Outputs:
    """Silently keeps the MLP's input in float32."""
    outputs, kept = SINGLE.forward(c, t)
    return outputs, kept | {"mlp": kept["mlp"].float()}


def copying(c: Context, t: Tensors, kept: Kept, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """Holds a copy of the gradient while the backward runs."""
    copy = gradients[0].clone()
    found = SINGLE.backward(c, t, kept, gradients)
    del copy
    return found


@pytest.mark.parametrize(
    ("planted", "saved", "peak", "line"),
    [
        ({"forward": keeping}, 1.0, 1.0, "1 of 1x128x64 bfloat16, 1.0 u, sigmoid"),
        ({"forward": widening}, 4.0, 4.0, "1 of 1x128x256 float32, 8.0 u, _to_copy"),
        ({"backward": copying}, 0.0, 1.0, ""),
    ],
    ids=["kept tensor", "float32", "copy"],
)
def test_waste_in_a_formula_changes_its_row(
    planted: dict[str, Any], saved: float, peak: float, line: str
) -> None:
    kind, patterns = small("single"), ("*.to_q",)
    clean = row(kind, "case", patterns)
    wasteful = row(kind, "case", patterns, {SingleBlock: replace(SINGLE, **planted)})
    assert wasteful["saved_u"] - clean["saved_u"] == pytest.approx(saved, abs=0.01)
    assert wasteful["backward_peak_u"] - clean["backward_peak_u"] >= peak - 0.01
    assert wasteful["plain_u"] == clean["plain_u"]
    assert not line or any(line in held for held in wasteful["tensors"])
    if saved:
        assert wasteful["percent_of_min_cut"] > clean["percent_of_min_cut"]


def test_cases_have_names_of_their_own() -> None:
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)
    assert {kind.family for kind in KINDS} == {"flux", "sdxl", "sd1"}
    assert KINDS[1].unit == 4608 * 3072 * 2


@pytest.fixture
def vectors() -> Iterator[tuple[Tensor, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield torch.randn(2, 5, 16, requires_grad=True), torch.randn(16, requires_grad=True)


def test_rms_norm_in_one_operation_is_torchs(vectors: tuple[Tensor, Tensor]) -> None:
    x, weight = vectors
    norm = RMSNorm(16, eps=1e-6)
    norm.weight = nn.Parameter(weight.detach().clone())
    expected = norm(x)
    with as_on_gpu(norm):
        found = norm(x)
    assert found.equal(expected) and type(norm) is RMSNorm
    by = torch.ones_like(x).cumsum(-1)
    for one, other in zip(
        torch.autograd.grad(found, [x, norm.weight], by),
        torch.autograd.grad(expected, [x, norm.weight], by),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    torch.library.opcheck(rms_norm, (x, weight, 1e-6))
