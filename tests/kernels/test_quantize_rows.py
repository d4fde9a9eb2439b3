"""Rows in int8: codes and scales against the definition, and what that costs a signal."""

import pytest
import torch
from torch import Tensor

from fasttune_kernels.dispatch import Backend, forced
from fasttune_kernels.quantize_rows import (
    _dequantize_rows,
    _quantize_rows,
    dequantize_rows,
    quantize_rows,
    quantize_rows_ref,
)

BOTH: tuple[Backend, ...] = ("torch", "triton")


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(2, 3, 5), (1, 7, 3, 8), (2, 2, 4, 3, 2), (1, 3, 4099), (8, 1, 1)]
)
def test_codes_are_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype, backend: Backend
) -> None:
    x = drawn(*shape, dtype=dtype)
    expected, expected_scales = quantize_rows_ref(x)
    with forced(backend):
        codes, scales = quantize_rows(x)
        back = dequantize_rows(codes, scales, dtype)
    assert codes.is_contiguous() and codes.dtype == torch.int8 and scales.dtype == torch.float32
    # 127 / amax and 1 / (amax / 127) round differently: a tie may go to the neighbour
    off = (codes.int() - expected.int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.01
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    # half a step, and the rounding of the result to its dtype
    step = scales.view(*scales.shape, *(1,) * (x.ndim - 2))
    bound = step * 0.5001 + x.float().abs() * torch.finfo(dtype).eps
    assert ((back.float() - x.float()).abs() <= bound).all()


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("width", [8, 5000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, in the interpreter
def test_what_is_not_finite_stays_so(bad: float, width: int, backend: Backend) -> None:
    x = drawn(1, 3, width)
    x[0, 1, 3] = bad
    with forced(backend):
        codes, scales = quantize_rows(x)
        back = dequantize_rows(codes, scales, torch.float32)
    assert back.isfinite().all(-1).tolist() == [[True, False, True]]
    assert not back[0, 1, 3].isfinite()


@pytest.mark.parametrize("backend", BOTH)
def test_strided_zero_and_empty_rows(backend: Backend) -> None:
    wide = drawn(2, 6, 24)
    with forced(backend):
        for x in (wide[..., 8:16], wide.transpose(1, 2), wide[:1].expand(3, 6, 24), wide[:, ::2]):
            assert all(map(torch.equal, quantize_rows(x), quantize_rows(x.contiguous())))
        codes, scales = quantize_rows(torch.zeros(1, 2, 9))
        assert not codes.any() and not scales.any()
        assert not dequantize_rows(codes, scales, torch.float16).any()
        codes, scales = quantize_rows(torch.empty(0, 4, 8))
        assert codes.shape == (0, 4, 8) and scales.shape == (0, 4)
        assert dequantize_rows(codes, scales, torch.bfloat16).shape == (0, 4, 8)


def test_a_normal_row_keeps_41_db() -> None:
    x = drawn(1, 8, 3072)
    error = dequantize_rows(*quantize_rows(x), torch.float32) - x
    sqnr = 20 * torch.log10(x.norm(dim=-1) / error.norm(dim=-1))
    # uniform error of a step amax / 127 with amax near 3.7: 20 log10(sqrt(12) * 127 / 3.7) = 41.5
    assert 39.5 < sqnr.min() and sqnr.max() < 43


@pytest.mark.parametrize("backend", BOTH)
def test_ops_are_ops(backend: Backend) -> None:
    x = drawn(2, 3, 8)
    with forced(backend):
        torch.library.opcheck(_quantize_rows, (x,))
        torch.library.opcheck(_dequantize_rows, (*quantize_rows(x), torch.float16))


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"\(4, 5\)"):
        quantize_rows(drawn(4, 5))
    with pytest.raises(ValueError, match="int8"):
        dequantize_rows(drawn(2, 3, 4), drawn(2, 3), torch.float32)
