"""The C++ optimizer step: float64 AdamW, PyTorch's path, and its own exact run with the rounding applied after."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttune_kernels import cpu_library
from fasttune_kernels.arena import Arena, random_words
from fasttune_kernels.blockwise import dequantize_blockwise, dynamic_map, quantize_blockwise
from fasttune_kernels.dispatch import forced
from fasttune_kernels.optimizer_step import optimizer_step_

ROOT = Path(__file__).parents[2]
COMPILERS = [name for name in ("g++", "clang++", "c++") if shutil.which(name)]
SHAPES = ((3,), (1,), (257, 5), (2, 3, 3, 3), (1024,), (0,), (40, 33), (300, 260))
"""Less than a tile, one, more, no element at all, and more than one chunk of 64 tiles."""
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
LEVELS = cpu_library.levels() if cpu_library.available() else ()

built = pytest.mark.skipif(not cpu_library.available(), reason=cpu_library.reason())
each_level = pytest.mark.parametrize("level", LEVELS)


def test_library_is_built_where_there_is_a_compiler() -> None:
    if not COMPILERS:
        pytest.skip("no C++ compiler, and so no library")
    assert cpu_library.available(), f"{cpu_library.reason()}; {COMPILERS} are there"
    names = ("optimizer_step.cpp", "tile.h", "moments_8bit.h")
    sources = (ROOT / "csrc" / "cpu" / name for name in names)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    assert cpu_library.sources() == digest, "older than csrc/cpu: pip install -e . again"


@pytest.mark.parametrize(
    ("compiler", "says"), [("no-such-compiler", "no-such-compiler"), ("false", "exit code 1")]
)
def test_install_works_without_a_compiler(compiler: str, says: str, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
    done = subprocess.run(
        [*command, "--build-temp", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "CXX": compiler},
        capture_output=True,
        text=True,
        check=True,
    )
    (warning,) = [line for line in done.stderr.splitlines() if "csrc/cpu" in line]
    assert says in warning and "works without it" in warning
    assert not list(tmp_path.rglob("*.so"))


# -- a run ------------------------------------------------------------------------------------------


def tensors(dtype: torch.dtype, seed: int, scale: float = 1.0) -> list[Tensor]:
    """Of SHAPES, one element beyond an address that is aligned to anything."""
    g = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(s, generator=g) * scale for s in SHAPES]
    return [torch.zeros(t.numel() + 1, dtype=dtype)[1:].view(t.shape).copy_(t) for t in drawn]


@dataclass
class Run:
    weights: list[Tensor]
    m: Tensor
    v: Tensor
    m_absmax: Tensor | None = None
    v_absmax: Tensor | None = None
    ema: Tensor | None = None
    compensation: Tensor | None = None
    rounding: str = "nearest"

    @property
    def all(self) -> list[Tensor]:
        state = (self.m, self.v, self.m_absmax, self.v_absmax, self.ema, self.compensation)
        return [*self.weights, *(t for t in state if t is not None)]

    def arguments(self, grads: Sequence[Tensor], t: int, **other: Any) -> dict[str, Any]:
        values = {"lr": 1e-2, "factor": 0.5, "keep": 1.0, "ema_share": 0.1, **other}
        corrections = [1 - BETA1**t, 1 - BETA2**t]
        scalars = [values["lr"], values["factor"], values["keep"], *corrections]
        return {
            **vars(self),
            "grads": grads,
            "groups": [i % 2 for i in range(len(self.weights))],
            "hyper": torch.tensor([[1.0, 0.1], [0.5, 0.0]]),
            "scalars": torch.tensor([*scalars, values["ema_share"]]),
            "beta1": BETA1,
            "beta2": BETA2,
            "eps": EPS,
            "seed": torch.tensor([t + (3 << 40)]),
        }

    def step(self, grads: Sequence[Tensor], t: int, level: str, **other: Any) -> None:
        cpu_library.optimizer_step_(**self.arguments(grads, t, **other), level=level)


def start(
    dtype: torch.dtype,
    state: torch.dtype = torch.float32,
    ema: torch.dtype | None = torch.float32,
    rounding: str = "nearest",
) -> Run:
    weights = tensors(dtype, 0)
    arena = Arena.of(weights)
    absmax = [arena.absmax("cpu") if state == torch.uint8 else None for _ in range(2)]
    average = None if ema is None else arena.zeros(ema, "cpu")
    rest = arena.zeros(torch.bfloat16, "cpu") if rounding == "kahan" else None
    m, v = arena.zeros(state, "cpu"), arena.zeros(state, "cpu")
    return Run(weights, m, v, *absmax, average, rest, rounding)


def copied(run: Run) -> Run:
    return replace(
        run,
        **{k: t.clone() for k, t in vars(run).items() if isinstance(t, Tensor)},
        weights=[w.clone() for w in run.weights],
    )


# -- the update ---------------------------------------------------------------------------------------


@built
@each_level
def test_follows_adamw_in_float64(level: str) -> None:
    run = start(torch.float32)
    truth = [w.double().requires_grad_() for w in run.weights]
    average = [torch.zeros_like(w) for w in truth]
    groups = [
        {"params": truth[0::2], "lr": 1e-2, "weight_decay": 0.1},
        {"params": truth[1::2], "lr": 0.5e-2, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(BETA1, BETA2), eps=EPS)
    for t in range(1, 6):
        grads = tensors(torch.float32, t)
        for w, g in zip(truth, grads, strict=True):
            w.grad = g.double() * 0.5
        optimizer.step()
        share = 0.75 if t == 1 else 0.1  # both halves of lerp
        torch._foreach_lerp_(average, [w.detach() for w in truth], share)
        run.step(grads, t, level, ema_share=share)
        views = Arena.of(run.weights).views(run.ema, run.weights)
        # A weight of up to 4 is rounded twice in a step, by half of 4 * 2^-23 each; so is an average.
        for mine, right in zip([*run.weights, *views], [*truth, *average], strict=True):
            torch.testing.assert_close(mine.double(), right.detach(), rtol=0, atol=t * 5e-7)


@built
@each_level
@pytest.mark.parametrize("rounding", ["nearest", "kahan"])
@pytest.mark.parametrize("state", [torch.float32, torch.uint8])
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
    ],
)
def test_agrees_with_pytorch(
    dtype: torch.dtype, grad_dtype: torch.dtype, state: torch.dtype, rounding: str, level: str
) -> None:
    mine, theirs = (start(dtype, state, rounding=rounding) for _ in range(2))
    for t in range(1, 4):
        grads = tensors(grad_dtype, t)
        mine.step(grads, t, level)
        with forced("torch"):
            optimizer_step_(**theirs.arguments(grads, t))
    # PyTorch's root may be off by an ulp, and without fused products sums are, too: an update of 1e-2
    # differs by 1e-9, and what is stored changes where it was as near to the next number.
    for a, b in zip(mine.weights, theirs.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=torch.finfo(dtype).eps, atol=1e-7)
        assert dtype == torch.float32 or (a != b).sum() <= 1 + a.numel() // 500
    if rounding == "nearest":
        torch.testing.assert_close(mine.ema, theirs.ema, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)
    assert (mine.m != theirs.m).float().mean() < (0.5 if state == torch.float32 else 1e-3)
    if state == torch.float32:
        torch.testing.assert_close(mine.m, theirs.m, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(mine.v, theirs.v, rtol=1e-5, atol=1e-10)
    else:
        assert (mine.m.int() - theirs.m.int()).abs().max() <= 1
        torch.testing.assert_close(mine.v_absmax, theirs.v_absmax)


@built
def test_public_operation_runs_it() -> None:
    mine, through = start(torch.bfloat16), start(torch.bfloat16)
    grads = tensors(torch.bfloat16, 1)
    mine.step(grads, 1, LEVELS[-1])
    optimizer_step_(**through.arguments(grads, 1))
    for a, b in zip(mine.all, through.all, strict=True):
        assert a.equal(b)


# -- what is stored: the exact run, rounded as documented -----------------------------------------------


def rounded(x: Tensor, bits: Tensor) -> Tensor:
    """Up by the part that is cut off, where these 16 bits are carried into it."""
    raw = x.view(torch.int32) + (bits & 0xFFFF).to(torch.int32)
    return (raw & -65536).view(torch.float32).to(torch.bfloat16)


def words(run: Run, stream: int, t: int) -> Tensor:
    return random_words(torch.tensor([t + (3 << 40)]), 0, run.m.numel(), stream)


def after_steps(run: Run, level: str) -> Run:
    for t in range(1, 4):
        run.step(tensors(torch.float32, t), t, level)
    return run


@built
@each_level
def test_stochastic_rounding_of_weights_and_average(level: str) -> None:
    before = after_steps(start(torch.bfloat16, ema=torch.bfloat16, rounding="stochastic"), level)
    grads = tensors(torch.float32, 9)
    exact = replace(copied(before), weights=[w.float() for w in before.weights])
    exact.ema = None
    exact.step(grads, 4, level)
    run, wide = copied(before), copied(before)
    wide.ema = wide.ema.float()
    for other in (run, wide):
        other.step(grads, 4, level)
    bits, arena = words(run, 0, 4), Arena.of(run.weights)
    for w, x, offset in zip(run.weights, exact.weights, arena.offsets, strict=True):
        assert w.view(-1).equal(rounded(x.view(-1), bits[offset : offset + w.numel()]))
        # A quarter is not rounded to the nearest: the mean of min(p, 1 - p).
        assert w.numel() < 1000 or 0.2 < (w != x.bfloat16()).float().mean() < 0.3
    assert run.ema.equal(rounded(wide.ema, bits >> 16))


@built
@each_level
def test_bf16_state_is_rounded_stochastically(level: str) -> None:
    run = after_steps(start(torch.float32, torch.bfloat16, None), level)
    exact = replace(copied(run), m=run.m.float(), v=run.v.float())
    for other in (run, exact):
        other.step(tensors(torch.float32, 9), 4, level)
    bits = words(run, 1, 4)
    assert run.m.equal(rounded(exact.m, bits >> 16))
    assert run.v.equal(rounded(exact.v, bits))
    for a, b in zip(run.weights, exact.weights, strict=True):
        assert a.equal(b)


@built
@each_level
def test_8_bit_state_is_that_of_the_definition(level: str) -> None:
    run = after_steps(start(torch.float32, torch.uint8, None), level)
    m = dequantize_blockwise(run.m, run.m_absmax, True)
    v = dequantize_blockwise(run.v, run.v_absmax, False)
    exact = replace(copied(run), m=m, v=v, m_absmax=None, v_absmax=None)
    for other in (run, exact):
        other.step([g * 10 ** (i - 4) for i, g in enumerate(tensors(torch.float32, 9))], 4, level)
    for codes, absmax, x, signed in (
        (run.m, run.m_absmax, exact.m, True),
        (run.v, run.v_absmax, exact.v, False),
    ):
        right = quantize_blockwise(x, signed)
        assert codes.equal(right[0]) and absmax.equal(right[1])
        assert codes.unique().numel() > 200
    for a, b in zip(run.weights, exact.weights, strict=True):
        assert a.equal(b)


@built
@each_level
def test_codes_on_both_sides_of_every_border(level: str) -> None:
    values = dynamic_map(True, torch.device("cpu"))
    middles = (values[1:] + values[:-1]) / 2
    near = [middles, *(middles.nextafter(torch.tensor(end)) for end in (-2.0, 2.0))]
    small = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-41, 2.0**-24, -(2.0**-24), -1.0])
    numbers = torch.cat([*near, small, values])
    rows = torch.nn.functional.pad(numbers, (0, -len(numbers) % 255)).view(-1, 255)
    grad = torch.cat([rows, torch.ones(len(rows), 1)], dim=1).view(
        -1
    )  # the scale of each block is 1
    weight = torch.zeros_like(grad)
    arena = Arena.of([weight])
    run = Run([weight], arena.zeros(torch.uint8, "cpu"), arena.zeros(torch.uint8, "cpu"))
    run.m_absmax, run.v_absmax = arena.absmax("cpu"), arena.absmax("cpu")
    arguments = {**run.arguments([grad], 1, factor=1.0), "beta1": 0.0}
    cpu_library.optimizer_step_(**arguments, level=level)
    codes, absmax = quantize_blockwise(grad, True)
    assert run.m[: len(grad)].equal(codes)
    assert run.m_absmax[: len(absmax)].equal(absmax)


@built
@each_level
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number(dtype: torch.dtype, level: str) -> None:
    """Without a gradient a weight is multiplied by 1 - lr * decay, and rounded to the nearest."""
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    for lr in (0.0, 0.3, 7.0):
        weight = numbers.clone()
        arena = Arena.of([weight])
        run = Run([weight], *(arena.zeros(torch.float32, "cpu") for _ in range(2)))
        run.step([torch.zeros_like(weight)], 1, level, lr=lr)
        rest = 1 - torch.tensor(0.1) * torch.tensor(lr)
        right = (numbers.float() * rest).to(dtype)
        torch.testing.assert_close(weight, right, rtol=0, atol=0, equal_nan=True)


@built
def test_bf16_average_moves() -> None:
    weight = torch.ones(4096)
    arena = Arena.of([weight])
    run = Run([weight], arena.zeros(torch.float32, "cpu"), arena.zeros(torch.float32, "cpu"))
    run.ema = torch.full((4096,), 0.5, dtype=torch.bfloat16)
    for t in range(1, 101):
        run.step([torch.zeros(4096)], t, LEVELS[-1], lr=0.0, ema_share=1e-4)
    # 1 - 0.5 * 0.9999^100; a step is 2^-9 with probability 0.0256, so the mean of 4096 is off by 5e-5
    assert run.ema.float().mean().item() == pytest.approx(0.504975, abs=3e-4)


# -- around it ------------------------------------------------------------------------------------------


@built
def test_step_that_is_not_kept_changes_nothing() -> None:
    run = after_steps(start(torch.bfloat16, torch.uint8, torch.bfloat16, "kahan"), LEVELS[-1])
    before = copied(run)
    run.step([torch.full_like(g, float("nan")) for g in run.weights], 4, LEVELS[-1], keep=0.0)
    for a, b in zip(run.all, before.all, strict=True):
        assert a.equal(b)


@built
@each_level
def test_numbers_that_are_not_finite_stay_where_they_are(level: str) -> None:
    for state in (torch.float32, torch.bfloat16, torch.uint8):
        run = start(torch.bfloat16, state, torch.bfloat16, "stochastic")
        grads = tensors(torch.bfloat16, 1)
        grads[3].view(-1)[:2] = torch.tensor([float("nan"), float("inf")])
        run.step(grads, 1, level)
        assert run.weights[3].view(-1)[:2].isnan().all()
        others = [w for i, w in enumerate(run.weights) if i != 3]
        assert all(w.isfinite().all() for w in others)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@built
def test_threads_do_not_change_a_bit(threads: None) -> None:
    results = []
    for count, on_torch in ((1, True), (2, True), (3, True), (3, False)):
        torch.set_num_threads(count)
        run = start(torch.bfloat16, torch.uint8, torch.bfloat16, "stochastic")
        grads = tensors(torch.bfloat16, 1)
        arguments = run.arguments(grads, 1)
        cpu_library.optimizer_step_(**arguments, on_torch_threads=on_torch)
        norm = cpu_library.gradient_norm(grads, on_torch_threads=on_torch)
        results.append([*run.all, norm])
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@built
def test_memory_formats() -> None:
    run, grads = start(torch.float32), tensors(torch.float32, 1)
    other = copied(run)
    other.weights[3] = other.weights[3].contiguous(memory_format=torch.channels_last)
    for which in (run, other):
        like = [torch.empty_like(w).copy_(g) for w, g in zip(which.weights, grads, strict=True)]
        which.step(like, 1, LEVELS[-1])
    assert other.weights[3].equal(run.weights[3])


@built
def test_nothing_to_do() -> None:
    empty = torch.zeros(0)
    for weights in ([], [torch.zeros(0, 4)]):
        run = Run(weights, empty, empty)
        run.step(weights, 1, LEVELS[-1])
    assert cpu_library.gradient_norm([]).item() == 0


@built
@each_level
def test_gradient_norm(level: str) -> None:
    grads = [*tensors(torch.float32, 1), *tensors(torch.bfloat16, 2), *tensors(torch.float16, 3)]
    right = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt().float()
    assert cpu_library.gradient_norm(grads, level=level).equal(right)
    large = torch.tensor([3e30, 4e30])  # whose squares are not float32
    assert cpu_library.gradient_norm([large], level=level).item() == pytest.approx(5e30)
    grads[2][0, 0] = float("inf")
    assert not cpu_library.gradient_norm(grads, level=level).isfinite()


@built
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weights": [torch.zeros(4, dtype=torch.float64)]}, "weight 0 is torch.float64"),
        ({"weights": [torch.zeros(8)[::2]]}, "strides"),
        ({"weights": [torch.zeros(4, device="meta")]}, "on meta"),
        ({"grads": [torch.zeros(4, dtype=torch.bfloat16)]}, "gradient 0 is torch.bfloat16"),
        ({"grads": [torch.zeros(5)]}, r"shape \(5,\)"),
        ({"grads": [torch.zeros(1).expand(4)]}, "strides"),
        ({"grads": []}, "as many of each"),
        ({"m": torch.zeros(1023)}, "expected 1024"),
        ({"m": torch.zeros(1024, dtype=torch.float16)}, "m is torch.float16"),
        ({"v": torch.zeros(1024, dtype=torch.bfloat16)}, "v is torch.bfloat16"),
        ({"m": torch.zeros(2048)[::2]}, "m is .* strides"),
        ({"m_absmax": torch.zeros(4)}, "belongs to 8-bit state"),
        ({"m": torch.zeros(1024).byte(), "v": torch.zeros(1024).byte()}, "belongs to 8-bit"),
        ({"ema": torch.zeros(4)}, "expected 1024"),
        ({"ema": torch.zeros(1024, dtype=torch.float16)}, "ema is"),
        ({"rounding": "kahan"}, "compensation"),
        ({"rounding": "up"}, "allowed are nearest"),
        ({"groups": [1]}, "hyper has 1"),
        ({"groups": [-1]}, "groups -1"),
        ({"hyper": torch.zeros(1, 2, dtype=torch.float64)}, "hyper is"),
        ({"hyper": torch.zeros(3)}, "hyper is"),
        ({"scalars": torch.ones(5)}, "scalars is"),
        ({"seed": torch.ones(1)}, "seed is"),
        (
            {
                "rounding": "stochastic",
                "weights": [torch.zeros(4).half()],
                "grads": [torch.zeros(4)],
            },
            "fp16",
        ),
    ],
)
def test_arguments_that_do_not_fit(wrong: dict[str, Any], message: str) -> None:
    right = Run([torch.zeros(4)], torch.zeros(1024), torch.zeros(1024)).arguments(
        [torch.zeros(4)], 1
    )
    right["hyper"] = torch.ones(1, 2)
    cpu_library.optimizer_step_(**right)
    with pytest.raises(ValueError, match=message):
        cpu_library.optimizer_step_(**{**right, **wrong})


@built
def test_gradients_that_do_not_fit() -> None:
    for wrong in (torch.zeros(4, dtype=torch.int32), torch.zeros(8)[::2]):
        with pytest.raises(ValueError, match="gradient 1 is"):
            cpu_library.gradient_norm([torch.ones(2), wrong])


def test_missing_library_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    for file, why in ((tmp_path / "none.so", "not built"), (broken, "does not open")):
        monkeypatch.setattr(cpu_library, "FILE", file)
        cpu_library._open.cache_clear()
        assert not cpu_library.available() and why in cpu_library.reason()
        with pytest.raises(RuntimeError, match=why):
            cpu_library.gradient_norm([torch.ones(2)])
    monkeypatch.undo()
    cpu_library._open.cache_clear()
