"""Attention on a GPU: all sequences of a step in one call of a kernel, where it can; by the reference elsewhere.

Whether it can is decided once for each shape of layer: by what is known of the kernel, and then by trying it out
against the reference on random input, since what versions of it get right differs.
"""

import logging

import torch
from torch.nn import functional

from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.model import reference
from kvbaton.model.attention import LayerShape, Tensors
from kvbaton.model.cuda.kernel import Splits, VarlenKernel, find_kernel
from kvbaton.model.ragged import RaggedBatch, Varlen
from kvbaton.model.reference import ReferenceAttention
from kvbaton.model.store import DTYPES, TorchKvStore

logger = logging.getLogger(__name__)

_TOLERANCE = 0.02
"""Of the norm of the difference to the norm; both round to bfloat16 in their own ways."""

_TRIAL_LENGTHS = (2.9, 1.2, 0.1)
"""In blocks: long enough to be split, and of unequal numbers of blocks."""

_TRIAL_WIDTH = 32
"""Blocks of a table, and of the longest sequence there may be: in a graph both are as large as they ever can be."""

_TRIAL_QUERIES = ((1, 1, 1), (1, 70, 3))
"""Of a step that decodes, and of one that computes prompts beside it."""


class CudaAttention:
    """An `AttentionBackend` for CUDA devices."""

    def __init__(self, kernel: VarlenKernel | None) -> None:
        """`kernel` is what `find_kernel` found."""
        self._kernel = kernel
        self._reference = ReferenceAttention()
        self._layers: dict[int, Splits | None] = {}
        self._decided: dict[tuple[object, ...], Splits | None] = {}

    @property
    def may_be_captured(self) -> bool:
        """Whether a step's cost goes by its sequences' lengths, and not by the width of their tables.

        That is so when the kernel computes every layer, which shows in the first step.
        """
        return bool(self._layers) and None not in self._layers.values()

    def attend(
        self, layer: int, tensors: Tensors, shape: LayerShape, batch: RaggedBatch, store: TorchKvStore
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        if layer not in self._layers:
            self._layers[layer] = self._decide(layer, tensors, shape, store)
        splits = self._layers[layer]
        if splits is None or self._kernel is None:
            return self._reference.attend(layer, tensors, shape, batch, store)
        blocks = store.keys[layer], store.values[layer]
        return self._kernel.attend(tensors[0], blocks, shape, batch.varlen(), splits)

    def attend_causal(self, tensors: Tensors, shape: LayerShape) -> torch.Tensor:
        """See `AttentionBackend.attend_causal`."""
        return self._reference.attend_causal(tensors, shape)

    def _decide(self, layer: int, tensors: Tensors, shape: LayerShape, store: TorchKvStore) -> Splits | None:
        """How to call the kernel for a layer; None for the reference. Says once why, for all layers alike."""
        sizes = *(tensor.shape[1:] for tensor in tensors), tensors[0].dtype
        key = *sizes, shape.scaling, shape.window, shape.softcap, shape.sinks is None, store.block_size
        if key not in self._decided:
            splits, reason = self._choose(tensors, shape, store)
            self._decided[key] = splits
            if reason is not None:
                logger.warning("attention of layer %d and those like it takes the slow path: %s", layer, reason)
        return self._decided[key]

    def _choose(self, tensors: Tensors, shape: LayerShape, store: TorchKvStore) -> tuple[Splits | None, str | None]:
        if self._kernel is None:
            return None, f"torch {torch.__version__} has no attention over paged KV"
        reason = self._kernel.refusal(tensors, shape, store.block_size)
        if reason is not None:
            return None, reason
        for splits in self._kernel.splits():
            try:
                if _agrees(self._kernel, splits, tensors, shape, store.block_size):
                    return splits, None
                reason = "torch's kernel computes something else"
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
        return None, reason


def _agrees(kernel: VarlenKernel, splits: Splits, tensors: Tensors, shape: LayerShape, block_size: int) -> bool:
    """Whether kernel and reference give the same for sequences that lie scattered in blocks full of NaN."""
    lengths = [max(1, int(length * block_size)) for length in _TRIAL_LENGTHS]
    generator = torch.Generator(tensors[0].device).manual_seed(0)
    store, tables = _trial_store(tensors, lengths, block_size, generator)
    for queries in _TRIAL_QUERIES:
        rows = [min(pair) for pair in zip(queries, lengths, strict=True)]
        query = _random((sum(rows), *tensors[0].shape[1:]), generator).to(tensors[0].dtype)
        numbers = torch.tensor([lengths, rows], device=tables.device)
        varlen = Varlen.of(tables, numbers[0], numbers[1], (max(rows), _TRIAL_WIDTH * block_size))
        actual = kernel.attend(query, (store.keys[0], store.values[0]), shape, varlen, splits)
        pieces = zip(torch.split(query, rows), tables, lengths, strict=True)
        expected = torch.cat([_expected(part, table, length, shape, store) for part, table, length in pieces])
        difference = (actual.float() - expected.float()).norm() / expected.float().norm()
        if not bool(difference <= _TOLERANCE):
            return False
    return True


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _trial_store(
    tensors: Tensors, lengths: list[int], block_size: int, generator: torch.Generator
) -> tuple[TorchKvStore, torch.Tensor]:
    """Random KV of sequences of `lengths`, and their tables [sequences, blocks]; all else is NaN."""
    _, key, value = tensors
    dtype = next(name for name, dtype in DTYPES.items() if dtype is key.dtype)
    geometry = KvGeometry((LayerGeometry(key.shape[1], key.shape[2], value.shape[2]),), dtype)
    width = -(-max(lengths) // block_size)
    unused = len(lengths) * width
    store = TorchKvStore(geometry, unused + 1, block_size, key.device)
    tables = torch.arange(unused, device=key.device).flip(0).view(width, -1).t()
    tables = functional.pad(tables, (0, _TRIAL_WIDTH - width), value=unused)
    at = torch.arange(max(lengths), device=key.device)
    for blocks in (store.keys[0], store.values[0]):
        blocks.fill_(float("nan"))
        for table, length in zip(tables, lengths, strict=True):
            slots = table[at[:length] // block_size] * block_size + at[:length] % block_size
            blocks.flatten(0, 1)[slots] = _random((length, *blocks.shape[2:]), generator).to(blocks.dtype)
    return store, tables


def _expected(
    query: torch.Tensor, table: torch.Tensor, length: int, shape: LayerShape, store: TorchKvStore
) -> torch.Tensor:
    keys, values = (blocks[0][table].flatten(0, 1)[:length].transpose(0, 1) for blocks in (store.keys, store.values))
    at = torch.arange(length, device=query.device)
    last = at[-len(query) :, None]
    mask = at <= last
    if shape.window is not None:
        mask &= at > last - shape.window
    result = reference.attend(query.transpose(0, 1)[None], keys[None], values[None], mask[None, None], shape)
    return result[0].transpose(0, 1)


def cuda_attention() -> CudaAttention:
    """The backend with what this torch has."""
    return CudaAttention(find_kernel())
