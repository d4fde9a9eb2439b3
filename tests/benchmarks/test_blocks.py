"""Gate blocks: its numbers against saved-tensor hooks on real tensors, and what it says of planted waste."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.static.blocks import KINDS, Block, Input, Kind, row
from benchmarks.static.gpu_operations import as_on_gpu, rms_norm
from fasttune.models.flux import DoubleBlock, SingleBlock
from fasttune.models.layers import LayerNorm, RMSNorm
from fasttune.models.unet import TransformerBlock

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

WIDTH, TEXT, IMAGE = 64, 32, 96
TABLE = Input((TEXT + IMAGE, 1, 8), dtype=torch.float32)


def small(name: str, ours: Callable[[], nn.Module] | None = None) -> Kind:
    """A small block of one of the kinds, or `ours` against it."""
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
        ours=ours or SMALL[name],
        plain=SMALL[name],
        inputs=inputs,
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
    expected = saved_by_autograd(Block(kind, kind.ours, patterns))
    assert found["saved_u"] == found["plain_u"] == round(expected / kind.unit, 3)
    assert found["recompute_u"] == 0
    assert found["backward_peak_u"] > found["saved_u"] > 8
    assert 0 < found["min_cut_u"] <= found["saved_u"] + 0.5
    assert sum(u_of(line) for line in found["tensors"]) == pytest.approx(
        expected / kind.unit, abs=0.05
    )


def u_of(line: str) -> float:
    """What a line of tensors holds."""
    head, size, *_ = line.split(", ")
    count = 1 if head.startswith("smaller") else int(head.split(" ")[0])
    return count * float(size.removesuffix(" u"))


class Wasteful(SingleBlock):
    """Has one tensor more to save, the mask's."""

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + torch.zeros_like(x) * x.sigmoid(), *rest)


class Float32Norm(LayerNorm):
    """Silently takes its input to float32, and keeps that."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, eps=self.eps).to(x.dtype)


def with_float32_norm() -> nn.Module:
    block = SingleBlock(WIDTH, 4)
    block.norm.norm = Float32Norm(WIDTH, eps=1e-6, elementwise_affine=False)
    return block


@pytest.mark.parametrize(
    ("build", "more", "line"),
    [
        # sigmoid and zeros, and the sum, which the norm and the residual take in place of the input
        (lambda: Wasteful(WIDTH, 4), 3.0, "1 of 1x128x64 bfloat16, 1.0 u, sigmoid"),
        (with_float32_norm, 2.0, "float32, 2.0 u, _to_copy"),
    ],
    ids=["saved tensor", "float32 copy"],
)
def test_waste_in_a_block_changes_its_row(
    build: Callable[[], nn.Module], more: float, line: str
) -> None:
    found = row(small("single", build), "case", ("*.to_q",))
    assert found["saved_u"] - found["plain_u"] == pytest.approx(more, abs=0.04)
    assert found["backward_peak_u"] >= found["plain_backward_peak_u"] + 1
    assert any(line in held for held in found["tensors"])


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
