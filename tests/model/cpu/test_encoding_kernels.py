"""Rows in int8 and float8: as near as their codes allow, as torch has e4m3, and nothing that is no number comes out as
one.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbaton.model.cpu import encoding_kernels as kernels
from kvbaton.model.cpu.numeric import as_array

NAMES = ["int8", "float8"]
DTYPES = [torch.float32, torch.bfloat16]
LARGEST = {"int8": 127.0, "float8": 448.0}


def encode(name: str, rows: torch.Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    codes, scales = np.empty(rows.shape, np.uint8), np.empty(len(rows), np.uint16)
    getattr(kernels, f"encode_{name}")(as_array(rows), codes, scales)
    return codes, scales


def decode(name: str, codes: Any, scales: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rows = torch.empty(codes.shape, dtype=dtype)
    getattr(kernels, f"decode_{name}")(codes, scales, as_array(rows))
    return rows


def there_and_back(name: str, rows: torch.Tensor) -> torch.Tensor:
    return decode(name, *encode(name, rows), rows.dtype).float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 999), width=st.integers(1, 70), exponent=st.floats(-20, 35), spread=st.floats(0, 4))
@settings(deadline=None, max_examples=60)
def test_what_comes_back_is_near(
    name: str, dtype: torch.dtype, seed: int, width: int, exponent: float, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, width, generator=generator) * 10 ** (
        exponent - spread * torch.rand(5, width, generator=generator)
    )
    rows = rows.to(dtype)
    largest = rows.float().abs().amax(1, keepdim=True)
    error = (there_and_back(name, rows) - rows.float()).abs()
    # Half a step; bfloat16 rounds the scale, and what comes back, by one part in 256 at the most.
    coarse = torch.maximum(rows.float().abs() / 16, largest / 448 * 2**-10)
    bound = coarse if name == "float8" else largest / 127 / 2
    assert bool((error <= bound * 1.01 + rows.float().abs() / 250).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none(name: str, dtype: torch.dtype, bad: float) -> None:
    rows = torch.ones(3, 40, dtype=dtype)
    rows[1, 17] = bad
    back = there_and_back(name, rows)
    assert bool(back[1].isnan().all())
    torch.testing.assert_close(back[[0, 2]], torch.ones(2, 40), rtol=0.005, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_next_to_nothing_are_zeros(name: str, dtype: torch.dtype) -> None:
    rows = torch.zeros(5, 9, dtype=dtype)
    rows[1], rows[2], rows[3], rows[4] = 1e-45, -1e-38, 2.0**-101, 2.0**-99
    back = there_and_back(name, rows)
    assert bool((back[:4] == 0).all())
    assert torch.allclose(back[4], rows[4].float(), rtol=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_and_the_sign(name: str) -> None:
    rows = torch.tensor([[3.0e38, -3.0e38, 0.0], [1.0, -1.0, -0.0]])
    back = there_and_back(name, rows)
    assert torch.allclose(back, rows, rtol=0.005)


def test_float8_is_torchs() -> None:
    rows = torch.randn(4096, 64, generator=torch.Generator().manual_seed(1))
    codes, scales = encode("float8", rows)
    scale = torch.from_numpy(scales).view(torch.bfloat16).float()[:, None]
    assert torch.equal(scale, (rows.abs().amax(1, keepdim=True) / 448).bfloat16().float())
    expected = (rows * (1 / scale)).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(torch.from_numpy(codes), expected)


def test_every_code_is_read_as_torch_reads_it() -> None:
    codes, ones = np.arange(256, dtype=np.uint8)[:, None], np.full(256, 0x3F80, np.uint16)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(decode("float8", codes, ones), expected, rtol=0, atol=0, equal_nan=True)
    expected = torch.from_numpy(codes).view(torch.int8).float()
    torch.testing.assert_close(decode("int8", codes, ones), expected, rtol=0, atol=0)


def test_bfloat16_is_rounded_to_nearest_and_widened_as_it_is() -> None:
    rows = torch.randn(64, 33, generator=torch.Generator().manual_seed(1))
    rows[0, :3] = torch.tensor([float("nan"), float("inf"), 1e-42])
    narrow, wide = torch.empty_like(rows, dtype=torch.bfloat16), torch.empty_like(rows)
    kernels.convert(as_array(rows), as_array(narrow))
    torch.testing.assert_close(narrow, rows.bfloat16(), rtol=0, atol=0, equal_nan=True)
    kernels.convert(as_array(narrow), as_array(wide))
    torch.testing.assert_close(wide, narrow.float(), rtol=0, atol=0, equal_nan=True)
