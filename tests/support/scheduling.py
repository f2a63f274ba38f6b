"""A scheduler stepped by hand, with a model that says the same every time."""

import itertools
from collections.abc import Sequence
from typing import Any

from kvbaton.engine.output import SampledToken, StepOutput
from kvbaton.engine.pool import BlockPool
from kvbaton.engine.request import Phase, Request, Route
from kvbaton.engine.sampling import SamplingParams
from kvbaton.engine.scheduler import Batch, Limits, Scheduler
from support.requests import new_request

EOS = 2
BLOCK = 4
NEVER_EOS = 50

first_tokens = itertools.count(1000)


def scheduler(
    num_blocks: int = 16, prefill: int = 100, decode: int = 8, waiting: int = 10, model_len: int = 1000
) -> Scheduler:
    limits = Limits(max_prefill_tokens=prefill, max_decode_seqs=decode, max_waiting=waiting)
    return Scheduler(BlockPool(num_blocks, BLOCK), limits, frozenset({EOS}), model_len)


def params(max_tokens: int = 4, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=0, **more)


def add(
    of: Scheduler, name: str, num_prompt: int = 3, max_tokens: int = 4, route: Route = Route.LOCAL, **more: Any
) -> Request:
    """A request whose prompt begins like no other's: the prefix cache has tests of its own."""
    prompt = [next(first_tokens), *range(10, 9 + num_prompt)] if num_prompt else []
    now = more.pop("now", 0.0)
    return of.add(new_request(name, prompt, params(max_tokens), route, **more), now)


def work(batch: Batch) -> list[tuple[str, int, int, bool]]:
    return [(s.request.request_id, s.start, s.num_tokens, s.samples) for s in batch.slices]


def output(*tokens: int) -> StepOutput:
    return StepOutput([SampledToken(token) for token in tokens])


def step(of: Scheduler, token: int = NEVER_EOS, now: float = 0.0) -> list[tuple[str, int, int, bool]]:
    """Do one step in which every sampled token is `token`; return its work."""
    of.make_room(now)
    of.admit(now)
    batch = of.schedule(now)
    done = work(batch)
    of.commit(batch, output(*[token for piece in batch.slices if piece.samples]), now)
    of.check_integrity()
    return done


def ended(request: Request) -> bool:
    return request.phase is Phase.FINISHED


def names(requests: Sequence[Request]) -> list[str]:
    return [request.request_id for request in requests]
