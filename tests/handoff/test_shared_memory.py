"""Between two processes: memory that was handed over stays whole when its owner is killed, and nothing is left."""

import asyncio
import contextlib
import os
import random
import secrets
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
import uvloop
from crc32c import crc32c

from kvbaton.engine.errors import UnavailableError
from kvbaton.engine.kv_store import ForeignPool
from kvbaton.engine.pool_layout import lay_out
from kvbaton.handoff import wire
from kvbaton.handoff.shared_memory import SharedMemoryOpener, SharedMemoryPool
from kvbaton.model.store import TorchKvStore
from kvbaton.v1 import kv_transfer_pb2 as pb
from support.pool_owner import BLOCK_SIZE, GEOMETRY, NUM_BLOCKS, fill

CPU = torch.device("cpu")
TESTS = Path(__file__).parents[1]
TOKENS, LAYERS = range(NUM_BLOCKS * BLOCK_SIZE), range(GEOMETRY.num_layers)
THEIRS = list(range(NUM_BLOCKS))


def maps() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:")


def left() -> tuple[list[str], int]:
    """What this process could keep of a pool."""
    return sorted(os.listdir("/proc/self/fd"), key=int), maps()


def named_after(process: asyncio.subprocess.Process) -> list[str]:
    """What is in /dev/shm of a process's, or of the project's: other processes come and go there meanwhile."""
    return [name for name in os.listdir("/dev/shm") if "kvbaton" in name or str(process.pid) in name.split("_")]


@asynccontextmanager
async def owner(name: str, link_id: bytes) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "support.pool_owner", name, link_id.hex()), cwd=TESTS, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        # To the end of its output, so that its pipe is closed.
        await process.communicate()


async def line_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(60):
        return (await process.stdout.readline()).decode().strip()


@pytest.mark.skipif(not Path("/dev/shm").exists(), reason="Linux alone has it")
@pytest.mark.parametrize("during", ["copies", "hand-over"])
async def test_the_owner_is_killed(during: str) -> None:
    ours = TorchKvStore(GEOMETRY, 2 * NUM_BLOCKS, 8, CPU)
    fill(same := TorchKvStore(GEOMETRY, NUM_BLOCKS, BLOCK_SIZE, CPU))
    expected = crc32c(b"".join(same.read(LAYERS, THEIRS, TOKENS)))
    await asyncio.sleep(0)
    before = left()
    opener, link_id = SharedMemoryOpener(ours), secrets.token_bytes(16)
    async with owner(opener.invite(link_id), link_id) as process:
        hello = pb.LinkHello.FromString(bytes.fromhex(await line_of(process)))
        assert opener.obstacle(hello) == ""
        if during == "hand-over":
            process.send_signal(signal.SIGKILL)
            await process.wait()
            # It may just have been handed over.
            with contextlib.suppress(UnavailableError):
                opener.open(hello, link_id).close()
        else:
            assert await line_of(process) == "taken"
            foreign = opener.open(hello, link_id)
            copying = asyncio.to_thread(copies, foreign, 12)
            async with asyncio.TaskGroup() as group:
                found = group.create_task(copying)
                await asyncio.sleep(random.uniform(0, 0.02))
                process.send_signal(signal.SIGKILL)
                await process.wait()
            assert set(found.result()) == {expected}
            assert copies(foreign, 1) == [expected], "its memory is there as long as it is mapped"
            foreign.close()
    opener.forget(link_id)
    assert left() == before
    assert named_after(process) == []
    if during == "copies":
        assert crc32c(b"".join(ours.read(LAYERS, list(range(2 * NUM_BLOCKS)), TOKENS))) == expected


def copies(foreign: ForeignPool, times: int) -> list[int | None]:
    blocks = list(range(2 * NUM_BLOCKS))
    return [foreign.copy(LAYERS, THEIRS, TOKENS, blocks) for _ in range(times)]


def test_a_link_on_uvloop() -> None:
    theirs, ours = (TorchKvStore(GEOMETRY, NUM_BLOCKS, BLOCK_SIZE, CPU, shared=shared) for shared in (True, False))
    assert theirs.shared is not None
    pool, opener, link_id = SharedMemoryPool(theirs.shared), SharedMemoryOpener(ours), b"l" * 16

    async def link() -> ForeignPool:
        hello = pb.LinkHello()
        pool.describe(hello)
        with pytest.raises(UnavailableError, match="no socket"):
            await pool.hand_over(pb.LinkWelcome(link_id=link_id))
        await pool.hand_over(pb.LinkWelcome(link_id=link_id, descriptor_socket=opener.invite(link_id)))
        return opener.open(hello, link_id)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        foreign = runner.run(link())
    pattern = os.urandom(pool.probe_bytes)
    pool.write_probe(pattern)
    assert foreign.probe(len(pattern))[0] == crc32c(pattern)
    foreign.close()
    opener.forget(link_id)


def test_what_speaks_against_it() -> None:
    opener = SharedMemoryOpener(TorchKvStore(GEOMETRY, 4, 8, CPU))
    assert opener.obstacle(pb.LinkHello()) == "layout: 0 blocks of 0 tokens"
    layout = lay_out(GEOMETRY, 4, 16)
    assert opener.obstacle(pb.LinkHello(layout=wire.layout_to_proto(layout))) == ""


def test_a_descriptor_that_has_not_come() -> None:
    opener = SharedMemoryOpener(TorchKvStore(GEOMETRY, 4, 8, CPU))
    with pytest.raises(UnavailableError, match="has not come"):
        opener.open(pb.LinkHello(), b"l" * 16)
