"""KV between a device's pool, pinned memory and other processes' pools, on streams beside what the engine computes.

Nothing here waits for the device: whoever must know that a copy is done asks for its `Pending`. What orders the copies
and the engine's kernels, which all run on the default stream, are events:

    read      after the kernels that wrote those layers (`mark_written`)
    landing   after the kernels that were queued when its transfer began (`landings_follow_engine`), since those of a
              cancelled request may still write to the blocks that were its own; and before those that are queued once
              its ticket is closed (`engine_follows_landings`), since the blocks are then somebody's
    landings  one after the other, from the wire and from other pools alike, on one stream
"""

import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from kvbaton.engine.geometry import KvGeometry
from kvbaton.engine.kv_store import Landing, Pending, Reading
from kvbaton.engine.pool_layout import PoolLayout, row_bytes
from kvbaton.engine.runs import slot_runs
from kvbaton.model.cuda.pinned import Event, Lease, PinnedRing
from kvbaton.model.cuda.strides import Part, SlotRun, execute, paired, plan

MOST_QUEUED = 64
"""Frames that wait for the device at the most, each in its pinned buffer; the loop waits with them for the first."""


class Stream(Protocol):
    """A queue of work on a device: `DeviceStream`, or a test's."""

    def running(self) -> AbstractContextManager[object]:
        """What torch is told within the block goes to this queue."""
        ...

    def record(self) -> Event:
        """An event after what was queued so far."""
        ...

    def follow(self, event: Event) -> None:
        """What is queued from now on comes after `event`."""
        ...

    def follow_engine(self) -> None:
        """What is queued from now on comes after what the engine has queued so far."""
        ...

    def lead_engine(self) -> None:
        """What the engine queues from now on comes after what was queued here so far."""
        ...

    def mark_engine(self) -> Event:
        """An event after what the engine has queued so far; called on its thread."""
        ...

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] of uint8 that the device reads and writes while the host does something else."""
        ...


class DeviceStream:
    """A CUDA stream that is not blocked by the default stream, and does not block it.

    torch hands streams out in turn, 32 of each priority. Among those of high priority is none that steps are captured
    on, where a copy would become part of a graph; and a copy is short, and waited for.
    """

    def __init__(self, device: torch.device) -> None:
        """On `device`."""
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def running(self) -> AbstractContextManager[object]:
        """See `Stream`."""
        return torch.cuda.stream(self._stream)

    def record(self) -> Event:
        """See `Stream`."""
        return _event_on(self._stream)

    def follow(self, event: Event) -> None:
        """See `Stream`."""
        self._stream.wait_event(cast(torch.cuda.Event, event))

    def follow_engine(self) -> None:
        """See `Stream`."""
        self._stream.wait_stream(torch.cuda.default_stream(self._device))

    def lead_engine(self) -> None:
        """See `Stream`."""
        torch.cuda.default_stream(self._device).wait_stream(self._stream)

    def mark_engine(self) -> Event:
        """See `Stream`."""
        return _event_on(torch.cuda.current_stream(self._device))

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """See `Stream`."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def _event_on(stream: torch.cuda.Stream) -> Event:
    # Blocking: a thread that waits sleeps, where it would spin on a core that others need.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


@dataclass(frozen=True, slots=True)
class DevicePool:
    """Rows of KV within one piece of memory."""

    memory: torch.Tensor
    """[num_bytes], uint8."""
    layout: PoolLayout
    geometry: KvGeometry

    def areas(self, layers: range) -> list[tuple[int, int]]:
        """Offset and bytes of a row, of K and V in turn, layer by layer."""
        widths = row_bytes(self.geometry)
        offsets = self.layout.k_offsets, self.layout.v_offsets
        return [(side[layer], width) for layer in layers for side, width in zip(offsets, widths[layer], strict=True)]

    def runs(self, blocks: Sequence[int], tokens: range) -> list[range]:
        """See `slot_runs`."""
        return slot_runs(blocks, tokens, self.layout.block_size)


@dataclass(frozen=True, slots=True)
class Passed:
    """A `Pending` that is done when the device has come past all of `events`."""

    events: Sequence[Event]

    def done(self) -> bool:
        """See `Pending`."""
        return all(event.query() for event in self.events)

    def wait(self) -> None:
        """See `Pending`."""
        for event in self.events:
            event.synchronize()


class KvCopies:
    """Copies of one pool's KV. `mark_written` is the engine's thread's, the rest the KV loop's."""

    def __init__(self, pool: DevicePool, reads: Stream, landings: Stream) -> None:
        """`reads` and `landings` are streams on the pool's device."""
        self._pool = pool
        self._reads, self._landings = reads, landings
        self._outgoing, self._incoming = PinnedRing(reads.pinned), PinnedRing(landings.pinned)
        self._written: list[Event | None] = [None] * pool.geometry.num_layers
        self._queued: deque[Event] = deque()

    @property
    def geometry(self) -> KvGeometry:
        """The pool's."""
        return self._pool.geometry

    @property
    def device(self) -> torch.device:
        """The pool's."""
        return self._pool.memory.device

    def mark_written(self, layer: int) -> None:
        """Engine's thread: what is queued so far writes KV of `layer` that will be read."""
        # A new one each time: who waits for this layer's tokens must not wait for the next chunk's.
        self._written[layer] = self._reads.mark_engine()

    def written(self, layers: range) -> Pending:
        """Whether the KV of `layers` that was marked so far is in the pool."""
        return Passed(self._events(layers))

    def read(self, layers: range, blocks: Sequence[int], tokens: range) -> memoryview:
        """The KV in pinned memory of its own; waits for it."""
        host = self._reads.pinned(self._size(layers, tokens))
        self._gather(layers, blocks, tokens, host).synchronize()
        return _bytes(host)

    def read_ahead(self, layers: range, blocks: Sequence[int], tokens: range) -> Reading:
        """Begin to read into one of the ring's buffers."""
        lease = self._outgoing.take(self._size(layers, tokens))
        event = self._gather(layers, blocks, tokens, lease.bytes)
        lease.used_until(event)
        return Reading([_bytes(lease.bytes)], Passed([event]), lease.release)

    def landing(self, layers: range, blocks: Sequence[int], tokens: range) -> Landing:
        """One of the ring's buffers; to finish it queues the copy from there."""
        lease = self._incoming.take(self._size(layers, tokens))
        return Landing([_bytes(lease.bytes)], lambda: self._scatter(layers, blocks, tokens, lease))

    def copy(
        self, source: DevicePool, layers: range, slots: Sequence[range], place: tuple[Sequence[int], range]
    ) -> None:
        """Queue the copy of `layers` from `slots` of another pool to `place`, our blocks and their tokens."""
        areas = zip(source.areas(layers), self._pool.areas(layers), strict=True)
        parts = [Part(theirs, ours, width) for (theirs, width), (ours, _) in areas]
        with self._landings.running():
            execute(plan(parts, paired(slots, self._pool.runs(*place))), source.memory, self._pool.memory)

    def probe(self, source: torch.Tensor) -> tuple[bytes, float]:
        """What lies in `source`, [bytes] of uint8, by way of our own device, and how long one copy took. Waits."""
        best = float("inf")
        with self._landings.running():
            for _ in range(2):
                self._landings.record().synchronize()
                begin = time.perf_counter()
                copy = self._pool.memory.new_empty(len(source)).copy_(source, non_blocking=True)
                self._landings.record().synchronize()
                best = min(best, time.perf_counter() - begin)
            return copy.cpu().numpy().tobytes(), best

    def write_probe(self, pattern: bytes) -> None:
        """Put a pattern into the pool's own probe area; it is there on return."""
        start = self._pool.layout.probe_offset
        with self._landings.running():
            self._pool.memory[start : start + len(pattern)].copy_(
                torch.frombuffer(bytearray(pattern), dtype=torch.uint8)
            )
        self._landings.record().synchronize()

    def landed(self) -> Pending:
        """Whether everything that was queued by `landing` and `copy` is in its blocks."""
        return Passed([self._landings.record()])

    def landings_follow_engine(self) -> None:
        """See `KvStore`."""
        self._landings.follow_engine()

    def engine_follows_landings(self) -> None:
        """See `KvStore`. Any thread."""
        self._landings.lead_engine()

    def _gather(self, layers: range, blocks: Sequence[int], tokens: range, host: torch.Tensor) -> Event:
        for event in self._events(layers):
            self._reads.follow(event)
        runs = _in_payload(self._pool.runs(blocks, tokens))
        parts = [Part(offset, at, width) for offset, at, width in self._payload(layers, tokens)]
        with self._reads.running():
            gathered = self._pool.memory.new_empty(len(host))
            execute(plan(parts, runs), self._pool.memory, gathered)
            host.copy_(gathered, non_blocking=True)
        return self._reads.record()

    def _scatter(self, layers: range, blocks: Sequence[int], tokens: range, lease: Lease) -> None:
        runs = [SlotRun(run.target, run.source, run.num_slots) for run in _in_payload(self._pool.runs(blocks, tokens))]
        parts = [Part(at, offset, width) for offset, at, width in self._payload(layers, tokens)]
        with self._landings.running():
            payload = lease.bytes.to(self._pool.memory.device, non_blocking=True)
            execute(plan(parts, runs), payload, self._pool.memory)
        event = self._landings.record()
        lease.used_until(event)
        lease.release()
        self._queued.append(event)
        if len(self._queued) > MOST_QUEUED:
            self._queued.popleft().synchronize()

    def _payload(self, layers: range, tokens: range) -> list[tuple[int, int, int]]:
        """Of each part of a payload: its offset in the pool, its offset in the payload, and bytes of a row."""
        position, result = 0, []
        for offset, width in self._pool.areas(layers):
            result.append((offset, position, width))
            position += width * len(tokens)
        return result

    def _size(self, layers: range, tokens: range) -> int:
        return self._pool.geometry.span_bytes(layers.start, layers.stop, len(tokens))

    def _events(self, layers: range) -> list[Event]:
        return [event for event in self._written[layers.start : layers.stop] if event is not None]


def _in_payload(runs: Sequence[range]) -> list[SlotRun]:
    """Runs of slots as they follow one another in each part of a payload."""
    return paired(runs, [range(sum(map(len, runs)))])


def _bytes(host: torch.Tensor) -> memoryview:
    return host.numpy().data
