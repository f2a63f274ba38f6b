"""One end of the hand-off in a process of its own, to be killed or stopped.

`python -m support.peer_process TICK receive` or `… TICK send ENDPOINT`: it takes commands on its standard input and
answers each with a line of JSON. TICK is what the connection's clock counts in, a second in service.
"""

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from kvbaton.engine.errors import KvbatonError
from kvbaton.engine.geometry import KvGeometry
from kvbaton.handoff import sender as sender_module
from kvbaton.handoff.frames import FramePlanner
from kvbaton.handoff.http2 import carrier
from support import chaos
from support.chaos import TOKENS, Ends

FRAME_BYTES = 300
TESTS = Path(__file__).resolve().parents[1]


class PeerProcess:
    """The process, seen by the test."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.pid = process.pid
        self._process = process

    async def ask(self, **command: Any) -> Any:
        """Its answer."""
        await self.tell(**command)
        return await self.answer()

    async def tell(self, **command: Any) -> None:
        """Give a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        await self._process.stdin.drain()

    async def answer(self) -> Any:
        """Of the oldest command."""
        assert self._process.stdout is not None
        return json.loads(await self._process.stdout.readline())


@asynccontextmanager
async def peer_process(tick: float, *arguments: str) -> AsyncIterator[PeerProcess]:
    """The process, ended with the block."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "support.peer_process", str(tick), *arguments),
        cwd=TESTS,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield PeerProcess(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _receive(ends: Ends, command: dict[str, Any]) -> dict[str, Any]:
    """`{"reserve": true}` makes a ticket; anything else asks what there is."""
    if command.get("reserve"):
        return {"ticket": ends.reserve(TOKENS, random.Random(1)).ticket.hex()}
    return {
        "endpoint": ends.proxy.upstream,
        "attempts": len(ends.attempts),
        "tickets": len(ends.book),
        "applied": ends.applied,
    }


async def _send(ends: Ends, command: dict[str, Any]) -> dict[str, Any]:
    """`{"ticket": hex, "attempt": 1}` sends KV, and says how that ended."""
    reservation = ends.reserve(TOKENS, random.Random(1))
    reservation.ticket = bytes.fromhex(command["ticket"])
    try:
        await ends.send(reservation, ends.compute(TOKENS), command["attempt"])
    except (KvbatonError, TimeoutError) as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": ""}


async def _main(tick: str, role: str, endpoint: str = "") -> None:
    carrier.TICK_SECONDS = float(tick)
    setattr(sender_module, "FramePlanner", _planner)  # noqa: B010
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with chaos.ends(direct=True) as ends:
        if endpoint:
            ends.proxy.endpoint = endpoint
        while line := await reader.readline():
            answer = await (_send if role == "send" else _receive)(ends, json.loads(line))
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


def _planner(geometry: KvGeometry, start: int, stop: int) -> FramePlanner:
    return FramePlanner(geometry, start, stop, FRAME_BYTES)


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
