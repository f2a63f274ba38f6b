"""What a router knows of its workers: who may be used, when the router is ready, and which contradictions end it."""

import asyncio
import contextlib
import random
from contextlib import AsyncExitStack
from typing import Any

import pytest

from kvbaton.engine.errors import StartupError, UnavailableError
from kvbaton.router import registry as module
from kvbaton.router.registry import DECODE, PREFILL, Registry, Worker
from kvbaton.rpc.serving import channel
from kvbaton.v1 import worker_pb2 as pb
from support.fakes import PATIENCE, FakeWorkerStatus, fingerprint, model_info, served


class Known:
    """Two workers of each role, without connections."""

    def __init__(self) -> None:
        no_channel: Any = None
        self.p1, self.p2 = (Worker(f"p{n}:1", PREFILL, no_channel) for n in (1, 2))
        self.d1, self.d2 = (Worker(f"d{n}:1", DECODE, no_channel) for n in (1, 2))
        self.readiness: list[bool] = []
        workers = [self.p1, self.p2, self.d1, self.d2]
        self.registry = Registry(workers, self.readiness.append, _rng=random.Random(0))

    def seen(self, worker: Worker, **changes: Any) -> None:
        values = {"role": worker.role, "incarnation": "1", "model": model_info(), **changes}
        self.registry.update(worker, pb.WorkerStatus(**values))

    def all_seen(self) -> None:
        for worker in self.registry.workers:
            self.seen(worker)

    def chosen(self) -> set[str]:
        choices = [self.registry.choose() for _ in range(100)]
        return {worker.address for prefill, decode, _ in choices for worker in (prefill, decode)}


@pytest.fixture
def known() -> Known:
    return Known()


def test_a_router_is_ready_with_one_worker_of_each_role(known: Known) -> None:
    known.seen(known.p1)
    known.seen(known.p2)
    assert not known.registry.ready
    with pytest.raises(UnavailableError, match="no decode worker is ready"):
        known.registry.choose()
    known.seen(known.d2)
    known.seen(known.d1)
    assert known.registry.ready
    assert known.readiness == [True]
    assert known.registry.model == model_info()
    assert known.chosen() == {"p1:1", "p2:1", "d1:1", "d2:1"}


def test_a_lost_worker_is_not_chosen_until_it_is_back(known: Known) -> None:
    known.all_seen()
    known.registry.lost(known.p1, "connection refused")
    assert known.p1.problem == "not connected: connection refused"
    assert "p1:1" not in known.chosen()
    known.registry.lost(known.p2, "gone")
    with pytest.raises(UnavailableError, match="no prefill worker is ready"):
        known.registry.choose()
    known.seen(known.p1)
    assert known.readiness == [True, False, True]
    assert known.p1.problem == ""
    assert known.chosen() == {"p1:1", "d1:1", "d2:1"}


def test_a_worker_that_restarted_is_a_new_one(known: Known, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    known.all_seen()
    known.seen(known.p1)
    assert caplog.text.count("prefill worker p1:1 connected") == 1
    known.seen(known.p1, incarnation="2")
    assert caplog.text.count("prefill worker p1:1 connected") == 2
    assert known.p1.status is not None
    assert known.p1.status.incarnation == "2"


def test_a_draining_worker_is_not_chosen(known: Known) -> None:
    known.all_seen()
    known.seen(known.d1, draining=True)
    assert known.d1.problem == "draining"
    assert "d1:1" not in known.chosen()
    known.seen(known.d2, draining=True)
    assert known.readiness == [True, False]


@pytest.mark.parametrize("first_to_go", ["p", "d"])
def test_a_rollout_of_another_model_takes_over_when_the_old_one_has_gone(known: Known, first_to_go: str) -> None:
    known.registry.workers = [known.p1, known.d1]
    known.all_seen()
    order = [known.p1, known.d1] if first_to_go == "p" else [known.d1, known.p1]
    for worker in order:
        known.registry.lost(worker, "rollout")
        known.seen(worker, incarnation="2", model=model_info(name="new"))
    assert (known.p1.problem, known.d1.problem) == ("", "")
    assert known.registry.ready
    assert known.registry.model == model_info(name="new")


CONTRADICTIONS = [
    ({"model": model_info(max_model_len=7)}, "d1:1 serves context 7"),
    ({"model": model_info(vocab_size=7)}, "d1:1 serves vocabulary 7"),
    ({"role": PREFILL}, "--decode d1:1: is a prefill worker"),
    ({"role": pb.WORKER_ROLE_UNSPECIFIED}, "--decode d1:1: is a nameless worker"),
    ({"model": model_info(name="other")}, "d1:1 serves model 'other', the other workers 'fake'"),
    ({"model": model_info(fingerprint=fingerprint(architecture="X"))}, "d1:1 serves architecture 'X'"),
    ({"model": model_info(fingerprint=fingerprint(weights_digest="X"))}, "d1:1 serves weights 'X'"),
    ({"model": model_info(fingerprint=fingerprint(kv_dtype="X"))}, "d1:1 serves KV dtype 'X'"),
]


@pytest.mark.parametrize(("changes", "problem"), CONTRADICTIONS)
def test_a_contradiction_before_the_first_readiness_ends_the_router(
    known: Known, changes: dict[str, Any], problem: str
) -> None:
    known.seen(known.p1)
    with pytest.raises(StartupError, match=problem):
        known.seen(known.d1, **changes)


@pytest.mark.parametrize(("changes", "problem"), CONTRADICTIONS)
def test_a_contradiction_after_it_leaves_the_worker_out(known: Known, changes: dict[str, Any], problem: str) -> None:
    known.all_seen()
    known.seen(known.d1, incarnation="2", **changes)
    assert problem in known.d1.problem
    assert known.d1.connected
    assert known.chosen() == {"p1:1", "p2:1", "d2:1"}
    known.registry.lost(known.d2, "gone")
    assert not known.registry.ready
    with pytest.raises(UnavailableError, match="no decode worker is ready"):
        known.registry.choose()
    known.seen(known.d1, incarnation="3")
    assert known.registry.ready


def test_what_is_in_flight_decides_and_is_given_back(known: Known) -> None:
    known.all_seen()
    with known.p1.carrying(100), known.d2.carrying(100):
        assert known.chosen() == {"p2:1", "d1:1"}
        with contextlib.suppress(KeyError), known.p1.carrying(50):
            assert (known.p1.num_in_flight, known.p1.tokens_in_flight) == (2, 150)
            raise KeyError
        assert (known.p1.num_in_flight, known.p1.tokens_in_flight) == (1, 100)
    assert [worker.num_in_flight for worker in known.registry.workers] == [0] * 4
    assert [worker.tokens_in_flight for worker in known.registry.workers] == [0] * 4
    assert len(known.chosen()) == 4


def test_reported_queues_decide_between_equals(known: Known) -> None:
    known.all_seen()
    known.seen(known.p1, queues=pb.QueueStatus(num_waiting=3))
    assert "p1:1" not in known.chosen()


def test_two_roles_may_share_an_address() -> None:
    no_channel: Any = None
    workers = [Worker("one:1", PREFILL, no_channel), Worker("one:1", DECODE, no_channel)]
    registry = Registry(workers, lambda ready: None)
    for worker in workers:
        registry.update(worker, pb.WorkerStatus(role=worker.role, model=model_info()))
    assert registry.choose()[:2] == (workers[0], workers[1])


async def test_workers_are_followed_lost_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REDIAL_SECONDS", 0.01)
    end, incarnations = asyncio.Event(), iter("12")

    def reporting(role: pb.WorkerRole) -> FakeWorkerStatus:
        async def report(request: Any, context: Any) -> None:
            incarnation = next(incarnations) if role == PREFILL else "d"
            await context.write(pb.WorkerStatus(role=role, incarnation=incarnation, model=model_info()))
            await (end if incarnation == "1" else asyncio.Event()).wait()

        return FakeWorkerStatus(report)

    changes: asyncio.Queue[bool] = asyncio.Queue()
    async with asyncio.timeout(PATIENCE), AsyncExitStack() as stack:
        workers = []
        for role in (PREFILL, DECODE):
            address = await stack.enter_async_context(served(reporting(role)))
            workers.append(Worker(address, role, await stack.enter_async_context(channel(address))))
        registry = Registry(workers, changes.put_nowait)
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(registry.watch_all())
            assert await changes.get() is True
            end.set()
            assert await changes.get() is False
            assert workers[0].problem == "not connected: it ended its status stream"
            assert await changes.get() is True
            assert workers[0].status is not None
            assert workers[0].status.incarnation == "2"
            watching.cancel()


async def test_a_contradiction_comes_out_of_the_watch() -> None:
    async def report(request: Any, context: Any) -> None:
        await context.write(pb.WorkerStatus(role=DECODE, model=model_info()))
        await asyncio.Event().wait()

    async with asyncio.timeout(PATIENCE), served(FakeWorkerStatus(report)) as address, channel(address) as opened:
        registry = Registry([Worker(address, PREFILL, opened)], lambda ready: None)
        with pytest.RaisesGroup(pytest.RaisesExc(StartupError, match="is a decode worker"), flatten_subgroups=True):
            await registry.watch_all()
