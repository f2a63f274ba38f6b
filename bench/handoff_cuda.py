"""KV between two processes' pools on a GPU: CUDA IPC beside a copy within one process, and pinned staging for frames.

    python bench/handoff_cuda.py --mib 1 8 64 512 --rounds 5

The pools have the shape of the 0.6b model of `random_models`, and blocks of a GPU's size. One process exports its
pool; the other, on the same GPU, copies from it. Beside that, in one process: the same blocks copied by a call for each
run of each tensor ("device to device"), as many bytes in one piece ("one piece"), frames from the pool to the host and
from there to the pool, the next one on its way while one is there ("staging"), and as many bytes without a pool,
between pinned and device memory ("pinned memory"). Every copy is checked to the byte before it is timed. Prints a table
and writes build/bench/handoff_cuda.json.
"""

import argparse
import json
import multiprocessing
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.engine.kv_store import Pending, Reading
from kvbaton.engine.runs import slot_runs
from kvbaton.handoff.frames import FramePlanner, Rectangle
from kvbaton.handoff.sharing import ForeignPool
from kvbaton.model.cuda.kernel import PAGE_MULTIPLE
from kvbaton.model.store import TorchKvStore
from kvbaton.v1 import kv_transfer_pb2 as pb
from kvbaton.worker.cuda_sharing import cuda_pool_opener, cuda_shared_pool

GEOMETRY = KvGeometry((LayerGeometry(8, 128, 128),) * 28, "bfloat16")
PATIENCE = 120.0
"""Seconds for another process to begin, or to answer."""
SLACK = 1.04
"""Pools are so much larger than what is moved, so that shuffled blocks leave gaps."""


@dataclass(frozen=True, slots=True)
class Row:
    """One number, with what it is the median of."""

    case: str
    system: str
    metric: str
    value: float
    unit: str
    samples: list[float]


@dataclass(frozen=True, slots=True)
class Load:
    """What is moved: tokens from 0 on, from some blocks to others."""

    case: str
    tokens: range
    source: list[int]
    target: list[int]

    @property
    def num_bytes(self) -> int:
        """Of the KV."""
        return len(self.tokens) * GEOMETRY.token_bytes

    def frames(self) -> list[Rectangle]:
        """As the hand-off cuts it when all of it is there."""
        planner = FramePlanner(GEOMETRY, self.tokens.start, self.tokens.stop)
        for layer in range(GEOMETRY.num_layers):
            planner.advance(layer, self.tokens.stop)
        frames: list[Rectangle] = []
        while (rectangle := planner.next()) is not None:
            frames.append(rectangle)
        return frames


def loads(mib: Sequence[int], num_blocks: int) -> Iterator[Load]:
    """Each size with its blocks in order, and shuffled."""
    for size in mib:
        num_tokens = max(1, (size << 20) // GEOMETRY.token_bytes)
        needed = -(-num_tokens // PAGE_MULTIPLE)
        for shuffled in (False, True):
            source, target = list(range(num_blocks)), list(range(num_blocks))
            if shuffled:
                random.Random(1).shuffle(source)
                random.Random(2).shuffle(target)
            case = f"{size} MiB, {'shuffled' if shuffled else 'in order'}"
            yield Load(case, range(num_tokens), source[:needed], target[:needed])


def make_store(num_blocks: int, seed: int | None) -> TorchKvStore:
    """A pool that can be exported, filled with random bytes, or with zeros."""
    store = TorchKvStore(GEOMETRY, num_blocks, PAGE_MULTIPLE, torch.device("cuda"), shared=True)
    if seed is None:
        store.memory.tensor.zero_()
    else:
        store.memory.tensor.random_(0, 256, generator=torch.Generator("cuda").manual_seed(seed))
    torch.cuda.synchronize()
    return store


def export(connection: Connection, num_blocks: int) -> None:
    """The other process: it has a pool and does nothing."""
    pool = cuda_shared_pool(make_store(num_blocks, seed=1))
    assert pool is not None, "this GPU's memory cannot be exported"
    hello = pb.LinkHello(incarnation="exporter")
    pool.describe(hello)
    connection.send(hello.SerializeToString())
    connection.recv()


class Device:
    """Two pools of this process, of the same contents as the other process's, and that one, mapped."""

    def __init__(self, source: TorchKvStore, target: TorchKvStore, foreign: ForeignPool) -> None:
        self.source, self.target, self.foreign = source, target, foreign

    def by_ipc(self, load: Load) -> None:
        """As a receiver does it, frame by frame, and until it may answer."""
        for frame in load.frames():
            self.foreign.copy(frame.layers, _blocks(load.source, frame.tokens), frame.tokens, load.target)
        self.settle()

    def by_runs(self, load: Load) -> None:
        """One call for each run of each tensor, from pool to pool of this process."""
        pairs = list(self._runs(load))
        for layer in range(GEOMETRY.num_layers):
            for theirs, ours in ((self.source.keys, self.target.keys), (self.source.values, self.target.values)):
                source, target = theirs[layer].flatten(0, 1), ours[layer].flatten(0, 1)
                for start, at, length in pairs:
                    target[at : at + length].copy_(source[start : start + length])
        torch.cuda.synchronize()

    def in_one_piece(self, load: Load) -> None:
        """What the memory allows."""
        self.target.memory.tensor[-load.num_bytes :].copy_(self.source.memory.tensor[-load.num_bytes :])
        torch.cuda.synchronize()

    def to_host(self, load: Load) -> None:
        """As a sender does it, but for the sending."""
        frames = load.frames()
        ahead: Reading | None = None
        for number in range(len(frames) + 1):
            reading, ahead = ahead, None
            if number < len(frames):
                ahead = self.source.read_ahead(frames[number].layers, load.source, frames[number].tokens)
            if reading is not None:
                _wait(reading.pending)
                reading.release()

    def from_host(self, load: Load) -> None:
        """As a receiver does it, but for the receiving."""
        for frame in load.frames():
            self.target.landing(frame.layers, load.target, frame.tokens).finish()
        self.settle()

    def settle(self) -> None:
        """Until what was copied is in the target."""
        _wait(self.target.landed())

    def same(self, load: Load) -> bool:
        """Whether the KV is in the target; it is wiped."""
        equal = True
        for theirs, ours in ((self.source.keys, self.target.keys), (self.source.values, self.target.values)):
            for source, target in zip(theirs, ours, strict=True):
                rows, copies = source[load.source].flatten(0, 1), target[load.target].flatten(0, 1)
                span = slice(len(load.tokens))
                equal = equal and rows[span].view(torch.int16).equal(copies[span].view(torch.int16))
        self.target.memory.tensor.zero_()
        torch.cuda.synchronize()
        return equal

    def _runs(self, load: Load) -> Iterator[tuple[int, int, int]]:
        for token in range(0, len(load.tokens), PAGE_MULTIPLE):
            tokens = range(token, min(token + PAGE_MULTIPLE, load.tokens.stop))
            (source,) = slot_runs(load.source, tokens, PAGE_MULTIPLE)
            (target,) = slot_runs(load.target, tokens, PAGE_MULTIPLE)
            yield source.start, target.start, len(source)


def open_pool(target: TorchKvStore, hello: pb.LinkHello) -> ForeignPool:
    """The other process's pool. Ends this process with a reason where it cannot be mapped."""
    opener = cuda_pool_opener(target, "importer")
    obstacle = "there is no CUDA runtime" if opener is None else opener.obstacle(hello)
    if opener is None or obstacle:
        raise SystemExit(f"CUDA IPC is not to be had here: {obstacle}")
    return opener.open(hello, bytes(16))


class Pinned:
    """Copies between pinned memory and the device that no pool takes part in."""

    def __init__(self, num_bytes: int) -> None:
        self._host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self._device = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")

    def to_host(self, load: Load) -> None:
        """As many bytes, in one piece."""
        self._host[: load.num_bytes].copy_(self._device[: load.num_bytes], non_blocking=True)
        torch.cuda.synchronize()

    def from_host(self, load: Load) -> None:
        """The other way."""
        self._device[: load.num_bytes].copy_(self._host[: load.num_bytes], non_blocking=True)
        torch.cuda.synchronize()


def measure(device: Device, pinned: Pinned, load: Load, rounds: int) -> Iterator[Row]:
    """All systems, in turns."""
    systems: dict[str, Callable[[Load], None]] = {
        "CUDA IPC": device.by_ipc,
        "device to device": device.by_runs,
        "one piece": device.in_one_piece,
        "staging to host": device.to_host,
        "pinned memory to host": pinned.to_host,
        "staging to device": device.from_host,
        "pinned memory to device": pinned.from_host,
    }
    for name in ("CUDA IPC", "device to device"):
        systems[name](load)
        if not device.same(load):
            raise SystemExit(f"{load.case}: {name} has not moved the KV")
    samples: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds + 1):
        for name, move in systems.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            move(load)
            seconds = time.perf_counter() - begin
            if number:
                samples[name].append(load.num_bytes / seconds / 1e9)
    for name, rates in samples.items():
        yield Row(load.case, name, "rate", statistics.median(rates), "GB/s", rates)
    share = statistics.median(samples["CUDA IPC"]) / statistics.median(samples["device to device"])
    yield Row(load.case, "CUDA IPC", "of device to device", share, "", [])


def _wait(pending: Pending | None) -> None:
    if pending is not None:
        pending.wait()


def _blocks(blocks: Sequence[int], tokens: range) -> Sequence[int]:
    """Those that hold `tokens`."""
    return blocks[tokens.start // PAGE_MULTIPLE : -(-tokens.stop // PAGE_MULTIPLE)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Ends the process with a reason where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("build/bench/handoff_cuda.json"))
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error(f"this measures a GPU, and torch {torch.__version__} sees no CUDA device")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, print it, and write it as JSON."""
    arguments = parse(argv)
    largest = (max(arguments.mib) << 20) / GEOMETRY.token_bytes / PAGE_MULTIPLE
    num_blocks = int(largest * SLACK) + 2
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=export, args=(there, num_blocks), daemon=True)
    process.start()
    there.close()
    if not here.poll(PATIENCE):
        raise SystemExit("the exporting process does not answer")
    source, target = make_store(num_blocks, seed=1), make_store(num_blocks, seed=None)
    device = Device(source, target, open_pool(target, pb.LinkHello.FromString(here.recv())))
    pinned = Pinned(max(arguments.mib) << 20)
    rows: list[Row] = []
    for load in loads(arguments.mib, num_blocks):
        for row in measure(device, pinned, load, arguments.rounds):
            sys.stdout.write(f"{row.case:20} {row.system:24} {row.metric:20} {row.value:10.2f} {row.unit}\n")
            sys.stdout.flush()
            rows.append(row)
    device.foreign.close()
    here.send(None)
    process.join(PATIENCE)
    header = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "rounds": arguments.rounds,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"header": header, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
