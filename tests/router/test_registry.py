"""What a router knows of its workers: who may be used, when the router is ready, and which contradictions end it."""

import asyncio
import contextlib
import random
from contextlib import AsyncExitStack
from typing import Any

import pytest

from kvbaton.engine.errors import StartupError, UnavailableError
from kvbaton.router import registry as module
from kvbaton.router.registry import DECODE, PREFILL, UNIFIED, Registry, Worker
from kvbaton.rpc.serving import channel
from kvbaton.v1 import worker_pb2 as pb
from support.fakes import PATIENCE, FakeWorkerStatus, fingerprint, model_info, served

LIMITS = pb.EngineLimits(max_prefill_tokens=64, max_decode_seqs=8)


class Known:
    """Two workers of each role, without connections."""

    def __init__(self) -> None:
        no_channel: Any = None
        self.p1, self.p2 = (Worker(f"p{n}:1", PREFILL, no_channel) for n in (1, 2))
        self.d1, self.d2 = (Worker(f"d{n}:1", DECODE, no_channel) for n in (1, 2))
        self.readiness: list[bool] = []
        workers = [self.p1, self.p2, self.d1, self.d2]
        self.registry = Registry(workers, self.readiness.append, vocabulary_digest="ab", _rng=random.Random(0))

    def seen(self, worker: Worker, **changes: Any) -> None:
        values = {"role": worker.role, "incarnation": "1", "model": model_info(), "limits": LIMITS, **changes}
        self.registry.update(worker, pb.WorkerStatus(**values))

    def all_seen(self) -> None:
        for worker in self.registry.workers:
            self.seen(worker)

    def chosen(self) -> set[str]:
        placements = [self.registry.choose() for _ in range(100)]
        return {worker.address for placed in placements for worker in (placed.prefill, placed.decode) if worker}


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
    ({"model": model_info(vocabulary_digest="cd")}, "d1:1 serves 'fake', whose tokenizer is not that of the router's"),
]


OTHER_DTYPE = model_info(fingerprint=fingerprint(kv_dtype="bfloat16", weights_digest="ff"))


@pytest.mark.parametrize("order", ["pd", "dp"])
def test_dtypes_may_differ_where_kv_is_encoded_on_its_way(known: Known, order: str) -> None:
    for kind in order:
        if kind == "p":
            known.seen(known.p1, kv_encoding="int8")
        else:
            known.seen(known.d1, model=OTHER_DTYPE)
    assert known.registry.ready
    known.seen(known.d1, model=OTHER_DTYPE)
    assert known.d1.problem == ""
    other = fingerprint(kv_dtype="bfloat16", weights_digest="X", rounded_digest="X")
    known.seen(known.d1, model=model_info(fingerprint=other))
    assert "d1:1 serves weights 'X'" in known.d1.problem


@pytest.mark.parametrize(("changes", "problem"), CONTRADICTIONS)
def test_a_contradiction_before_the_first_readiness_ends_the_router(
    known: Known, changes: dict[str, Any], problem: str
) -> None:
    known.seen(known.p1)
    with pytest.raises(StartupError, match=problem):
        known.seen(known.d1, **changes)


def test_a_worker_may_have_the_routers_tokenizer_or_none(known: Known) -> None:
    known.seen(known.p1, model=model_info(vocabulary_digest="ab"))
    known.seen(known.d1, model=model_info())
    assert known.chosen() == {"p1:1", "d1:1"}


def test_the_first_worker_must_have_the_routers_tokenizer(known: Known) -> None:
    with pytest.raises(StartupError, match="p1:1 serves 'fake', whose tokenizer"):
        known.seen(known.p1, model=model_info(vocabulary_digest="cd"))


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
    with known.p1.prefilling(100), known.d2.carrying():
        assert known.chosen() == {"p2:1", "d1:1"}
        with contextlib.suppress(KeyError), known.d2.carrying(), known.p1.prefilling(50):
            assert (known.d2.num_in_flight, known.p1.tokens_in_flight) == (2, 150)
            raise KeyError
        assert (known.d2.num_in_flight, known.p1.tokens_in_flight) == (1, 100)
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
        registry.update(worker, pb.WorkerStatus(role=worker.role, model=model_info(), limits=LIMITS))
    placement = registry.choose()
    assert (placement.prefill, placement.decode) == (workers[0], workers[1])


class Mixed(Known):
    """Two unified workers beside one of each other role; each has the limits that a test gives it."""

    def __init__(self) -> None:
        super().__init__()
        no_channel: Any = None
        self.u1, self.u2 = (Worker(f"u{n}:1", UNIFIED, no_channel) for n in (1, 2))
        self.registry.workers = [self.p1, self.d1, self.u1, self.u2]

    def limited(self, worker: Worker, prefill: int, decode: int) -> None:
        self.seen(worker, limits=pb.EngineLimits(max_prefill_tokens=prefill, max_decode_seqs=decode))


@pytest.fixture
def mixed() -> Mixed:
    return Mixed()


def test_a_unified_worker_is_enough(mixed: Mixed) -> None:
    mixed.limited(mixed.u1, 64, 8)
    assert mixed.readiness == [True]
    placement = mixed.registry.choose()
    assert (placement.prefill, placement.decode) == (None, mixed.u1)
    assert placement.reason.startswith("unified: ")
    assert placement.usable
    mixed.registry.lost(mixed.u1, "gone")
    assert not placement.usable
    assert mixed.readiness == [True, False]


@pytest.mark.parametrize(("prefill", "decode", "missing"), [(64, 0, "decode"), (0, 8, "prefill"), (0, 0, "prefill")])
def test_one_without_a_leg_is_not(mixed: Mixed, prefill: int, decode: int, missing: str) -> None:
    mixed.limited(mixed.u1, prefill, decode)
    assert mixed.u1.usable
    assert not mixed.registry.ready
    with pytest.raises(UnavailableError, match=f"no {missing} worker is ready"):
        mixed.registry.choose()


def test_two_unified_workers_may_make_a_pair(mixed: Mixed) -> None:
    mixed.limited(mixed.u1, 64, 0)
    mixed.limited(mixed.u2, 0, 8)
    placement = mixed.registry.choose()
    assert (placement.prefill, placement.decode) == (mixed.u1, mixed.u2)
    assert placement.reason.startswith("remote: ")


def test_a_role_changes_with_its_limits(mixed: Mixed) -> None:
    mixed.limited(mixed.p1, 64, 0)
    mixed.limited(mixed.u1, 64, 8)
    assert mixed.registry.choose().prefill is None
    mixed.limited(mixed.u1, 0, 8)
    placement = mixed.registry.choose()
    assert (placement.prefill, placement.decode) == (mixed.p1, mixed.u1)
    mixed.limited(mixed.p1, 0, 0)
    assert not placement.usable
    assert mixed.readiness == [True, False]


def test_every_role_is_chosen_from_where_it_can_serve(mixed: Mixed) -> None:
    mixed.limited(mixed.p1, 64, 0)
    mixed.limited(mixed.d1, 0, 8)
    mixed.limited(mixed.u1, 64, 8)
    mixed.limited(mixed.u2, 64, 8)
    with mixed.u1.carrying(), mixed.u2.carrying():
        assert mixed.chosen() == {"p1:1", "u1:1", "u2:1", "d1:1"}
        assert mixed.registry.choose().decode is mixed.d1
    with mixed.d1.carrying():
        assert mixed.chosen() == {"u1:1", "u2:1"}


def test_a_worker_named_as_unified_must_be_one(mixed: Mixed) -> None:
    mixed.seen(mixed.p1)
    with pytest.raises(StartupError, match="--workers u1:1: is a decode worker"):
        mixed.seen(mixed.u1, role=DECODE)


async def test_workers_are_followed_lost_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REDIAL_SECONDS", 0.01)
    end, incarnations = asyncio.Event(), iter("12")

    def reporting(role: pb.WorkerRole) -> FakeWorkerStatus:
        async def report(request: Any, context: Any) -> None:
            incarnation = next(incarnations) if role == PREFILL else "d"
            status = pb.WorkerStatus(role=role, incarnation=incarnation, model=model_info(), limits=LIMITS)
            await context.write(status)
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
