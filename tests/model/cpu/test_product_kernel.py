"""Products of packed bfloat16 matrices are torch's, for every make-up of tiles, panels and blocks of rows."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from kvbaton.model.cpu.numeric import as_array, has_bfloat16_unit
from kvbaton.model.cpu.product_kernel import PANEL, multiply, multiply_heads, pack

pytestmark = pytest.mark.skipif(not has_bfloat16_unit(), reason="this machine has no bfloat16 unit")

WIDTHS = [2, 34, 600]
"""Within a cut of few rows and of many, and over both; 34 leaves a rest of one pair."""
GUARD = 64


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def close(actual: torch.Tensor, expected: torch.Tensor, width: int) -> None:
    torch.testing.assert_close(actual.float(), expected, rtol=2**-8, atol=1e-5 * width)


@pytest.mark.parametrize("outputs", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_multiply(outputs: int, biased: bool, width: int) -> None:
    weight, bias = random(outputs, width, seed=1), random(outputs, seed=2).float()
    packed, given = pack(weight), bias.numpy() if biased else np.empty(0, np.float32)
    for rows in (0, *range(1, 18), 40, 252, 253, 300):
        inputs = random(rows, width, seed=rows)
        buffer = torch.full((rows * outputs + GUARD,), 7.0, dtype=torch.bfloat16)
        multiply(inputs.data_ptr(), rows, width, packed.data_ptr(), given, outputs, buffer.data_ptr())
        expected = functional.linear(inputs.float(), weight.float(), bias if biased else None)
        close(buffer[:-GUARD].view(rows, outputs), expected, width)
        assert (buffer[-GUARD:] == 7).all(), "written beyond the end"


def test_a_row_does_not_depend_on_how_many_there_are() -> None:
    weight, inputs = random(130, 600, seed=1), random(300, 600, seed=2)
    packed, outputs = pack(weight), torch.empty(300, 130, dtype=torch.bfloat16)
    alone = torch.empty(1, 130, dtype=torch.bfloat16)
    none = np.empty(0, np.float32)
    multiply(inputs.data_ptr(), 300, 600, packed.data_ptr(), none, 130, outputs.data_ptr())
    for row in (0, 5, 17, 251, 252, 299):
        multiply(inputs[row].data_ptr(), 1, 600, packed.data_ptr(), none, 130, alone.data_ptr())
        assert torch.equal(alone[0], outputs[row])


def test_nan_stays_in_its_row() -> None:
    packed, inputs = pack(random(65, 34, seed=1)), random(9, 34, seed=2)
    inputs[4, 3] = float("nan")
    result = torch.empty(9, 65, dtype=torch.bfloat16)
    multiply(inputs.data_ptr(), 9, 34, packed.data_ptr(), np.empty(0, np.float32), 65, result.data_ptr())
    assert result[4].isnan().all()
    assert result[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("rows", [1, 6, 7, 8, 13, 64, 300])
@pytest.mark.parametrize(("first_panel", "outputs"), [(0, 1), (0, 64), (0, 130), (1, 66), (2, 2)])
def test_multiply_heads(rows: int, first_panel: int, outputs: int) -> None:
    heads, width = 3, 34
    queries, keys = random(heads, rows, width, seed=1), random(heads, 130, width, seed=2)
    panels = torch.stack([pack(head) for head in keys])
    products = torch.full((heads, rows, outputs), float("nan"))
    multiply_heads(as_array(queries), rows, width, as_array(panels), first_panel, products.numpy())
    seen = keys[:, first_panel * PANEL :][:, :outputs]
    torch.testing.assert_close(products, torch.bmm(queries.float(), seen.float().transpose(1, 2)), rtol=1e-5, atol=1e-4)
