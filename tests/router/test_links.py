"""Which pairs of workers a router has linked, when, and what it does about failures."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kvbaton.engine.errors import UnavailableError
from kvbaton.router import links as module
from kvbaton.router.links import LinkKeeper, kv_endpoint
from kvbaton.router.registry import DECODE, PREFILL, UNIFIED, Registry, Worker
from kvbaton.rpc.serving import channel
from kvbaton.v1 import prefill_pb2
from kvbaton.v1 import worker_pb2 as pb
from support.fakes import PATIENCE, FakePrefill, forever, model_info, served

LIMITS = pb.EngineLimits(max_prefill_tokens=64, max_decode_seqs=8)


class Keeping:
    """A keeper over one served prefill worker and some workers that exist by their reports alone."""

    def __init__(self, prefill: FakePrefill, address: str, opened: Any) -> None:
        no_channel: Any = None
        self.prefill = prefill
        self.p = Worker(address, PREFILL, opened)
        self.d1, self.d2 = (Worker(f"d{n}:1", DECODE, no_channel) for n in (1, 2))
        # It prefills for others as well, and is then told by the same channel.
        self.u = Worker("u:1", UNIFIED, opened)
        self.registry = Registry([self.p, self.d1, self.d2, self.u], lambda _: None)

    def seen(self, worker: Worker, **changes: Any) -> None:
        values = {"role": worker.role, "incarnation": "1", "model": model_info(), "limits": LIMITS, **changes}
        self.registry.update(worker, pb.WorkerStatus(**values))

    def told(self) -> list[tuple[str, str]]:
        return [(request.endpoint, request.incarnation) for request in self.prefill.connected]

    async def until_told(self, *expected: tuple[str, str]) -> None:
        while self.told() != list(expected):
            assert len(self.told()) <= len(expected)
            await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def keeping() -> AsyncIterator[Keeping]:
    prefill = FakePrefill(forever)
    async with asyncio.timeout(PATIENCE), served(prefill) as address, channel(address) as opened:
        state = Keeping(prefill, address, opened)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(LinkKeeper(state.registry).run())
            yield state
            running.cancel()


async def test_a_pair_is_told_once_both_are_known() -> None:
    async with keeping() as state:
        state.seen(state.d1, kv_port=9)
        state.seen(state.p)
        await state.until_told(("d1:9", "1"))
        state.seen(state.p)
        state.seen(state.d1, kv_port=9)
        state.seen(state.d2, kv_endpoint="elsewhere:9", kv_port=8, incarnation="2")
        await state.until_told(("d1:9", "1"), ("elsewhere:9", "2"))


async def test_a_pair_is_told_again_when_one_is_another_process() -> None:
    async with keeping() as state:
        state.seen(state.p)
        state.seen(state.d1, kv_port=9)
        await state.until_told(("d1:9", "1"))
        state.seen(state.d1, kv_port=10, incarnation="2")
        await state.until_told(("d1:9", "1"), ("d1:10", "2"))
        state.seen(state.p, incarnation="2")
        await state.until_told(("d1:9", "1"), ("d1:10", "2"), ("d1:10", "2"))


async def test_a_worker_that_computes_its_own_prompts_is_told_to_nobody() -> None:
    async with keeping() as state:
        state.seen(state.p)
        state.seen(state.u, kv_port=9)
        state.seen(state.d1)
        state.seen(state.d2, kv_port=9)
        await state.until_told(("d2:9", "1"), ("d2:9", "1"))
        state.seen(state.u, kv_port=9, limits=pb.EngineLimits(max_decode_seqs=8))
        await state.until_told(("d2:9", "1"), ("d2:9", "1"), ("u:9", "1"))


async def test_a_failure_is_logged_once_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "FIRST_RETRY_SECONDS", 0.001)
    caplog.set_level("INFO", module.__name__)
    problems = ["no route", "no route", "no room"]

    async def connect(request: Any) -> Any:
        if problems:
            raise UnavailableError(problems.pop(0))
        link = pb.PeerLink(endpoint=request.endpoint, transport="shared_memory", reason="same host")
        return prefill_pb2.ConnectPeerResponse(link=link)

    async with keeping() as state:
        state.prefill.connect = connect
        state.seen(state.p)
        state.seen(state.d1, kv_port=9)
        await state.until_told(*[("d1:9", "1")] * 4)
        while len(caplog.records) < 3:
            await asyncio.sleep(0.001)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO"]
    assert "no route" in caplog.records[0].message
    assert "no room" in caplog.records[1].message
    assert caplog.records[2].message.endswith("and decode worker d1:1 are linked by shared_memory: same host")


async def test_not_too_many_are_linked_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTING", 1)
    gate = asyncio.Event()

    async def connect(request: Any) -> Any:
        await gate.wait()
        return prefill_pb2.ConnectPeerResponse()

    async with keeping() as state:
        state.prefill.connect = connect
        state.seen(state.p)
        state.seen(state.d1, kv_port=9)
        state.seen(state.d2, kv_port=9)
        await state.until_told(("d1:9", "1"))
        await asyncio.sleep(0.01)
        await state.until_told(("d1:9", "1"))
        gate.set()
        await state.until_told(("d1:9", "1"), ("d2:9", "1"))


async def test_a_lost_pair_is_forgotten() -> None:
    async with keeping() as state:
        state.seen(state.p)
        state.seen(state.d1, kv_port=9)
        await state.until_told(("d1:9", "1"))
        state.registry.lost(state.d1, "gone")
        await asyncio.sleep(0.01)
        state.seen(state.d1, kv_port=9)
        await state.until_told(("d1:9", "1"), ("d1:9", "1"))


@pytest.mark.parametrize(
    ("address", "endpoint", "port", "expected"),
    [
        ("h:1", "", 9, "h:9"),
        ("[::1]:1", "", 9, "[::1]:9"),
        ("h:1", "other:7", 9, "other:7"),
    ],
)
def test_where_a_worker_takes_kv(address: str, endpoint: str, port: int, expected: str) -> None:
    assert kv_endpoint(address, endpoint, port) == expected
