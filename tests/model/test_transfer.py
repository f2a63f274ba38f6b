"""Numbers arrive as they were, whether in one copy or in several."""

import torch

from kvbaton.model.transfer import all_to_device, entries_to_device, to_device

CPU, META = torch.device("cpu"), torch.device("meta")


def test_many_tensors_keep_their_shapes_and_order() -> None:
    tensors = [torch.arange(6).view(2, 3), torch.empty(0, dtype=torch.int64), torch.arange(4)]
    assert all(map(torch.equal, all_to_device(tensors, CPU), tensors))
    # Not a CPU: packed into one, and taken apart again.
    packed = all_to_device(tensors, META)
    assert [tensor.shape for tensor in packed] == [tensor.shape for tensor in tensors]
    assert [tensor.storage_offset() for tensor in packed] == [0, 6, 6]


def test_entries_are_pairs_of_row_and_token() -> None:
    rows, tokens = entries_to_device([(3, [7, 8]), (5, []), (6, [9])], CPU)
    assert (rows.tolist(), tokens.tolist()) == ([3, 3, 6], [7, 8, 9])
    assert [len(part) for part in entries_to_device([], CPU)] == [0, 0]


def test_numbers_have_the_asked_dtype() -> None:
    assert to_device([0.5, 2], torch.float32, CPU).equal(torch.tensor([0.5, 2.0]))
