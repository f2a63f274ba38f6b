"""KV between a device and pinned memory, on a stream of its own, beside what the engine computes."""

from collections.abc import Sequence

import torch

from kvbaton.model.transfer import all_to_device


class KvCopies:
    """Copies of one store's KV. The engine's kernels run on the device's default stream.

    Pinned buffers come from torch's caching allocator: one is in use until the bytes in it have been sent.
    """

    def __init__(self, device: torch.device, num_layers: int) -> None:
        """For a store of `num_layers` layers on `device`."""
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._written = [torch.cuda.Event() for _ in range(num_layers)]  # type: ignore[no-untyped-call]

    def mark_written(self, layer: int) -> None:
        """Engine's thread: what is queued so far writes KV of `layer` that will be read."""
        self._written[layer].record(torch.cuda.current_stream(self._device))

    def read(self, layers: range, rows: Sequence[torch.Tensor], slots: torch.Tensor) -> torch.Tensor:
        """`gather` in pinned memory, once the KV of `layers` has been written; waits for it."""
        for layer in layers:
            self._stream.wait_event(self._written[layer])
        with torch.cuda.stream(self._stream):
            (index,) = all_to_device([slots], self._device)
            gathered = gather(rows, index)
            host = torch.empty(gathered.shape, dtype=gathered.dtype, pin_memory=True)
            host.copy_(gathered, non_blocking=True)
        self._stream.synchronize()
        return host

    def staging(self, rows: Sequence[torch.Tensor], slots: torch.Tensor) -> torch.Tensor:
        """Pinned memory for what `write` will scatter: [all elements]."""
        size = len(slots) * sum(part.shape[1] for part in rows)
        return torch.empty(size, dtype=rows[0].dtype, pin_memory=True)

    def write(self, rows: Sequence[torch.Tensor], slots: torch.Tensor, pinned: torch.Tensor) -> None:
        """`scatter` from pinned memory. When it returns, kernels queued from then on see it."""
        # A cancelled request's last chunk may still be writing to the blocks that were its own.
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._stream):
            (index,) = all_to_device([slots], self._device)
            scatter(rows, index, pinned.to(self._device, non_blocking=True))
        self._stream.synchronize()


def gather(rows: Sequence[torch.Tensor], slots: torch.Tensor) -> torch.Tensor:
    """What lies at `slots` of each of `rows` [slots, elements], one after the other: [all elements]."""
    return torch.cat([part.index_select(0, slots).flatten() for part in rows])


def scatter(rows: Sequence[torch.Tensor], slots: torch.Tensor, payload: torch.Tensor) -> None:
    """The inverse of `gather`."""
    parts = torch.split(payload, [len(slots) * part.shape[1] for part in rows])
    for part, incoming in zip(rows, parts, strict=True):
        part.index_copy_(0, slots, incoming.view(len(slots), -1))
