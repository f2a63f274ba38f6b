"""Links between workers, made before requests need them: each prefill worker is told of each decode worker.

A pair is told once; again when one of the two is another process than before, and after a failure, later each time.
No request waits for any of this: a hand-off to a worker that was never named links by itself.
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc

from kvbaton.router.registry import Registry, Worker
from kvbaton.rpc.errors import from_rpc_error
from kvbaton.rpc.serving import format_address, parse_address
from kvbaton.v1 import prefill_pb2
from kvbaton.v1.prefill_pb2_grpc import PrefillServiceStub

logger = logging.getLogger(__name__)

MAX_CONNECTING = 8
"""Pairs that are being linked at the same time."""

CALL_TIMEOUT_SECONDS = 30.0
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 1.0, 60.0

Pair = tuple[str, str]
"""Addresses of a prefill and a decode worker, as the router dials them."""


@dataclass(slots=True)
class _Told:
    """What came of telling a pair."""

    incarnations: tuple[str, str]
    endpoint: str
    done: bool = False
    running: bool = False
    problem: str = ""
    retry_seconds: float = FIRST_RETRY_SECONDS
    next_try: float = 0.0
    """Of `time.monotonic`, in seconds."""


@dataclass(slots=True)
class LinkKeeper:
    """Has every pair of workers linked that could hand over a request."""

    registry: Registry
    _told: dict[Pair, _Told] = field(default_factory=dict)
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_CONNECTING))
    _settled: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Keep on until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                self.registry.changed.clear()
                self._settled.clear()
                for prefill, decode, told in self._due():
                    await self._slots.acquire()
                    told.running = True
                    group.create_task(self._connect(prefill, decode, told))
                await self._wait()

    def _due(self) -> list[tuple[Worker, Worker, _Told]]:
        """Pairs to be told now; those that are no pairs any more are forgotten."""
        pairs = {(p.address, d.address): (p, d) for p, d in self._pairs()}
        for pair in [pair for pair, told in self._told.items() if pair not in pairs and not told.running]:
            del self._told[pair]
        due, now = [], time.monotonic()
        for pair, (prefill, decode) in pairs.items():
            incarnations, endpoint = (_incarnation(prefill), _incarnation(decode)), kv_endpoint_of(decode)
            told = self._told.get(pair)
            if told is None or (not told.running and (told.incarnations, told.endpoint) != (incarnations, endpoint)):
                told = self._told[pair] = _Told(incarnations, endpoint)
            if not told.done and not told.running and told.next_try <= now:
                due.append((prefill, decode, told))
        return due

    def _pairs(self) -> Iterator[tuple[Worker, Worker]]:
        for decode in self.registry.workers:
            # One that prefills computes its requests' prompts itself.
            if decode.decodes and not decode.prefills and kv_endpoint_of(decode):
                for prefill in self.registry.workers:
                    if prefill.prefills:
                        yield prefill, decode

    async def _wait(self) -> None:
        """Until a worker's state has changed, a pair has been told, or one is to be tried again."""
        waits = [told.next_try for told in self._told.values() if not told.done and not told.running]
        timeout = max(0.0, min(waits) - time.monotonic()) if waits else None
        async with asyncio.TaskGroup() as group:
            tasks = {group.create_task(event.wait()) for event in (self.registry.changed, self._settled)}
            await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()

    async def _connect(self, prefill: Worker, decode: Worker, told: _Told) -> None:
        request = prefill_pb2.ConnectPeerRequest(endpoint=told.endpoint, incarnation=told.incarnations[1])
        names = f"prefill worker {prefill.address} and decode worker {decode.address}"
        try:
            stub = PrefillServiceStub(prefill.channel)
            link = (await stub.ConnectPeer(request, timeout=CALL_TIMEOUT_SECONDS)).link
        except grpc.aio.AioRpcError as error:
            problem = str(from_rpc_error(error, prefill.address))
            if problem != told.problem:
                logger.warning("%s are not linked, and will be tried again: %s", names, problem)
            told.problem = problem
            told.next_try = time.monotonic() + told.retry_seconds
            told.retry_seconds = min(2 * told.retry_seconds, LAST_RETRY_SECONDS)
        else:
            told.done = True
            logger.info("%s are linked by %s: %s", names, link.transport, link.reason)
        finally:
            told.running = False
            self._slots.release()
            self._settled.set()


def kv_endpoint(address: str, endpoint: str, port: int) -> str:
    """host:port where the decode worker that the router dials at `address` takes KV: `endpoint`, where it names one."""
    if endpoint:
        return endpoint
    host, _ = parse_address(address)
    return format_address(host, port)


def kv_endpoint_of(decode: Worker) -> str:
    """The same by the worker's status; empty while it has told nothing."""
    status = decode.status
    if status is None or not (status.kv_endpoint or status.kv_port):
        return ""
    return kv_endpoint(decode.address, status.kv_endpoint, status.kv_port)


def _incarnation(worker: Worker) -> str:
    return worker.status.incarnation if worker.status is not None else ""
