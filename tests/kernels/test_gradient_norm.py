"""The 2-norm of all gradients."""

import pytest
import torch

from fasttune_kernels import arena_tables
from fasttune_kernels.dispatch import Backend, forced
from fasttune_kernels.gradient_norm import gradient_norm, gradient_norm_ref

BACKENDS: tuple[Backend, ...] = ("torch", "triton")


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3,), (0,), (257, 33), (5, 3, 3, 3), ())
    dtypes = (torch.bfloat16, torch.float32, torch.bfloat16, torch.float16, torch.float32)
    return [
        torch.randn(shape, generator=generator).to(dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_is_the_reference_on_every_run(backend: Backend | None) -> None:
    grads = [*gradients(), torch.ones(1).expand(7, 5), torch.randn(4, 6)[:, ::2]]
    right = gradient_norm_ref(grads).item()

    def norm() -> torch.Tensor:
        if backend is None:
            return gradient_norm(grads)
        with forced(backend):
            return gradient_norm(grads)

    assert norm().dtype == torch.float32 and norm().shape == ()
    assert norm().item() == pytest.approx(right, rel=1e-6)  # float32 sums of 8500 elements
    assert torch.equal(norm(), norm())
    grads[2][0, 0] = torch.inf
    assert not norm().isfinite()


def test_addresses_follow_the_tensors() -> None:
    with forced("triton"):
        for _ in range(2):
            grads = [torch.full((2000,), 2.0), torch.ones(3)]
            assert gradient_norm(grads).item() == pytest.approx(8003**0.5)
            other = [torch.full((2000,), 3.0), torch.ones(3)]
            assert gradient_norm(other).item() == pytest.approx(18003**0.5)
    tables = arena_tables.tables_of((other,), [0, 0], 4)
    assert tables.addresses == [g.data_ptr() for g in other]


def test_opcheck_and_checks() -> None:
    torch.library.opcheck(torch.ops.fasttune.gradient_norm.default, (gradients(),))
    with pytest.raises(ValueError, match="0 gradients"):
        gradient_norm([])
