"""group_norm_silu against its definition: PyTorch and Triton's interpreter."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttune_kernels.dispatch import Backend, forced
from fasttune_kernels.group_norm_silu import (
    group_norm_silu,
    group_norm_silu_backward,
    group_norm_silu_forward,
    group_norm_silu_ref,
)
from fasttune_kernels.group_norm_silu_launch import LAUNCHES, Call, GroupNormConfig
from fasttune_kernels.launch import TARGETS

BACKENDS: tuple[Backend, ...] = ("torch", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-5


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one call, and what it is given."""

    batch: int = 2
    channels: int = 12
    height: int = 5
    width: int = 3
    groups: int = 4
    skip: int = 0
    add: bool = False
    silu: bool = True
    nhwc: bool = True
    weight_dtype: torch.dtype | None = None
    """x's where None."""

    def arguments(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """x, weight, bias, dy and what else is given, in dtypes of a call in `dtype`."""

        def image(channels: int) -> Tensor:
            made = 2 * torch.randn(self.batch, channels, self.height, self.width, dtype=dtype) + 1
            return made.to(memory_format=torch.channels_last) if self.nhwc else made

        joint = self.channels + self.skip
        vector = {"dtype": self.weight_dtype or dtype}
        made = {"x": image(self.channels), "dy": image(joint)}
        made |= {"weight": torch.randn(joint, **vector), "bias": torch.randn(joint, **vector)}
        if self.skip:
            made["skip"] = image(self.skip)
        if self.add:
            made["add"] = torch.randn(self.batch, joint, dtype=dtype)
        return made

    def run(
        self, function: Callable[..., Tensor], arguments: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """y and the gradient of every argument."""
        given = {k: v.detach().requires_grad_() for k, v in arguments.items() if k != "dy"}
        y = function(**given, groups=self.groups, eps=EPS, silu=self.silu)
        y.backward(arguments["dy"].to(y.dtype))
        return {"y": y.detach()} | {k: v.grad for k, v in given.items() if v.grad is not None}


def eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float,
    silu: bool = True,
    add: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """The network's own operations, in x's dtype."""
    x = x if skip is None else torch.cat([x, skip], dim=1)
    x = x if add is None else x + add[:, :, None, None]
    z = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    return F.silu(z) if silu else z


def check(case: Case, dtype: torch.dtype, arguments: dict[str, Tensor] | None = None) -> None:
    """Output and gradients are as near to the truth as eager PyTorch's, within a tolerance: each is
    rounded once to its dtype (eps / 2 of the value), and float32 sums of up to n terms of size 10,
    errors of 2^-24 each, are off by some sqrt(n) 2^-24 10 < 2e-5 for n < 1000."""
    arguments = arguments or case.arguments(dtype)
    ours, plain = case.run(group_norm_silu, arguments), case.run(eager, arguments)
    wide = {name: value.double() for name, value in arguments.items()}
    truth = case.run(group_norm_silu_ref, wide)
    for name, true in truth.items():
        own, other = ours[name], plain[name]
        kind = arguments["x" if name == "y" else name].dtype
        assert own.dtype is kind and own.shape == true.shape, name
        tolerance = torch.finfo(kind).eps * true.abs() + 2e-5
        worst = (other - true).abs().max()  # eager's errors are random, and may be 0 at an element
        assert torch.all((own - true).abs() <= 2 * worst + tolerance), name


CASES = [
    Case(),
    Case(silu=False),
    Case(add=True),
    Case(skip=8),
    Case(skip=20, groups=2, silu=False),
    Case(channels=7, skip=3, groups=5),
    Case(batch=1, channels=6, groups=1, height=1, width=7, add=True),
    Case(batch=8, channels=5, groups=5, height=2, width=3),
    Case(nhwc=False),
    Case(nhwc=False, add=True, silu=False),
    Case(nhwc=False, skip=4),
    # several blocks of 64 channels and chunks of pixels; groups lie across blocks, and across x and skip
    Case(batch=1, channels=130, groups=13, height=5, width=7, add=True),
    Case(batch=2, channels=160, groups=2, height=3, width=6),
    Case(batch=1, channels=128, skip=64, groups=16, height=5, width=7),
    Case(batch=1, channels=72, skip=68, groups=7, height=5, width=4),
    Case(batch=1, channels=2, skip=130, groups=1, height=3, width=3),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_near_the_truth(backend: Backend, case: Case) -> None:
    with forced(backend):
        check(case, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_dtypes(backend: Backend, dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    with forced(backend):
        check(Case(batch=1, add=True, weight_dtype=weight_dtype), dtype)
        check(Case(batch=1, skip=4, weight_dtype=weight_dtype), dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_where_atens_kernels_do_not_fit(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on MPS, and on a GPU without Triton."""
    module = importlib.import_module("fasttune_kernels.group_norm_silu")
    monkeypatch.setattr(module, "_aten_fits", lambda x: False)
    monkeypatch.setattr(torch, "native_group_norm", None)
    check(case, torch.float32)
    check(case, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [Case(add=True), Case(channels=18, skip=6)], ids=str)
def test_raw_backward(backend: Backend, case: Case) -> None:
    """The residual is in dx and dskip and not in dadd; what is not wanted has no elements."""
    given = case.arguments(torch.float32)
    dy, (x, weight, bias) = given["dy"], (given[name] for name in ("x", "weight", "bias"))
    skip, add = given.get("skip"), given.get("add")
    residual = torch.randn_like(dy)
    truth = case.run(group_norm_silu_ref, given)
    with forced(backend):
        _, mean, rstd = group_norm_silu_forward(x, skip, weight, bias, add, case.groups, EPS, True)
        for wanted in (False, True):
            dx, dskip, dadd, dweight, dbias = group_norm_silu_backward(
                dy,
                x,
                skip,
                weight,
                bias,
                add,
                mean,
                rstd,
                residual,
                case.groups,
                True,
                wanted,
                wanted and case.add,
            )
            own, rest = residual.split([case.channels, case.skip], dim=1)
            torch.testing.assert_close(dx, truth["x"] + own)
            if case.skip:
                torch.testing.assert_close(dskip, truth["skip"] + rest)
            vectors = {"weight": dweight, "bias": dbias, "add": dadd}
            for name, gradient in vectors.items():
                if wanted and name in truth:
                    torch.testing.assert_close(gradient, truth[name])
                else:
                    assert gradient.numel() == 0
            assert (dskip.numel() == 0) == (case.skip == 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_in_float32(backend: Backend, dtype: torch.dtype) -> None:
    case = Case(batch=2, channels=80, groups=4, height=6, width=6)
    given = case.arguments(dtype)
    x, weight, bias = (given[name] for name in ("x", "weight", "bias"))
    with forced(backend):
        _, mean, rstd = group_norm_silu_forward(x, None, weight, bias, None, 4, EPS, True)
    var, true = torch.var_mean(x.double().unflatten(1, (4, -1)), dim=(2, 3, 4), correction=0)
    assert mean.dtype is rstd.dtype is torch.float32
    torch.testing.assert_close(mean.double(), true, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(rstd.double(), (var + EPS).rsqrt(), atol=0, rtol=1e-5)


def test_kernels_keep_their_digits_far_from_zero() -> None:
    """Around 1000 float32 has steps of 6e-5. E[x^2] - E[x]^2 is off by about 1e6 2^-24 = 0.06 there,
    and aten's channels_last kernel is so; deviations from a mean are off by some steps."""
    given = Case(batch=1, channels=128, groups=32, height=9, width=9).arguments(torch.float32)
    x, weight, bias = given["x"] + 1000, given["weight"], given["bias"]
    with forced("triton"):
        _, mean, rstd = group_norm_silu_forward(x, None, weight, bias, None, 32, EPS, False)
    var, true = torch.var_mean(x.double().unflatten(1, (32, -1)), dim=(2, 3, 4), correction=0)
    torch.testing.assert_close(mean.double(), true, atol=2e-4, rtol=0)
    torch.testing.assert_close(rstd.double(), (var + EPS).rsqrt(), atol=0, rtol=2e-4)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice of channels": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "slice of rows": lambda x: torch.cat([x, x], dim=2)[:, :, : x.shape[2]],
    "slice of samples": lambda x: torch.cat([x, x])[: x.shape[0]],
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1, :, :1, :1].expand_as(x),
}


@pytest.mark.parametrize(("backend", "nhwc"), [("torch", True), ("torch", False), ("triton", True)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Backend, nhwc: bool, layout: str) -> None:
    change, given = LAYOUTS[layout], Case(nhwc=nhwc, skip=4).arguments(torch.float32)
    # an image of one value for all channels has no variance
    names = ("dy", "skip") if layout == "expanded" else ("dy", "skip", "x")
    with forced(backend):
        check(Case(), torch.float32, given | {name: change(given[name]) for name in names})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nhwc", [True, False])
def test_memory_format_is_that_of_x(backend: Backend, nhwc: bool) -> None:
    given = Case(nhwc=not nhwc, skip=4).arguments(torch.float32)
    x, skip, weight = Case(nhwc=nhwc).arguments(torch.float32)["x"], given["skip"], given["weight"]
    with forced(backend):
        y, mean, rstd = group_norm_silu_forward(x, skip, weight, weight, None, 4, EPS, True)
        dx, dskip, *_ = group_norm_silu_backward(
            given["dy"], x, skip, weight, weight, None, mean, rstd, None, 4, True, True, False
        )
    for made in (y, dx, dskip):
        kind = torch.channels_last if nhwc else torch.contiguous_format
        assert made.stride() == torch.empty(made.shape, memory_format=kind).stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: Backend) -> None:
    case = Case(batch=0, add=True)
    with forced(backend):
        made = case.run(group_norm_silu, case.arguments(torch.float32))
    assert made["y"].shape == made["x"].shape == (0, 12, 5, 3)
    assert made["add"].shape == (0, 12)
    assert torch.equal(made["weight"], torch.zeros(12))
    assert torch.equal(made["bias"], torch.zeros(12))


def test_gradients_of_float64() -> None:
    for case in (Case(add=True), Case(skip=8, height=2), Case(nhwc=False, silu=False)):
        given = case.arguments(torch.float64)
        names = [name for name in given if name != "dy"]

        def call(*tensors: Tensor, case: Case = case, names: list[str] = names) -> Tensor:
            named = dict(zip(names, tensors, strict=True))
            return group_norm_silu(**named, groups=case.groups, eps=EPS, silu=case.silu)

        torch.autograd.gradcheck(call, [given[name].requires_grad_() for name in names])


@pytest.mark.parametrize(
    ("backend", "nhwc", "skip"),
    [
        ("torch", True, 0),
        ("torch", True, 4),
        ("torch", False, 0),
        ("torch", False, 4),
        ("triton", True, 0),  # slow: it runs each op a dozen times
        ("triton", False, 4),
    ],
)
def test_opcheck(backend: Backend, nhwc: bool, skip: int) -> None:
    case = Case(batch=1, nhwc=nhwc, skip=skip, add=skip == 0)
    given = case.arguments(torch.bfloat16)
    inputs = [given.get(name) for name in ("x", "skip", "weight", "bias", "add")]
    with forced(backend):
        _, mean, rstd = group_norm_silu_forward(*inputs, 4, EPS, True)
        for wanted in (True, False) if backend == "torch" else (True,):
            arguments = (given["dy"], *inputs, mean, rstd, given["dy"], 4, True, wanted)
            torch.library.opcheck(group_norm_silu_backward, (*arguments, wanted and case.add))
        for tensor in inputs:
            if tensor is not None:
                tensor.requires_grad_()
        torch.library.opcheck(group_norm_silu_forward, (*inputs, 4, EPS, True))


@pytest.mark.parametrize("case", [Case(add=True), Case(batch=1, skip=8)], ids=str)
def test_every_run_has_the_same_bits(case: Case) -> None:
    given = case.arguments(torch.float32)
    with forced("triton"):
        first, second = case.run(group_norm_silu, given), case.run(group_norm_silu, given)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("skip", [0, 4])
def test_saves_its_arguments_and_statistics(backend: Backend, skip: int) -> None:
    case = Case(skip=skip, add=skip == 0)
    given = {k: v.requires_grad_() for k, v in case.arguments(torch.float16).items() if k != "dy"}
    saved: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with forced(backend), hooks:
        group_norm_silu(**given, groups=4, eps=EPS)
    pointers = {tensor.data_ptr() for tensor in given.values()}
    statistics = [tensor for tensor in saved if tensor.data_ptr() not in pointers]
    assert len(saved) == len(given) + 2
    assert [(tuple(s.shape), s.dtype) for s in statistics] == [((2, 4), torch.float32)] * 2


@pytest.mark.parametrize("nhwc", [True, False])
def test_compiles_into_one_graph(nhwc: bool) -> None:
    case = Case(nhwc=nhwc, skip=4)
    given = case.arguments(torch.float32)
    compiled = torch.compile(group_norm_silu, fullgraph=True, backend="aot_eager")
    ours, plain = case.run(compiled, given), case.run(group_norm_silu, given)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize("frozen", ["x", "skip", "weight", "bias"])
def test_only_what_is_trained_has_a_gradient(frozen: str) -> None:
    case = Case(skip=4)
    given = case.arguments(torch.float32)
    truth = case.run(group_norm_silu_ref, given)
    tensors = {k: v.requires_grad_(k != frozen) for k, v in given.items() if k != "dy"}
    group_norm_silu(**tensors, groups=4, eps=EPS).backward(given["dy"])
    assert tensors.pop(frozen).grad is None
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor.grad, truth[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 12, 5)}, r"x is \(2, 12, 5\)"),
        ({"x": torch.ones(2, 12, 5, 3, dtype=torch.int32)}, "torch.int32; give"),
        ({"skip": torch.ones(2, 4, 5, 3)}, "add or skip"),
        ({"add": None, "skip": torch.ones(2, 4, 5, 2)}, r"skip is \(2, 4, 5, 2\)"),
        ({"add": None, "skip": torch.ones(2, 4, 5, 3).half()}, "skip is .* torch.float16"),
        ({"add": None, "skip": torch.ones(2, 4, 5, 3)}, r"weight is \(12,\).*give \(16,\)"),
        ({"groups": 5}, "12 channels do not make 5 groups"),
        ({"groups": 0}, "0 groups"),
        ({"bias": torch.ones(11)}, r"bias is \(11,\)"),
        ({"weight": torch.ones(12).half()}, "weight is .* torch.float16"),
        ({"add": torch.ones(1, 12)}, r"add is \(1, 12\).*give \(2, 12\)"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, object], message: str) -> None:
    given = Case(add=True).arguments(torch.float32) | {"groups": 4, "eps": EPS} | changes
    given.pop("dy")
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**given)


def test_every_part_has_a_slot() -> None:
    """The groups of a block fit SLOTS, and the blocks of a group SPAN, at the sizes of the networks
    and at ragged ones."""
    sizes = [(320, 0, 32), (320, 320, 32), (640, 320, 32), (1280, 640, 32), (1280, 1280, 32)]
    for channels, skip, groups in [*sizes, (72, 110, 7), (2, 130, 1), (130, 2, 66), (7, 3, 5)]:
        config = GroupNormConfig.from_heuristic(channels, skip, groups, False, "sm_80")
        width = config.block_channels
        own = -(-channels // width)
        block_of = [c // width for c in range(channels)] + [own + c // width for c in range(skip)]
        per_group = (channels + skip) // groups
        held: dict[int, set[int]] = {}
        for channel, block in enumerate(block_of):
            held.setdefault(block, set()).add(channel // per_group)
        assert max(len(found) for found in held.values()) <= config.slots
        for group in range(groups):
            assert len(set(block_of[group * per_group :][:per_group])) <= config.span


def test_one_sample_is_many_programs() -> None:
    x = torch.empty(1, 16384, 320).unflatten(1, (128, 128)).permute(0, 3, 1, 2)
    call = Call.of(x, None, None, 32, backward=False)
    assert call.grid == (5, 4, 1)  # 4 a processor of the interpreter's 4, rounded up
    assert call.shared["chunk_pixels"] * call.grid[1] >= 16384


def test_what_ships_is_what_launches() -> None:
    names = {launch.name for launch in LAUNCHES}
    assert len(names) == 9
    for name in names:
        targets = [t for launch in LAUNCHES if launch.name == name for t in launch.targets]
        assert sorted(targets) == sorted(TARGETS)
