"""A step's work as tensors: all sequences are one row of tokens, decodes first, then the pieces of prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch.nn import functional

from kvbaton.engine.scheduler import Batch, Slice
from kvbaton.model.transfer import all_to_device


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


@dataclass(frozen=True, slots=True)
class Varlen:
    """A step's sequences, decodes and pieces alike, as kernels for ragged queries over paged KV take them: int32."""

    tables: torch.Tensor  # [sequences, blocks], padded with any block
    lengths: torch.Tensor  # [sequences], tokens to look at, those of the step included
    query_starts: torch.Tensor  # [sequences + 1], where each one's rows begin, and the number of rows
    key_starts: torch.Tensor  # [sequences + 1], sums of `lengths`
    max_query: int
    max_length: int

    @classmethod
    def of(
        cls, tables: torch.Tensor, lengths: torch.Tensor, queries: torch.Tensor, longest: tuple[int, int]
    ) -> "Varlen":
        """From int64 `tables`, `lengths` and `queries`, each sequence's rows; `longest`: of queries and of lengths."""
        starts = [functional.pad(numbers.cumsum(0), (1, 0)).int() for numbers in (queries, lengths)]
        return cls(tables.int().contiguous(), lengths.int(), starts[0], starts[1], *longest)


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
    make_varlen: Callable[[], Varlen]
    _varlen: Varlen | None = None
    _masks: dict[tuple[int, int | None], torch.Tensor | None] = field(default_factory=dict)

    def varlen(self) -> Varlen:
        """All sequences at once; made when first asked for."""
        if self._varlen is None:
            self._varlen = self.make_varlen()
        return self._varlen

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
            pieces.append(Piece(len(token_ids), piece.start, piece.num_tokens, table))
        token_ids.extend(piece.token_ids())
        if piece.samples:
            sampled_rows.append(len(token_ids) - 1)
    rows = torch.tensor(token_ids), torch.cat(positions), torch.cat(slots)
    decode_parts = _decode_tables(decodes, block_size) if decodes else ()
    host = [*rows, torch.tensor(sampled_rows, dtype=torch.long), *decode_parts, *(piece.table for piece in pieces)]
    moved = all_to_device(host, device)
    tables = moved[len(host) - len(pieces) :]
    return RaggedBatch(
        token_ids=moved[0][None],
        positions=moved[1][None],
        slots=moved[2],
        sampled_rows=moved[3],
        pieces=[replace(piece, table=table) for piece, table in zip(pieces, tables, strict=True)],
        num_decodes=len(decodes),
        decode_tables=moved[4] if decodes else None,
        decode_lengths=moved[5] if decodes else None,
        longest_decode=max((piece.start + 1 for piece in decodes), default=0),
        make_varlen=partial(_varlen, batch.slices, block_size, device),
    )


def _decode_tables(decodes: Sequence[Slice], block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _tables(decodes, block_size), torch.tensor([piece.start + 1 for piece in decodes])


def _tables(slices: Sequence[Slice], block_size: int) -> torch.Tensor:
    # Blocks reserved for tokens still to come are left out: gathering them would be work for nothing.
    used = [piece.request.blocks[: (piece.start + piece.num_tokens - 1) // block_size + 1] for piece in slices]
    width = max(len(blocks) for blocks in used)
    return torch.tensor([blocks + [0] * (width - len(blocks)) for blocks in used])


def _varlen(slices: Sequence[Slice], block_size: int, device: torch.device) -> Varlen:
    queries = [piece.num_tokens for piece in slices]
    lengths = [piece.start + piece.num_tokens for piece in slices]
    host = [_tables(slices, block_size), torch.tensor(lengths), torch.tensor(queries)]
    tables, on_device, rows = all_to_device(host, device)
    return Varlen.of(tables, on_device, rows, (max(queries), max(lengths)))
