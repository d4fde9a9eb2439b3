"""The average of weights alone."""

import pytest
import torch
from torch import Tensor

from fasttune_kernels.arena import Arena
from fasttune_kernels.dispatch import Backend, forced
from fasttune_kernels.ema_step import ema_step_, ema_step_ref

BACKENDS: tuple[Backend, ...] = ("torch", "triton")
SHAPES = ((3,), (0,), (257, 5), (1024,))


def weights(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float32_average_is_the_reference(dtype: torch.dtype, backend: Backend) -> None:
    layout = Arena.of(weights(dtype))
    ema = layout.zeros(torch.float32, "cpu")
    truth = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for t in range(3):
        now = weights(dtype, seed=t)
        truth = [ema_step_ref(e, w.double(), 0.75) for e, w in zip(truth, now, strict=True)]
        with forced(backend):
            ema_step_(now, ema, torch.tensor([0.25]), torch.tensor([t]))
    for e, right in zip(layout.views(ema, now), truth, strict=True):
        torch.testing.assert_close(e.double(), right, rtol=0, atol=3 * 2.4e-7)
    assert not ema[3:1024].any()  # between two tensors


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bf16_average_moves_at_decay_0_9999(backend: Backend) -> None:
    # Updates of 1e-4 beside a unit in the last place of 2^-7.
    steps, size = (300, 4096) if backend == "torch" else (12, 16384)
    ema = torch.ones(size, dtype=torch.bfloat16)
    now, rest = [torch.full((size,), 2.0)], torch.tensor([1e-4])
    with forced(backend):
        for t in range(steps):
            ema_step_(now, ema, rest, torch.tensor([t]))
    right = 2 - 0.9999**steps
    # Each step moves a share p = 1e-4 / 2^-7 by 2^-7: deviation 2^-7 sqrt(p) a step and element.
    deviation = 2**-7 * (1e-4 * 128 * steps / size) ** 0.5
    assert ema.double().mean().item() == pytest.approx(right, abs=4 * deviation)
    assert 4 * deviation < 0.4 * (right - 1)  # what does not move would be seen
    assert torch.lerp(torch.ones((), dtype=torch.bfloat16), now[0][0].bfloat16(), 1e-4) == 1


def test_both_paths_take_the_same_random_bits() -> None:
    results = []
    for backend in BACKENDS:
        ema = Arena.of(weights(torch.bfloat16)).zeros(torch.bfloat16, "cpu")
        with forced(backend):
            for t in range(2):
                now = weights(torch.bfloat16, seed=t)
                ema_step_(now, ema, torch.tensor([0.1]), torch.tensor([t]))
        results.append(ema)
    assert (results[0] != results[1]).sum() <= 3  # the last bit of float32 decides
    assert results[0].any()


def test_opcheck_and_checks() -> None:
    now = weights(torch.bfloat16)
    ema = Arena.of(now).zeros(torch.bfloat16, "cpu")
    rest, seed = torch.tensor([0.1]), torch.tensor([1])
    torch.library.opcheck(torch.ops.fasttune.ema_step_.default, (now, ema, rest, seed))
    with pytest.raises(ValueError, match="ema is"):
        ema_step_(now, ema[:1024], rest, seed)
    with pytest.raises(ValueError, match="rest is"):
        ema_step_(now, ema, rest[0], seed)
    with pytest.raises(ValueError, match="weight 0 is torch.float64"):
        ema_step_([now[0].double()], ema, rest, seed)
    ema_step_([], ema[:0], rest, seed)
