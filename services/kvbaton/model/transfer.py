"""Numbers from Python to the device, without waiting for what the device is computing."""

from array import array
from collections.abc import Iterable, Sequence

import torch


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor [len(values)] of numbers."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


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
    return rows.to(device, non_blocking=True), tokens.to(device, non_blocking=True)
