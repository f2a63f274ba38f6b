"""A step's work as tensors: all sequences are one row of tokens, decodes first, then the pieces of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kvbaton.engine.scheduler import Batch, Slice


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of one prompt's tokens within the row."""

    row: int
    """Where it begins in the row."""
    start: int
    """Position of its first token in the sequence."""
    num_tokens: int
    table: torch.Tensor
    """Blocks of the sequence, [blocks]."""


@dataclass(slots=True)
class RaggedBatch:
    """Tensors of one step; masks are made once and shared by all layers with the same window."""

    token_ids: torch.Tensor  # [1, tokens]
    positions: torch.Tensor  # [1, tokens]
    slots: torch.Tensor  # [tokens], block * block_size + offset
    sampled_rows: torch.Tensor  # [samples], rows whose logits are needed
    pieces: list[Piece]
    num_decodes: int
    decode_tables: torch.Tensor | None  # [decodes, blocks], padded with block 0
    decode_lengths: torch.Tensor | None  # [decodes], tokens to look at, the new one included
    longest_decode: int
    _masks: dict[tuple[int, int | None], torch.Tensor | None] = field(default_factory=dict)

    def prefill_mask(self, piece: Piece, window: int | None) -> torch.Tensor | None:
        """Which keys each query of `piece` may look at, [1, 1, q, k]; None where plain causal attention will do."""
        stop = piece.start + piece.num_tokens
        if window is not None and stop <= window:
            window = None
        if piece.start == 0 and window is None:
            return None
        key = (piece.row, window)
        if key not in self._masks:
            queries = torch.arange(piece.start, stop, device=self.slots.device)[:, None]
            keys = torch.arange(stop, device=self.slots.device)[None, :]
            mask = keys <= queries
            if window is not None:
                mask &= keys > queries - window
            self._masks[key] = mask[None, None]
        return self._masks[key]

    def decode_mask(self, window: int | None) -> torch.Tensor:
        """Which keys each decoding sequence may look at, [decodes, 1, 1, longest_decode]."""
        assert self.decode_lengths is not None
        key = (-1, window)
        mask = self._masks.get(key)
        if mask is None:
            keys = torch.arange(self.longest_decode, device=self.slots.device)[None, :]
            mask = keys < self.decode_lengths[:, None]
            if window is not None:
                mask &= keys >= self.decode_lengths[:, None] - window
            mask = mask[:, None, None, :]
            self._masks[key] = mask
        return mask


def build(batch: Batch, block_size: int, device: torch.device) -> RaggedBatch:
    """Lay `batch` out for the device. Decodes must come before prompts, as the scheduler orders them."""
    token_ids: list[int] = []
    positions: list[torch.Tensor] = []
    slots: list[torch.Tensor] = []
    sampled_rows: list[int] = []
    pieces: list[Piece] = []
    decodes = [piece for piece in batch.slices if not piece.is_prefill]
    assert batch.slices[: len(decodes)] == decodes, "decodes must come first"
    for piece in batch.slices:
        table = torch.tensor(piece.request.blocks)
        position = torch.arange(piece.start, piece.start + piece.num_tokens)
        positions.append(position)
        slots.append(table[position // block_size] * block_size + position % block_size)
        if piece.is_prefill:
            pieces.append(Piece(len(token_ids), piece.start, piece.num_tokens, table.to(device)))
        token_ids.extend(piece.token_ids())
        if piece.samples:
            sampled_rows.append(len(token_ids) - 1)
    tables, lengths = _decode_tables(decodes, block_size)
    return RaggedBatch(
        token_ids=torch.tensor(token_ids, device=device)[None],
        positions=torch.cat(positions).to(device)[None],
        slots=torch.cat(slots).to(device),
        sampled_rows=torch.tensor(sampled_rows, dtype=torch.long, device=device),
        pieces=pieces,
        num_decodes=len(decodes),
        decode_tables=None if tables is None else tables.to(device),
        decode_lengths=None if lengths is None else lengths.to(device),
        longest_decode=max((piece.start + 1 for piece in decodes), default=0),
    )


def _decode_tables(decodes: Sequence[Slice], block_size: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if not decodes:
        return None, None
    # Blocks reserved for tokens still to come are left out: gathering them would be work for nothing.
    used = [piece.request.blocks[: piece.start // block_size + 1] for piece in decodes]
    width = max(len(blocks) for blocks in used)
    tables = torch.tensor([blocks + [0] * (width - len(blocks)) for blocks in used])
    return tables, torch.tensor([piece.start + 1 for piece in decodes])
