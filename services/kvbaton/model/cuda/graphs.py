"""Decode steps as CUDA graphs: one launch in place of the thousand that a step's kernels would take.

A graph is fixed: batch size, addresses, everything but what its input buffer holds. So there is one for each of a few
sizes, captured when first needed, and a batch takes the next larger one. Rows beyond the batch are sequences of one
token in a block that belongs to nobody; what comes out of them is ignored.
"""

import bisect
import logging
from collections.abc import Callable

import torch

from kvbaton.engine.scheduler import Batch, Slice
from kvbaton.model.attention import PagedAttention
from kvbaton.model.forward import Forward
from kvbaton.model.ragged import RaggedBatch, Varlen
from kvbaton.model.store import TorchKvStore
from kvbaton.model.trial import first_line

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, *range(8, 257, 8))
"""Sequences of a graph. Batches beyond the last are computed kernel by kernel, and are large enough not to mind."""

Step = Callable[[], torch.Tensor]
"""Computes a step on static tensors and returns its logits; the same ones at each replay."""

_ROWS = 4
"""Numbers of a sequence besides its table: token id, position, slot, length."""


class DecodeGraphs:
    """Runs decode steps of one model by graphs."""

    def __init__(
        self,
        forward: Forward,
        attention: PagedAttention,
        store: TorchKvStore,
        max_model_len: int,
        capture: Callable[[Step], Step],
    ) -> None:
        """`store` has a scratch block; `capture` makes a step replayable."""
        self._forward, self._attention, self._store, self._capture = forward, attention, store, capture
        self._width = -(-max_model_len // store.block_size)
        self._inputs: dict[int, torch.Tensor] = {}
        self._steps: dict[int, Step] = {}
        self._failed = False

    def logits(self, batch: Batch) -> torch.Tensor | None:
        """Logits [sequences, vocab] of a batch of decodes, good until the next call.

        None for a batch that must be computed kernel by kernel.
        """
        num = len(batch.slices)
        if self._failed or num > SIZES[-1] or batch.slices[-1].is_prefill:
            return None
        size = SIZES[bisect.bisect_left(SIZES, num)]
        self._fill(size, batch.slices)
        # Who waits for KV layer by layer waits for a prompt's; a replay would call nobody.
        self._attention.on_layer = None
        if size not in self._steps and not self._make(size):
            return None
        return self._steps[size]()[:num]

    def _make(self, size: int) -> bool:
        try:
            self._steps[size] = self._capture(lambda: self._step(size))
        except Exception as error:
            # Models do what cannot be captured in as many ways as there are models.
            logger.warning("decode steps run without CUDA graphs: %s", first_line(error))
            self._failed = True
            self._steps.clear()
        return not self._failed

    def _fill(self, size: int, slices: list[Slice]) -> None:
        device, block_size = self._store.keys[0].device, self._store.block_size
        scratch, pinned = self._store.scratch_block, device.type == "cuda"
        host = torch.full((size * (_ROWS + self._width),), scratch, dtype=torch.int64, pin_memory=pinned)
        rows, tables = (part.numpy() for part in self._parts(host, size))
        rows[:] = [[0], [0], [scratch * block_size], [1]]
        for number, piece in enumerate(slices):
            blocks, start = piece.request.blocks, piece.start
            last = start // block_size
            rows[:, number] = piece.token_ids()[0], start, blocks[last] * block_size + start % block_size, start + 1
            tables[number, : last + 1] = blocks[: last + 1]
        if size not in self._inputs:
            self._inputs[size] = torch.empty_like(host, device=device)
        self._inputs[size].copy_(host, non_blocking=True)

    def _parts(self, numbers: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return numbers[: _ROWS * size].view(_ROWS, size), numbers[_ROWS * size :].view(size, self._width)

    def _step(self, size: int) -> torch.Tensor:
        inputs = self._inputs[size]
        (token_ids, positions, slots, lengths), tables = self._parts(inputs, size)
        longest = self._width * self._store.block_size
        rows = torch.arange(size, device=inputs.device)
        self._attention.batch = RaggedBatch(
            token_ids=token_ids[None],
            positions=positions[None],
            slots=slots,
            sampled_rows=rows,
            pieces=[],
            num_decodes=size,
            decode_tables=tables,
            decode_lengths=lengths,
            longest_decode=longest,
            make_varlen=lambda: Varlen.of(tables, lengths, torch.ones_like(lengths), (1, longest)),
        )
        return self._forward(token_ids[None], positions[None], rows)


class CudaCapture:
    """Captures steps on a device; their graphs share one pool of memory, since one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        """For the current stream of `device`."""
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """Run `step` once, as libraries set themselves up at first use, then capture it. Raises RuntimeError."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            current = torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                step()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # KV moves in another thread meanwhile, which is none of this capture's business.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = step()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay
