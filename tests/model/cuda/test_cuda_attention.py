"""When attention on a GPU is the kernel's and when it is the reference's. That it is right, test_attention.py shows."""

import logging
from typing import Any

import pytest
import torch

from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.model.attention import LayerShape
from kvbaton.model.cuda.attention import CudaAttention
from kvbaton.model.cuda.kernel import Function, VarlenKernel, find_kernel
from kvbaton.model.ragged import RaggedBatch, Varlen
from kvbaton.model.store import TorchKvStore
from support.varlen import LenientKernel, varlen_attn

PLAIN = LayerShape(scaling=None, window=None, softcap=None, sinks=None)
CPU = torch.device("cpu")


def tensors_of(
    heads: int = 4, kv_heads: int = 2, dim: int = 16, v_dim: int = 16, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, heads, dim), (2, kv_heads, dim), (2, kv_heads, v_dim)
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return query, key, value


def attend(backend: CudaAttention, shape: LayerShape = PLAIN, block_size: int = 4, layer: int = 0) -> torch.Tensor:
    """Two sequences that decode their second token; their first KV is zero."""
    tensors = tensors_of(dtype=torch.float32)
    store = TorchKvStore(KvGeometry((LayerGeometry(2, 16, 16),) * 2, "float32"), 2, block_size, CPU)
    for blocks in (*store.keys, *store.values):
        blocks.zero_()
    store.put(layer, torch.tensor([1, block_size + 1]), tensors[1], tensors[2])
    tables, lengths = torch.tensor([[0], [1]]), torch.tensor([2, 2])
    batch = RaggedBatch(
        token_ids=torch.zeros(1, 2, dtype=torch.long),
        positions=torch.ones(1, 2, dtype=torch.long),
        slots=torch.tensor([1, block_size + 1]),
        sampled_rows=torch.tensor([0, 1]),
        pieces=[],
        num_decodes=2,
        decode_tables=tables,
        decode_lengths=lengths,
        longest_decode=2,
        make_varlen=lambda: Varlen.of(tables, lengths, torch.ones_like(lengths), (1, 2)),
    )
    return backend.attend(layer, tensors, shape, batch, store)


class Recorder:
    """Counts the calls of a kernel."""

    def __init__(self, function: Function = varlen_attn) -> None:
        self.calls: list[dict[str, Any]] = []
        self._function = function

    def __call__(self, *arguments: Any, num_splits: int | None = None, **more: Any) -> torch.Tensor:
        self.calls.append({"num_splits": num_splits, **more})
        output: torch.Tensor = self._function(*arguments, num_splits=num_splits, **more)
        return output


@pytest.mark.parametrize(
    ("tensors", "shape", "block_size", "reason"),
    [
        (tensors_of(), PLAIN, 512, None),
        (tensors_of(dim=256, v_dim=256, dtype=torch.float16), PLAIN, 256, None),
        (tensors_of(), LayerShape(None, None, 30.0, None), 256, "caps its scores"),
        (tensors_of(), LayerShape(None, None, None, torch.zeros(4)), 256, "sinks"),
        (tensors_of(v_dim=8), PLAIN, 256, "keys are 16 wide and its values 8"),
        (tensors_of(dim=20, v_dim=20), PLAIN, 256, "heads are 20 wide"),
        (tensors_of(dim=264, v_dim=264), PLAIN, 256, "heads are 264 wide"),
        (tensors_of(heads=3), PLAIN, 256, "3 heads do not divide among 2"),
        (tensors_of(dtype=torch.float32), PLAIN, 256, "dtype is torch.float32"),
        (tensors_of(), PLAIN, 16, "its blocks of 16 tokens"),
    ],
)
def test_what_the_kernel_refuses(tensors: Any, shape: LayerShape, block_size: int, reason: str | None) -> None:
    refusal = VarlenKernel(varlen_attn).refusal(tensors, shape, block_size)
    assert refusal is None if reason is None else refusal is not None and reason in refusal


@pytest.mark.parametrize("window", [None, 100])
def test_torch_takes_the_calls(window: int | None) -> None:
    """Names and types of the arguments, that is: on tensors without data."""
    kernel = find_kernel()
    assert kernel is not None
    with torch.device("meta"):
        query = torch.empty(5, 4, 16, dtype=torch.bfloat16)
        blocks = torch.empty(7, 256, 2, 16, dtype=torch.bfloat16), torch.empty(7, 256, 2, 16, dtype=torch.bfloat16)
        lengths, tables = torch.zeros(3, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long)
    for splits in kernel.splits():
        for longest in (1, 3):
            varlen = Varlen.of(tables, lengths, lengths, (longest, 500))
            output = kernel.attend(query, blocks, LayerShape(0.1, window, None, None), varlen, splits)
            assert output.shape == query.shape


def test_splits_are_left_to_the_kernel_only_where_it_joins_them() -> None:
    kernel = Recorder()
    backend = CudaAttention(LenientKernel(kernel))
    attend(backend)
    assert kernel.calls[-1]["num_splits"] is None
    assert kernel.calls[-1]["window_size"] == (-1, -1)
    attend(backend, LayerShape(None, 2, None, None), layer=1)
    assert kernel.calls[-1]["num_splits"] == 1
    assert kernel.calls[-1]["window_size"] == (1, 0)
    assert backend.may_be_captured


def test_an_older_kernel_that_never_splits_is_called_without_a_wish() -> None:
    wishes: list[bool] = []

    def older(*arguments: Any, num_splits: int | None = None, **more: Any) -> torch.Tensor:
        wishes.append(num_splits is not None)
        if num_splits is not None:
            raise RuntimeError("num_splits requires FA3")
        return varlen_attn(*arguments, num_splits=1, **more)

    backend = CudaAttention(LenientKernel(older))
    attend(backend)
    assert backend.may_be_captured
    assert not wishes[-1]


def test_a_kernel_that_computes_something_else_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    def wrong(*arguments: Any, **more: Any) -> torch.Tensor:
        return varlen_attn(*arguments, **more) * 1.1

    backend = CudaAttention(LenientKernel(wrong))
    with caplog.at_level(logging.WARNING):
        outputs = [attend(backend, layer=layer) for layer in (0, 1)]
    assert [record.getMessage() for record in caplog.records] == [
        "attention of layer 0 and those like it takes the slow path: torch's kernel computes something else"
    ]
    torch.testing.assert_close(outputs[0], attend(CudaAttention(LenientKernel(varlen_attn))))
    assert not backend.may_be_captured


@pytest.mark.parametrize("kernel", [None, VarlenKernel(varlen_attn)])
def test_without_a_kernel_that_can_the_reference_computes(
    kernel: VarlenKernel | None, caplog: pytest.LogCaptureFixture
) -> None:
    backend = CudaAttention(kernel)
    with caplog.at_level(logging.WARNING):
        output = attend(backend)
    torch.testing.assert_close(output, attend(CudaAttention(LenientKernel(varlen_attn))))
    reason = "has no attention over paged KV" if kernel is None else "dtype is torch.float32"
    assert reason in caplog.text
    assert not backend.may_be_captured
