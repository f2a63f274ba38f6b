"""Numbers from the host to the device, by way of pinned memory, without waiting for what the device is computing.

Pinned buffers come from torch's caching allocator, which hands one out again only when the copy from it is done.
"""

from array import array
from collections.abc import Iterable, Sequence

import torch


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor [len(values)] of numbers."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def entries_to_device(
    lists: Sequence[tuple[int, Iterable[int]]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index tensors (rows, token ids), int64, of all pairs of a row's number and one of its token ids."""
    flat = array("q")
    lengths: list[int] = []
    for _, token_ids in lists:
        before = len(flat)
        flat.extend(token_ids)
        lengths.append(len(flat) - before)
    numbers = torch.tensor([row for row, _ in lists], dtype=torch.int64)
    rows = numbers.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    tokens = torch.frombuffer(flat, dtype=torch.int64) if flat else torch.empty(0, dtype=torch.int64)
    rows, tokens = all_to_device([rows, tokens], device)
    return rows, tokens


def all_to_device(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """The same tensors, int64 each, on the device, in one copy."""
    if device.type == "cpu":
        return list(tensors)
    flat = torch.empty(sum(map(torch.numel, tensors)), dtype=torch.int64, pin_memory=device.type == "cuda")
    torch.cat([tensor.flatten() for tensor in tensors], out=flat)
    return _split(flat.to(device, non_blocking=True), tensors)


def _split(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    parts = torch.split(flat, [tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
