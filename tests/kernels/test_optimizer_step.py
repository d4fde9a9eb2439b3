"""The optimizer step: torch's AdamW is the truth, and what rounding and 8 bits may add to it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttune_kernels import arena, arena_tables, optimizer_step
from fasttune_kernels.arena import Arena
from fasttune_kernels.arena_tables import ChunkConfig
from fasttune_kernels.blockwise import dequantize_blockwise
from fasttune_kernels.dispatch import Backend, forced
from fasttune_kernels.ema_step import ema_step_
from fasttune_kernels.optimizer_step import optimizer_step_, optimizer_step_ref

BETAS, EPS = (0.9, 0.999), 1e-8
SHAPES = ((3,), (0,), (257, 5), (2, 3, 3, 3), (1024,))
"""Scalars, a tile, less and more than one, and no element at all."""
BACKENDS: tuple[Backend, ...] = ("torch", "triton")
FP32, BF16, FP16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8

both = pytest.mark.parametrize("backend", BACKENDS)


def tensors(
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    seed: int = 0,
    scale: float = 1.0,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(s, generator=generator) * scale).to(dtype) for s in shapes]


@dataclass
class Run:
    """Weights with the state of a run."""

    weights: list[Tensor]
    state: torch.dtype = FP32
    ema: torch.dtype | None = None
    rounding: str = "nearest"
    hyper: tuple[tuple[float, float], ...] = ((1.0, 0.1),)
    groups: list[int] = field(default_factory=list)
    arenas: dict[str, Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layout = Arena.of(self.weights)
        self.groups = self.groups or [0] * len(self.weights)
        eight, kahan = self.state == U8, self.rounding == "kahan"
        self.arenas = {
            "m": self.layout.zeros(self.state, "cpu"),
            "v": self.layout.zeros(self.state, "cpu"),
            "m_absmax": self.layout.absmax("cpu") if eight else None,
            "v_absmax": self.layout.absmax("cpu") if eight else None,
            "ema": None if self.ema is None else self.layout.zeros(self.ema, "cpu"),
            "compensation": self.layout.zeros(BF16, "cpu") if kahan else None,
        }
        if self.ema is not None:
            for view, w in zip(self.views("ema"), self.weights, strict=True):
                view.copy_(w)

    def views(self, name: str) -> list[Tensor]:
        return self.layout.views(self.flat(name), self.weights)

    def flat(self, name: str) -> Tensor:
        flat, absmax = self.arenas[name], self.arenas.get(f"{name}_absmax")
        assert flat is not None
        return flat if absmax is None else dequantize_blockwise(flat, absmax, name == "m")

    def step(
        self,
        grads: Sequence[Tensor],
        t: int,
        *,
        lr: float = 1e-2,
        factor: float = 1.0,
        keep: float = 1.0,
        ema_decay: float = 0.9,
        seed: int = 0,
        **changes: Any,
    ) -> None:
        corrections = [1 - beta**t for beta in BETAS]
        device = self.weights[0].device
        arguments = {
            "weights": self.weights,
            "grads": grads,
            **self.arenas,
            "groups": self.groups,
            "hyper": torch.tensor(self.hyper, device=device),
            "scalars": torch.tensor([lr, factor, keep, *corrections, 1 - ema_decay], device=device),
            "beta1": BETAS[0],
            "beta2": BETAS[1],
            "eps": EPS,
            "rounding": self.rounding,
            "seed": torch.tensor([seed + t], device=device),
        }
        optimizer_step_(**(arguments | changes))

    def everything(self) -> list[Tensor]:
        return [*self.weights, *(x for x in self.arenas.values() if x is not None)]


KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": FP32, "ema": FP32},
    "bf16": {"dtype": BF16, "ema": FP32, "rounding": "stochastic"},
    "bf16, 8-bit state": {"dtype": BF16, "state": U8, "ema": BF16, "rounding": "stochastic"},
    "bf16, bf16 state": {"dtype": BF16, "state": BF16, "rounding": "kahan"},
    "fp16": {"dtype": FP16, "state": U8, "ema": FP32, "rounding": "kahan"},
}


def run_of(kind: str, shapes: Sequence[tuple[int, ...]] = SHAPES) -> Run:
    options = dict(KINDS[kind])
    return Run(tensors(options.pop("dtype"), shapes), **options)


# -- truth -------------------------------------------------------------------------------------------


def test_reference_is_adamw() -> None:
    w = torch.randn(50, dtype=torch.float64)
    theirs = w.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=BETAS, eps=EPS, weight_decay=0.1)
    m = v = torch.zeros_like(w)
    for t in range(1, 6):
        g = torch.randn(50, dtype=torch.float64)
        theirs.grad = g * 0.5
        optimizer.step()
        w, m, v, _ = optimizer_step_ref(
            *(w, g, m, v, None),
            lr=1e-2, factor=0.5, weight_decay=0.1, beta1=0.9, beta2=0.999, eps=EPS, step=t,
        )  # fmt: skip
        torch.testing.assert_close(w, theirs.detach(), rtol=1e-13, atol=1e-15)


@both
def test_float32_follows_adamw_step_by_step(backend: Backend) -> None:
    run = Run(tensors(FP32), ema=FP32, hyper=((1.0, 0.0), (0.5, 0.1)))
    run.groups[1::2] = [1] * len(run.groups[1::2])
    truth = [w.double().requires_grad_() for w in run.weights]
    average = [w.detach().clone() for w in truth]
    groups = [
        {"params": truth[0::2], "lr": 1e-2, "weight_decay": 0.0},
        {"params": truth[1::2], "lr": 0.5e-2, "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS)
    for t in range(1, 5):
        grads = tensors(FP32, seed=t)
        for w, g in zip(truth, grads, strict=True):
            w.grad = g.double() * 0.25
        optimizer.step()
        torch._foreach_lerp_(average, [w.detach() for w in truth], 0.1)
        with forced(backend):
            run.step(grads, t, factor=0.25)
        # A float32 update of at most 2 lr each step, in weights of up to 4: half an ulp of 4 a step.
        for w, e, right, mean in zip(run.weights, run.views("ema"), truth, average, strict=True):
            torch.testing.assert_close(w.double(), right.detach(), rtol=0, atol=t * 2.4e-7 + 1e-7)
            torch.testing.assert_close(e.double(), mean, rtol=0, atol=t * 2.4e-7 + 1e-7)
    for w, m, v in zip(truth, run.views("m"), run.views("v"), strict=True):
        torch.testing.assert_close(m.double(), optimizer.state[w]["exp_avg"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(
            v.double(), optimizer.state[w]["exp_avg_sq"], rtol=1e-5, atol=1e-9
        )


@both
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_16_bit_weights_are_the_rounded_truth(dtype: torch.dtype, backend: Backend) -> None:
    run = Run(tensors(dtype), ema=FP32)
    before = [w.double() for w in run.weights]
    grads = tensors(dtype, seed=1)
    with forced(backend):
        run.step(grads, 1)
    for w, old, g in zip(run.weights, before, grads, strict=True):
        right, *_ = optimizer_step_ref(
            *(old, g.double(), 0 * old, 0 * old, None),
            lr=1e-2, factor=1.0, weight_decay=0.1, beta1=0.9, beta2=0.999, eps=EPS, step=1,
        )  # fmt: skip
        # Half an ulp, and what float32 arithmetic moves a value across the middle of two.
        torch.testing.assert_close(
            w.double(), right, rtol=torch.finfo(dtype).eps / 2 * 1.0001, atol=3e-8
        )


@pytest.mark.parametrize("kind", KINDS)
def test_triton_is_the_pytorch_path(kind: str) -> None:
    runs = {backend: run_of(kind) for backend in BACKENDS}
    for t in range(1, 4):
        grads = tensors(FP32 if t == 2 else KINDS[kind]["dtype"], seed=t)
        for backend, run in runs.items():
            with forced(backend):
                run.step(grads, t, ema_decay=0.99)
    ours, theirs = runs["torch"], runs["triton"]
    eps = torch.finfo(KINDS[kind]["dtype"]).eps
    for x, y in zip(ours.weights, theirs.weights, strict=True):
        # The same random bits: they part where the last bit of float32 decides, by one step of the
        # weight. Where it decides between two codes, the next update is another.
        far = (x.double() - y.double()).abs() > eps * x.double().abs() + 1e-6
        assert far.sum() <= (0.002 * x.numel() if ours.state == U8 else 0)
        assert (x != y).sum() <= 0.01 * x.numel() + 1 or eps < 1e-6
    for name in ("m", "v", *(["ema"] if ours.ema else [])):
        x, y = ours.flat(name).double(), theirs.flat(name).double()
        step = {FP32: 1e-5, BF16: 2**-7, U8: 0.2}[ours.ema or FP32 if name == "ema" else ours.state]
        assert ((x - y).abs() <= step * x.abs().amax() * (0.1 if step == 0.2 else 1) + 1e-9).all()
        assert (x - y).norm() <= 0.01 * x.norm()


@both
def test_channels_last_unaligned_and_expanded(backend: Backend) -> None:
    base = torch.randn(40)
    first = base[0].clone()
    weight = torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last)
    run = Run([weight, base[1:], torch.randn(8, 4, 1, 1)], hyper=((1.0, 0.0),))
    before = [w.clone() for w in run.weights]
    one = torch.ones(8, 4, 1, 1).as_strided((8, 4, 1, 1), (4, 1, 4, 4))
    grads = [torch.arange(270.0).view(6, 5, 3, 3) - 100.5, torch.ones(1).expand(39), one]
    with forced(backend):
        run.step(grads, 1)
    # The first step of Adam is lr times the sign.
    for w, old, g in zip(run.weights, before, grads, strict=True):
        torch.testing.assert_close(w, old - 1e-2 * g.sign(), rtol=0, atol=1e-6)
    assert run.weights[0].is_contiguous(memory_format=torch.channels_last)
    assert base[0] == first  # in front of the weight, in its storage


@both
def test_many_tiny_tensors_of_two_dtypes(backend: Backend) -> None:
    shapes = [(1 + 7 * i % 37,) for i in range(24)]
    weights = [w.to(BF16 if i % 3 else FP32) for i, w in enumerate(tensors(FP32, shapes))]
    run = Run(weights)
    grads = [torch.full_like(w, 0.5) for w in weights]
    before = [w.double() for w in weights]
    with forced(backend):
        run.step(grads, 1)
    for w, old in zip(run.weights, before, strict=True):
        right = old * (1 - 1e-3) - 1e-2
        torch.testing.assert_close(w.double(), right, rtol=torch.finfo(w.dtype).eps, atol=1e-6)
    tables = arena_tables.tables_of((weights, grads), run.groups, 4)
    assert len(tables.ranges) == 2  # launches


@both
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_where_the_step_is_not_kept(kind: str, backend: Backend) -> None:
    run = run_of(kind)
    with forced(backend):
        run.step(tensors(FP32, seed=1), 1)
        before = [x.clone() for x in run.everything()]
        run.step([g * torch.nan for g in tensors(FP32, seed=2)], 2, keep=0.0)
        for x, old in zip(run.everything(), before, strict=True):
            assert torch.equal(x, old)
        run.step(tensors(FP32, seed=2), 2)
        assert not torch.equal(run.weights[2], before[2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_nobody_waits_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, masked = run_of(kind), run_of(kind)
    with forced("torch"):
        for t in (1, 2):
            plain.step(tensors(FP32, seed=t), t)
            with monkeypatch.context() as patch:
                patch.setattr(optimizer_step, "_is_readable", lambda x: False)
                masked.step(tensors(FP32, seed=t), t)
                masked.step([g * torch.inf for g in tensors(FP32, seed=t)], t, keep=0.0)
            for x, y in zip(plain.everything(), masked.everything(), strict=True):
                assert torch.equal(x, y)


# -- rounding ----------------------------------------------------------------------------------------


@both
def test_stochastic_rounding_has_the_right_mean(backend: Backend) -> None:
    # Updates of 1e-3 are a quarter of half an ulp of 1: to the nearest, nothing would move.
    moved = {}
    for rounding in ("nearest", "stochastic"):
        run = Run([torch.ones(3000, dtype=BF16)], hyper=((1.0, 0.0),), rounding=rounding)
        with forced(backend):
            for t in range(1, 7):
                run.step([torch.full((3000,), -1.0, dtype=BF16)], t, lr=1e-3)
        moved[rounding] = run.weights[0].double().mean().item() - 1
    assert moved["nearest"] == 0
    # A rounding's deviation is below an ulp, 2^-7, over 2 for p = 1/2; 4 standard deviations of 6.
    assert moved["stochastic"] == pytest.approx(6e-3, abs=4 * 2**-8 * math.sqrt(6 / 3000))


@both
def test_random_bits_are_those_of_seed_and_place(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = ((7,), (41, 40))

    def weights(seed: int) -> list[Tensor]:
        run = run_of("bf16, 8-bit state", shapes)
        with forced(backend):
            run.step(tensors(BF16, shapes, seed=3), 1, seed=seed)
        return run.everything()

    first, again, other = weights(7), weights(7), weights(8)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
    # Another launch geometry.
    monkeypatch.setattr(optimizer_step, "limit_of", lambda device: arena.BLOCK)
    config = ChunkConfig(rows=1, num_warps=4, tiles=1)
    monkeypatch.setattr(ChunkConfig, "from_heuristic", lambda *args, **sizes: config)
    assert all(torch.equal(x, y) for x, y in zip(first, weights(7), strict=True))


@both
def test_kahan_keeps_what_rounding_cuts_off(backend: Backend) -> None:
    errors = {}
    for rounding in ("nearest", "kahan"):
        run = Run(tensors(BF16, ((600,),)), rounding=rounding, hyper=((1.0, 0.0),))
        truth = run.weights[0].double()
        m = v = torch.zeros_like(truth)
        for t in range(1, 11):
            (g,) = tensors(BF16, ((600,),), seed=5 + t // 9)
            truth, m, v, _ = optimizer_step_ref(
                *(truth, g.double(), m, v, None),
                lr=1e-3, factor=1.0, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=EPS, step=t,
            )  # fmt: skip
            with forced(backend):
                run.step([g], t, lr=1e-3)
        errors[rounding] = (run.weights[0].double() - truth).abs()
        # Rounding once: half an ulp of the weight, and 10 times half an ulp of the compensation.
        if rounding == "kahan":
            assert (errors["kahan"] <= truth.abs() * (2**-8 + 10 * 2**-16) + 1e-6).all()
    assert errors["kahan"].mean() < 0.4 * errors["nearest"].mean()


@both
def test_a_bf16_second_moment_moves(backend: Backend) -> None:
    # From 1, beta2 = 0.999 changes v by a quarter of an ulp a step.
    run = Run([torch.zeros(4000)], state=BF16)
    assert run.arenas["v"] is not None
    run.arenas["v"].fill_(1.0)
    steps = 8
    with forced(backend):
        for t in range(1, steps + 1):
            run.step([torch.zeros(4000)], t)
    mean = run.views("v")[0].double().mean().item()
    assert mean == pytest.approx(0.999**steps, abs=4 * 2**-9 * math.sqrt(steps / 4000))
    assert mean < 0.996


@both
def test_the_average_alone_is_that_of_the_step(backend: Backend) -> None:
    run, apart = (run_of("bf16, 8-bit state", ((7,), (1100,))) for _ in range(2))
    average = apart.arenas["ema"]
    assert average is not None
    with forced(backend):
        for t in (1, 2):
            grads = tensors(BF16, ((7,), (1100,)), seed=t)
            run.step(grads, t)
            apart.step(grads, t, ema=None)
            ema_step_(apart.weights, average, torch.tensor([1 - 0.9]), torch.tensor([t]))
    assert all(torch.equal(x, y) for x, y in zip(run.weights, apart.weights, strict=True))
    assert torch.equal(run.flat("ema"), average)


# -- as bitsandbytes ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@both
def test_8_bit_state_is_that_of_bitsandbytes(backend: Backend) -> None:
    pytest.importorskip("bitsandbytes")
    theirs_step = pytest.importorskip(
        "bitsandbytes.backends.triton.kernels_optim"
    ).optimizer_update_8bit_blockwise_pytorch
    functional = pytest.importorskip("bitsandbytes.functional")

    run = Run(tensors(FP32, ((2048,),)), state=U8, hyper=((1.0, 0.1),))
    weight = run.weights[0].clone()
    maps = [functional.create_dynamic_map(signed) for signed in (True, False)]
    state = [torch.zeros(2048, dtype=U8) for _ in range(2)]
    absmax = [torch.zeros(8) for _ in range(2)]
    for t in range(1, 4):
        (g,) = tensors(FP32, ((2048,),), seed=t)
        theirs_step(
            *(weight, g, *state, *BETAS, 0.0, 0.0, EPS, t, 1e-2, *maps, *absmax, 0.1, 1.0, False),
            optimizer_name="adam",
        )
        with forced(backend):
            run.step([g], t)
        for name, codes, scales in zip("mv", state, absmax, strict=True):
            ours, ours_scales = run.arenas[name], run.arenas[f"{name}_absmax"]
            assert ours is not None and ours_scales is not None
            torch.testing.assert_close(ours_scales, scales, rtol=1e-5, atol=0)
            # The last bit of float32 decides between two codes now and then, and this multiplies.
            assert (ours.int() - codes.int()).abs().max() <= 1
            assert (ours != codes).double().mean() < 0.003 * t
        assert (run.weights[0] - weight).norm() < 1e-3 * (
            weight - tensors(FP32, ((2048,),))[0]
        ).norm()


# -- on a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_captured_step_keeps_its_addresses() -> None:
    def weights_after(captured: bool) -> list[Tensor]:
        weights = [w.cuda() for w in tensors(FP32, seed=0)]
        layout = Arena.of(weights)
        scalars = torch.tensor([1e-2, 1.0, 1.0, 0.1, 0.001, 0.1], device="cuda")
        m, v = (layout.zeros(FP32, "cuda") for _ in range(2))
        hyper, seed = (
            torch.ones(1, 2, device="cuda"),
            torch.ones(1, dtype=torch.int64, device="cuda"),
        )

        def step(grads: list[Tensor]) -> None:
            settings = ([0] * len(weights), hyper, scalars, *BETAS, EPS, "nearest", seed)
            optimizer_step_(weights, grads, m, v, None, None, None, None, *settings)

        static = [g.cuda() for g in tensors(FP32, seed=1)]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step([g.clone() for g in static])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                step(static)
        for t in (2, 3):
            step([g.cuda() for g in tensors(FP32, seed=10 + t)])  # addresses of its own
            torch._foreach_copy_(static, [g.cuda() for g in tensors(FP32, seed=t)])
            graph.replay() if captured else step(static)
        return [w.cpu() for w in weights]

    for ours, right in zip(weights_after(True), weights_after(False), strict=True):
        assert torch.equal(ours, right)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_is_the_pytorch_path(kind: str) -> None:
    on_cpu = run_of(kind)
    on_gpu = run_of(kind)
    on_gpu.weights = [w.cuda() for w in on_gpu.weights]
    on_gpu.arenas = {name: None if x is None else x.cuda() for name, x in on_gpu.arenas.items()}
    for t in (1, 2):
        grads = tensors(KINDS[kind]["dtype"], seed=t)
        with forced("torch"):
            on_cpu.step(grads, t)
        on_gpu.step([g.cuda() for g in grads], t)
    for x, y in zip(on_cpu.weights, on_gpu.weights, strict=True):
        eps = torch.finfo(x.dtype).eps
        far = (x.double() - y.cpu().double()).abs() > 2 * eps * x.double().abs() + 1e-6
        assert far.sum() <= 0.005 * x.numel()


# -- op and checks -----------------------------------------------------------------------------------


def test_opcheck_and_compile() -> None:
    run = run_of("bf16, 8-bit state", ((5,), (3, 2)))
    grads = tensors(BF16, ((5,), (3, 2)), seed=1)
    seed, scalars = torch.tensor([1]), torch.tensor([1e-2, 1.0, 1.0, 0.1, 0.001, 0.1])
    state = (run.weights, grads, *run.arenas.values(), run.groups, torch.ones(1, 2), scalars)
    torch.library.opcheck(
        torch.ops.fasttune.optimizer_step_.default, (*state, *BETAS, EPS, "stochastic", seed)
    )

    def step() -> None:
        run.step(grads, 1)

    eager = [x.clone() for x in run.everything()]
    torch.compile(step, fullgraph=True, backend="aot_eager")()
    compiled = [x.clone() for x in run.everything()]
    for x, old in zip(run.everything(), eager, strict=True):
        x.copy_(old)
    step()
    assert all(torch.equal(x, y) for x, y in zip(run.everything(), compiled, strict=True))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("fp32", {"grads": []}, "0 gradients for 5 weights"),
        ("fp32", {"grads": tensors(BF16)}, "gradient 0 is torch.bfloat16"),
        ("fp32", {"grads": tensors(FP32, SHAPES[::-1])}, "gradient 0"),
        ("fp32", {"m": torch.zeros(3)}, r"m is torch.float32 \(3,\)"),
        ("fp32", {"m": torch.zeros(3, dtype=torch.int8)}, "allowed are float32, bf16 and uint8"),
        ("fp32", {"m_absmax": torch.zeros(3)}, "m_absmax belongs to 8-bit state"),
        ("fp32", {"ema": torch.zeros(3)}, "ema is"),
        ("fp32", {"ema": torch.zeros(3, dtype=FP16)}, "allowed are float32 and bf16"),
        ("fp32", {"rounding": "up"}, "allowed are nearest, stochastic, kahan"),
        ("fp32", {"rounding": "kahan"}, "compensation belongs to"),
        ("bf16, bf16 state", {"compensation": torch.zeros(3)}, "compensation is"),
        ("fp16", {"rounding": "stochastic", "compensation": None}, "fp16 weights are rounded"),
        ("fp32", {"groups": [0]}, "1 groups for 5 weights"),
        ("fp32", {"groups": [1] * 5}, "hyper has 1 rows"),
        ("fp32", {"scalars": torch.zeros(5)}, "scalars is"),
        ("fp32", {"seed": torch.zeros(1)}, "seed is"),
        ("fp32", {"eps": 0.0}, "eps > 0"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    run = run_of(kind)
    before = [x.clone() for x in run.everything()]
    with pytest.raises(ValueError, match=message):
        run.step(changes.pop("grads", tensors(FP32, seed=1)), 1, **changes)
    assert all(torch.equal(x, y) for x, y in zip(run.everything(), before, strict=True))


def test_weights_with_gaps_are_refused() -> None:
    with pytest.raises(ValueError, match="weight 0"):
        run = Run([torch.zeros(4, 4)])
        run.weights = [torch.zeros(4, 8)[:, ::2]]
        run.step(tensors(FP32, ((4, 4),)), 1)
