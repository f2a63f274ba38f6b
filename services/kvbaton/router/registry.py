"""The workers a router knows: found by dialling them, alive while their status stream is.

Life of an entry: dialled -> first status (role and model are checked) -> usable -> the stream ends: not usable,
dialled again. Before a first usable pair exists a contradiction ends the router, since somebody mixed up addresses or
models; after that, a worker that contradicts is left out and named, since a mistake in one rollout must not end a
working service.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import grpc

from kvbaton.engine.errors import StartupError
from kvbaton.router.policy import Candidate, choose
from kvbaton.v1 import types_pb2 as types
from kvbaton.v1 import worker_pb2 as pb
from kvbaton.v1.worker_pb2_grpc import WorkerServiceStub

logger = logging.getLogger(__name__)

PREFILL, DECODE, UNIFIED = pb.WORKER_ROLE_PREFILL, pb.WORKER_ROLE_DECODE, pb.WORKER_ROLE_UNIFIED
_ROLE_NAMES = {PREFILL: "prefill", DECODE: "decode", UNIFIED: "unified"}
_OPTIONS = {PREFILL: "--prefill", DECODE: "--decode", UNIFIED: "--workers"}
_STATUS_INTERVAL_SECONDS = 0.25
_REDIAL_SECONDS = 0.25


@dataclass(slots=True, eq=False)
class Worker:
    """One configured worker and what is known of it."""

    address: str
    role: pb.WorkerRole
    channel: grpc.aio.Channel
    status: pb.WorkerStatus | None = None
    connected: bool = False
    problem: str = "not connected yet"
    num_in_flight: int = 0
    tokens_in_flight: int = 0

    @property
    def usable(self) -> bool:
        """Whether requests may go there."""
        return self.connected and not self.problem

    @contextlib.contextmanager
    def carrying(self) -> Iterator[None]:
        """Count a request as in flight for the length of the block."""
        self.num_in_flight += 1
        try:
            yield
        finally:
            self.num_in_flight -= 1

    @contextlib.contextmanager
    def prefilling(self, num_tokens: int) -> Iterator[None]:
        """Count `num_tokens` tokens as being computed for the length of the block."""
        self.tokens_in_flight += num_tokens
        try:
            yield
        finally:
            self.tokens_in_flight -= num_tokens

    @property
    def prefills(self) -> bool:
        """Whether prompts can be computed there now: its role allows it, and its limits."""
        return self.usable and self.role in (PREFILL, UNIFIED) and self._limits.max_prefill_tokens > 0

    @property
    def decodes(self) -> bool:
        """Whether answers can be decoded there now."""
        return self.usable and self.role in (DECODE, UNIFIED) and self._limits.max_decode_seqs > 0

    @property
    def _limits(self) -> pb.EngineLimits:
        return self.status.limits if self.status is not None else pb.EngineLimits()

    def candidate(self) -> Candidate:
        """The worker as the policy sees it."""
        queued = self.status.queues.num_waiting if self.status is not None else 0
        return Candidate(self.address, self.num_in_flight, self.tokens_in_flight, queued, self.prefills)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one attempt at an answer runs."""

    prefill: Worker | None
    """None: the decode worker computes the prompt itself."""
    decode: Worker
    reason: str

    @property
    def usable(self) -> bool:
        """Whether it could still be chosen now."""
        prefills = self.decode.prefills if self.prefill is None else self.prefill.prefills
        return prefills and self.decode.decodes


@dataclass(slots=True)
class Registry:
    """All configured workers. Belongs to one event loop."""

    workers: Sequence[Worker]
    on_readiness: Callable[[bool], None]
    """Told whenever the router becomes ready, or stops being so."""
    model: types.ModelInfo | None = None
    """What the workers serve; known from the first status on."""
    vocabulary_digest: str = ""
    """Of the router's own tokenizer, which makes the token ids that workers get; empty where there is none."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever a worker has come, was lost, or does what it did not do before."""
    _was_ready: bool = False
    _ready: bool = False
    _rng: random.Random = field(default_factory=random.Random)

    @property
    def ready(self) -> bool:
        """Whether a request can be placed."""
        return self._ready

    def choose(self) -> Placement:
        """Where the next request goes. Raises UnavailableError when nobody prefills, or nobody decodes."""
        prefill = {w.address: w for w in self.workers if w.prefills}
        decode = {w.address: w for w in self.workers if w.decodes}
        choice = choose([w.candidate() for w in prefill.values()], [w.candidate() for w in decode.values()], self._rng)
        chosen = None if choice.prefill is None else prefill[choice.prefill]
        return Placement(chosen, decode[choice.decode], choice.reason)

    async def watch_all(self) -> None:
        """Follow every worker until cancelled. Raises StartupError as the module says."""
        async with asyncio.TaskGroup() as group:
            for worker in self.workers:
                group.create_task(self._watch(worker))

    def update(self, worker: Worker, status: pb.WorkerStatus) -> None:
        """Take in a worker's report. Raises StartupError for a contradiction before the router was ever ready."""
        restarted = worker.status is not None and worker.status.incarnation != status.incarnation
        newly = not worker.connected or restarted
        before = worker.prefills, worker.decodes
        worker.status, worker.connected = status, True
        problem = self._contradiction(worker, status)
        if problem and not self._was_ready:
            raise StartupError(problem)
        worker.problem = self._problem(worker, status)
        if newly:
            level = logging.ERROR if problem else logging.INFO
            logger.log(level, "%s worker %s %s", _ROLE_NAMES[worker.role], worker.address, problem or "connected")
        if newly or before != (worker.prefills, worker.decodes):
            self.changed.set()
        self._check_readiness()

    def lost(self, worker: Worker, reason: str) -> None:
        """A worker's status stream has ended."""
        if worker.connected:
            logger.warning("%s worker %s lost: %s", _ROLE_NAMES[worker.role], worker.address, reason)
        worker.connected = False
        worker.problem = f"not connected: {reason}"
        for other in self.workers:
            # Whoever contradicted the one that has gone may be right now.
            if other.connected and other.status is not None and not other.usable:
                other.problem = self._problem(other, other.status)
        self.changed.set()
        self._check_readiness()

    def _problem(self, worker: Worker, status: pb.WorkerStatus) -> str:
        return self._contradiction(worker, status) or ("draining" if status.draining else "")

    def _contradiction(self, worker: Worker, status: pb.WorkerStatus) -> str:
        if status.role != worker.role:
            return f"{_OPTIONS[worker.role]} {worker.address}: is a {_ROLE_NAMES.get(status.role, 'nameless')} worker"
        theirs = status.model
        if self.vocabulary_digest and theirs.vocabulary_digest not in ("", self.vocabulary_digest):
            return f"{worker.address} serves {theirs.name!r}, whose tokenizer is not that of the router's --model"
        if self.model is None or not any(other.usable for other in self.workers if other is not worker):
            # The first to come, or the first after all others have gone, says what is served from now on.
            self.model = theirs
            return ""
        ours = self.model
        kv_dtypes = ours.fingerprint.kv_dtype, theirs.fingerprint.kv_dtype
        converted = kv_dtypes[0] != kv_dtypes[1] and self._encodes(status)
        digest = "rounded_digest" if converted else "weights_digest"
        for what, mine, other in (
            ("model", ours.name, theirs.name),
            ("architecture", ours.fingerprint.architecture, theirs.fingerprint.architecture),
            ("KV dtype", *(("", "") if converted else kv_dtypes)),
            ("weights", *(getattr(info.fingerprint, digest) for info in (ours, theirs))),
            ("context", ours.max_model_len, theirs.max_model_len),
            ("vocabulary", ours.vocab_size, theirs.vocab_size),
        ):
            if mine != other:
                return f"{worker.address} serves {what} {other!r}, the other workers {mine!r}"
        return ""

    def _encodes(self, status: pb.WorkerStatus) -> bool:
        """Whether KV is sent in an encoding, by this worker or by another one: dtypes may then differ."""
        others = (worker.status for worker in self.workers if worker.usable and worker.status is not None)
        return bool(status.kv_encoding) or any(other.kv_encoding for other in others)

    def _check_readiness(self) -> None:
        ready = any(w.prefills for w in self.workers) and any(w.decodes for w in self.workers)
        if ready != self._ready:
            self._ready = ready
            self._was_ready = self._was_ready or ready
            self.on_readiness(ready)

    async def _watch(self, worker: Worker) -> None:
        stub = WorkerServiceStub(worker.channel)
        request = pb.WatchStatusRequest(min_interval_seconds=_STATUS_INTERVAL_SECONDS)
        while True:
            try:
                async for status in stub.WatchStatus(request, wait_for_ready=True):
                    self.update(worker, status)
                self.lost(worker, "it ended its status stream")
            except grpc.aio.AioRpcError as error:
                self.lost(worker, error.details() or error.code().name)
            await asyncio.sleep(_REDIAL_SECONDS)
