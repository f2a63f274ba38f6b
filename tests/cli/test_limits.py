"""`kvbaton limits` shows and sets what a worker says of itself."""

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvbaton.cli.main import main
from kvbaton.engine.errors import InvalidArgumentError
from kvbaton.v1 import worker_pb2 as pb
from support.fakes import FakeRouter, FakeWorkerStatus, forever, served


class Worker(FakeWorkerStatus):
    """Takes every limit but a decode limit."""

    def __init__(self) -> None:
        super().__init__(forever)
        self.limits = pb.EngineLimits(max_prefill_tokens=512, max_decode_seqs=8)

    async def GetStatus(self, request: Any, context: Any) -> pb.WorkerStatus:
        return pb.WorkerStatus(limits=self.limits)

    async def SetLimits(self, request: Any, context: Any) -> pb.SetLimitsResponse:
        self.requests.append(request)
        if request.HasField("max_decode_seqs"):
            raise InvalidArgumentError("max_decode_seqs", "this worker does not decode")
        for name in ("max_prefill_tokens", "target_itl_ms"):
            if request.HasField(name):
                setattr(self.limits, name, getattr(request, name))
        return pb.SetLimitsResponse(limits=self.limits)


class Running:
    """A worker in a thread of its own, as the command has its own event loop."""

    def __init__(self) -> None:
        self.worker = Worker()
        self.address = ""
        self.listening = threading.Event()
        self.loop = asyncio.new_event_loop()
        self.stop = asyncio.Event()
        self.thread = threading.Thread(target=lambda: self.loop.run_until_complete(self.serve()))

    async def serve(self) -> None:
        async with served(self.worker) as self.address:
            self.listening.set()
            await self.stop.wait()

    def ask(self, *flags: str) -> Result:
        return CliRunner().invoke(main, ["limits", self.address, *flags])


@pytest.fixture
def running() -> Iterator[Running]:
    service = Running()
    service.thread.start()
    assert service.listening.wait(10)
    yield service
    service.loop.call_soon_threadsafe(service.stop.set)
    service.thread.join()
    service.loop.close()


def test_it_shows_them(running: Running) -> None:
    shown = running.ask()
    assert shown.exit_code == 0
    assert [line.split() for line in shown.stdout.splitlines()] == [
        ["max_prefill_tokens", "512"],
        ["max_decode_seqs", "8"],
        ["target_itl_ms", "0.0"],
    ]
    assert running.worker.requests == []


def test_it_sets_what_is_given_and_nothing_else(running: Running) -> None:
    shown = running.ask("--max-prefill-tokens", "0", "--target-itl-ms", "12.5", "--json")
    assert shown.exit_code == 0
    assert json.loads(shown.stdout) == {"max_prefill_tokens": 0, "max_decode_seqs": 8, "target_itl_ms": 12.5}
    assert running.worker.requests == [pb.SetLimitsRequest(max_prefill_tokens=0, target_itl_ms=12.5)]


def test_a_refusal_names_the_field(running: Running) -> None:
    refused = running.ask("--max-decode-seqs", "4")
    assert refused.exit_code == 1
    assert refused.stderr == "Error: max_decode_seqs: this worker does not decode\n"


@pytest.mark.parametrize(("address", "problem"), [("nowhere", "is not host:port"), ("127.0.0.1:1", "is unavailable")])
def test_a_worker_that_cannot_be_asked(address: str, problem: str) -> None:
    failed = CliRunner().invoke(main, ["limits", address])
    assert failed.exit_code == 1
    assert problem in failed.stderr


async def test_another_service_is_no_worker() -> None:
    async with served(FakeRouter(forever)) as address:
        result = await asyncio.to_thread(CliRunner().invoke, main, ["limits", address])
    assert (result.exit_code, result.stderr) == (1, f"Error: address: {address} is no worker\n")
