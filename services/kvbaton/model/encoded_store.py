"""KV that is converted for its way (docs/protocol.md): a store's memory, as an encoding has it.

The conversion is the host's, whatever device the KV lies on: what goes over a wire passes through the host anyway, and
one core converts several times as fast as a wire carries.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from crc32c import crc32c

from kvbaton.engine.errors import UnavailableError
from kvbaton.engine.geometry import DTYPE_BYTES, ENCODING_BYTES, SCALE_BYTES, SCALED, KvGeometry
from kvbaton.engine.kv_store import ForeignPool, KvStore, Landing, Pending, Reading, SharedMemory
from kvbaton.engine.pool_layout import PoolLayout
from kvbaton.model.cpu import encoding_kernels as kernels

_ENCODE = {"int8": kernels.encode_int8, "float8": kernels.encode_float8}
_DECODE = {"int8": kernels.decode_int8, "float8": kernels.decode_float8}
# bfloat16 as the integers that it is stored as.
_ELEMENTS: dict[str, Any] = {"float32": np.float32, "bfloat16": np.uint16}

_ALIGNMENT = 64

Array = np.ndarray[Any, Any]


class EncodedStore:
    """Another store's memory, read and written in an encoding; implements `KvStore`."""

    def __init__(self, store: KvStore, encoding: str) -> None:
        """Compiles, or loads, the kernels that it will call. Raises ValueError for an unknown encoding."""
        self._store = store
        self._geometry = store.geometry.encoded(encoding)
        self._encoding = encoding
        self._elements = _ELEMENTS[store.geometry.dtype]
        self._codes: Any = np.uint8 if encoding in SCALED else np.uint16
        # Payloads are then views of the memory itself, where that has any.
        self._as_it_is = encoding == store.geometry.dtype
        rows, codes = np.empty((0, 1), self._elements), np.empty((0, 1), self._codes)
        for convert in (self._encode, self._decode):
            convert(rows, codes, np.empty(0, np.uint16))

    @property
    def geometry(self) -> KvGeometry:
        """That of the memory, with the sizes of what travels."""
        return self._geometry

    @property
    def shared(self) -> SharedMemory | None:
        """None: what others can map is not encoded."""
        return None

    def encoded(self, encoding: str) -> KvStore:
        """See `KvStore.encoded`: of the same memory."""
        return self._store.encoded(encoding)

    def read(self, layers: range, blocks: Sequence[int], tokens: range) -> Sequence[memoryview]:
        """See `KvStore.read`: encoded, in memory of its own."""
        if self._as_it_is:
            return self._store.read(layers, blocks, tokens)
        sections = self._staging(layers, len(tokens))
        self._encode_all(sections, self._store.read(layers, blocks, tokens))
        return _parts(sections)

    def checksum(self, layers: range, blocks: Sequence[int], tokens: range) -> int:
        """See `KvStore.checksum`. Encodes: whoever has the payload's parts had better take theirs."""
        if self._as_it_is:
            return self._store.checksum(layers, blocks, tokens)
        value = 0
        for part in self.read(layers, blocks, tokens):
            value = crc32c(part, value)
        return value

    def map_foreign(self, descriptor: int, layout: PoolLayout) -> ForeignPool:
        """Always raises UnavailableError: what others can map is not encoded."""
        raise UnavailableError(f"KV is encoded on its way ({self._encoding}), and never in memory")

    def read_ahead(self, layers: range, blocks: Sequence[int], tokens: range) -> Reading:
        """See `KvStore.read_ahead`. What a device has read is encoded when it is waited for."""
        reading = self._store.read_ahead(layers, blocks, tokens)
        if self._as_it_is:
            return reading
        sections = self._staging(layers, len(tokens))

        def encode() -> None:
            self._encode_all(sections, reading.parts)
            reading.release()

        pending = None if reading.pending is None else _Then(reading.pending, encode)
        if pending is None:
            encode()
        return Reading(_parts(sections), pending, _nothing)

    def written(self, layers: range) -> Pending | None:
        """See `KvStore.written`."""
        return self._store.written(layers)

    def landed(self) -> Pending | None:
        """See `KvStore.landed`."""
        return self._store.landed()

    def landings_follow_engine(self) -> None:
        """See `KvStore.landings_follow_engine`."""
        self._store.landings_follow_engine()

    def engine_follows_landings(self) -> None:
        """See `KvStore.engine_follows_landings`."""
        self._store.engine_follows_landings()

    def landing(self, layers: range, blocks: Sequence[int], tokens: range) -> Landing:
        """See `KvStore.landing`: a buffer for the payload, which is decoded into its blocks to finish."""
        if self._as_it_is:
            return self._store.landing(layers, blocks, tokens)
        sections = self._staging(layers, len(tokens))
        landing = self._store.landing(layers, blocks, tokens)

        def finish() -> None:
            for (codes, scales), row, rows in self._runs(sections, landing.parts):
                self._decode(rows, codes[row : row + len(rows)], scales[row : row + len(rows)])
            landing.finish()

        return Landing(_parts(sections), finish)

    def _encode_all(self, sections: Sequence[tuple[Array, Array]], kept: Sequence[memoryview]) -> None:
        for (codes, scales), row, rows in self._runs(sections, kept):
            self._encode(rows, codes[row : row + len(rows)], scales[row : row + len(rows)])

    def _encode(self, rows: Array, codes: Array, scales: Array) -> None:
        if self._encoding in SCALED:
            _ENCODE[self._encoding](rows, codes, scales)
        else:
            kernels.convert(rows, codes)

    def _decode(self, rows: Array, codes: Array, scales: Array) -> None:
        if self._encoding in SCALED:
            _DECODE[self._encoding](codes, scales, rows)
        else:
            kernels.convert(codes, rows)

    def _staging(self, layers: range, num_tokens: int) -> list[tuple[Array, Array]]:
        """Codes [rows, dim] and scales [rows] of K and of V, layer by layer; a row is a token's head."""
        shapes = [
            (num_tokens * layer.num_kv_heads, dim)
            for layer in (self._geometry.layers[index] for index in layers)
            for dim in (layer.k_head_dim, layer.v_head_dim)
        ]
        code_bytes = ENCODING_BYTES[self._encoding]
        scale_bytes = SCALE_BYTES if self._encoding in SCALED else 0
        sizes = [size for rows, dim in shapes for size in (rows * dim * code_bytes, rows * scale_bytes)]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + size + -size % _ALIGNMENT)
        memory = np.empty(starts[-1], np.uint8)
        pieces = iter([memory[start : start + size] for (start, _), size in zip(pairwise(starts), sizes, strict=True)])
        return [(next(pieces).view(self._codes).reshape(shape), next(pieces).view(np.uint16)) for shape in shapes]

    def _runs(
        self, sections: Sequence[tuple[Array, Array]], kept: Sequence[memoryview]
    ) -> Iterator[tuple[tuple[Array, Array], int, Array]]:
        """Each section with the row at which a piece of `kept`, which are its elements in memory, begins; and that.

        `kept` are a payload as it is; none of them ends within a row.
        """
        parts = iter(kept)
        part = memoryview(b"")
        for section in sections:
            num_rows, dim = section[0].shape
            width = dim * DTYPE_BYTES[self._geometry.dtype]
            row = 0
            while row < num_rows:
                part = part or next(parts)
                taken = min(len(part), (num_rows - row) * width)
                yield section, row, np.frombuffer(part[:taken], self._elements).reshape(-1, dim)
                row, part = row + taken // width, part[taken:]


class _Then:
    """A `Pending` with something left to do once a device is done; one thread at a time asks."""

    def __init__(self, pending: Pending, last: Callable[[], None]) -> None:
        self._pending = pending
        self._last: Callable[[], None] | None = last

    def done(self) -> bool:
        """See `Pending`."""
        if not self._pending.done():
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """See `Pending`."""
        self._pending.wait()
        if self._last is not None:
            self._last()
            self._last = None


def _nothing() -> None:
    """What is left to do with memory that nobody else waits for."""


def _parts(sections: Sequence[tuple[Array, Array]]) -> list[memoryview]:
    return [part.reshape(-1).view(np.uint8).data for section in sections for part in section if part.size]
