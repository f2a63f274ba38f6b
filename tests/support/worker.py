"""An engine on a tiny model, without any service around it."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from kvbaton.engine.core import Engine
from kvbaton.engine.new_request import NewRequest
from kvbaton.engine.output import TokenLogprobs
from kvbaton.engine.pool import BlockPool
from kvbaton.engine.request import Phase, Request
from kvbaton.engine.scheduler import Limits, Scheduler
from kvbaton.model.loader import load_model
from kvbaton.model.runner import ModelRunner
from kvbaton.model.store import TorchKvStore


class LocalWorker:
    """Runs requests to their end and keeps what was told about them."""

    def __init__(self, folder: Path, *, max_prefill_tokens: int = 512, num_blocks: int = 512) -> None:
        loaded = load_model(str(folder), "float32", "cpu")
        store = TorchKvStore(loaded.geometry, num_blocks, 8, torch.device("cpu"))
        limits = Limits(max_prefill_tokens=max_prefill_tokens, max_decode_seqs=64, max_waiting=100)
        self.scheduler = Scheduler(BlockPool(num_blocks, 8), limits, loaded.eos_token_ids, loaded.max_model_len)
        self.engine = Engine(self.scheduler, ModelRunner(loaded, store))
        self.prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        self.logprobs: dict[str, list[TokenLogprobs | None]] = {}
        self.failures: dict[str, Exception] = {}

    def run(self, news: Sequence[NewRequest]) -> list[Request]:
        """The requests, finished."""
        ticks = itertools.count()
        requests = [self.scheduler.add(new, 0.0) for new in news]
        while any(request.phase is not Phase.FINISHED for request in requests):
            result = self.engine.step(lambda: float(next(ticks)))
            for request, logprobs in result.prompt_logprobs:
                self.prompt_logprobs.setdefault(request.request_id, []).extend(logprobs)
            for token in result.sampled:
                self.logprobs.setdefault(token.request.request_id, []).append(token.logprobs)
            for request, error in result.failed:
                self.failures[request.request_id] = error
            self.scheduler.check_integrity()
        return requests
