"""An engine on a tiny model, without any service around it."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvbaton.engine.core import Engine
from kvbaton.engine.pool import BlockPool
from kvbaton.engine.request import Phase, Request, Route
from kvbaton.engine.sampling import SamplingParams
from kvbaton.engine.scheduler import Limits, Scheduler
from kvbaton.model.loader import load_model
from kvbaton.model.runner import ModelRunner
from kvbaton.model.store import TorchKvStore
from support.requests import new_request


class TinyEngine:
    """Model, pool and scheduler; every step checks that no block is lost."""

    def __init__(
        self, folder: Path, *, block_size: int, chunk: int, decodes: int = 4, num_blocks: int = 64, device: str = "cpu"
    ) -> None:
        loaded = load_model(str(folder), "float32", device)
        self.config, self.attention = loaded.model.config, loaded.attention
        self.store = TorchKvStore(loaded.geometry, num_blocks, block_size, loaded.device)
        limits = Limits(max_prefill_tokens=chunk, max_decode_seqs=decodes, max_waiting=100)
        self.scheduler = Scheduler(
            BlockPool(num_blocks, block_size),
            limits,
            loaded.eos_token_ids,
            loaded.max_model_len,
            loaded.geometry.window,
        )
        self.engine = Engine(self.scheduler, ModelRunner(loaded, self.store))
        self._clock = itertools.count()
        self._names = itertools.count()

    def add(self, prompt: Sequence[int], max_tokens: int, route: Route = Route.LOCAL, **more: Any) -> Request:
        """A greedy request that goes on to `max_tokens`."""
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, ignore_eos=True)
        return self.scheduler.add(new_request(str(next(self._names)), prompt, sampling, route, **more), 0.0)

    def spoil(self) -> None:
        """Fill the pool with NaN: who looks at what was never written shows it."""
        for tensor in (*self.store.keys, *self.store.values):
            tensor.fill_(float("nan"))

    def remove(self, request: Request) -> None:
        """End a request where it stands."""
        self.scheduler.remove(request.request_id, 0.0)

    def step(self) -> None:
        """One step. Raises what a request failed with."""
        result = self.engine.step(lambda: float(next(self._clock)))
        for _, error in result.failed:
            raise error
        self.scheduler.check_integrity()

    def finish(self, requests: Sequence[Request]) -> list[list[int]]:
        """Step until all of `requests` have ended, and return their outputs."""
        while any(request.phase is not Phase.FINISHED for request in requests):
            self.step()
        return [request.output for request in requests]
