"""The engine's greedy output in float32 is `transformers`' own, whatever was batched, chunked or moved."""

import itertools
from pathlib import Path

import pytest

from kvbaton.engine.core import Engine
from kvbaton.engine.pool import BlockPool
from kvbaton.engine.request import Phase, Route
from kvbaton.engine.sampling import SamplingParams
from kvbaton.engine.scheduler import Limits, Scheduler
from kvbaton.model.loader import load_model
from kvbaton.model.runner import ModelRunner
from kvbaton.model.store import TorchKvStore
from support import tiny_models
from support.requests import new_request

BLOCK = 8
MAX_TOKENS = 12
LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 40, 61]


class Worker:
    """An engine on a tiny model, without any service around it."""

    def __init__(self, folder: Path, block_size: int, max_prefill_tokens: int) -> None:
        loaded = load_model(str(folder), "float32", "cpu")
        import torch

        self.store = TorchKvStore(loaded.geometry, 64, block_size, torch.device("cpu"))
        pool = BlockPool(64, block_size)
        limits = Limits(max_prefill_tokens=max_prefill_tokens, max_decode_seqs=4, max_waiting=100)
        self.scheduler = Scheduler(pool, limits, loaded.eos_token_ids, loaded.max_model_len)
        self.engine = Engine(self.scheduler, ModelRunner(loaded, self.store))
        self.ticks = itertools.count()

    def step(self) -> None:
        result = self.engine.step(lambda: float(next(self.ticks)))
        for _, error in result.failed:
            raise error
        self.scheduler.check_integrity()


@pytest.fixture(scope="module", params=list(tiny_models.CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))


def params(ignore_eos: bool = True) -> SamplingParams:
    return SamplingParams(max_tokens=MAX_TOKENS, seed=0, ignore_eos=ignore_eos)


@pytest.mark.parametrize("chunk", [7, 512])
def test_aggregated(folder: Path, chunk: int) -> None:
    prompts = tiny_models.random_prompts(LENGTHS)
    worker = Worker(folder, BLOCK, chunk)
    requests = [worker.scheduler.add(new_request(str(n), prompt, params()), 0.0) for n, prompt in enumerate(prompts)]
    while any(request.phase is not Phase.FINISHED for request in requests):
        worker.step()
    assert [r.output for r in requests] == tiny_models.reference_greedy(folder, prompts, MAX_TOKENS, True)
    assert worker.scheduler.pool.num_free == 64


def test_moved_between_pools_of_different_block_sizes(folder: Path) -> None:
    prompts = tiny_models.random_prompts(LENGTHS)
    sender, receiver = Worker(folder, BLOCK, 16), Worker(folder, 5, 16)
    outputs = []
    for n, prompt in enumerate(prompts):
        sent = sender.scheduler.add(new_request(str(n), prompt, params(), Route.HAND_OFF), 0.0)
        received = receiver.scheduler.add(new_request(str(n), prompt, params(), Route.RECEIVE), 0.0)
        receiver.step()
        while sent.phase is not Phase.HANDING_OFF:
            sender.step()
        layers, tokens = range(3), range(len(prompt))
        payload = b"".join(sender.store.read(layers, sent.blocks, tokens))
        assert len(payload) == sender.store.geometry.span_bytes(0, 3, len(prompt))
        receiver.store.write(layers, received.blocks, tokens, payload)
        sender.scheduler.remove(str(n), 0.0)
        receiver.scheduler.kv_received(str(n), sent.output[0], 0.0)
        outputs.append(received)
    while any(request.phase is not Phase.FINISHED for request in outputs):
        receiver.step()
    assert [r.output for r in outputs] == tiny_models.reference_greedy(folder, prompts, MAX_TOKENS, True)
    assert receiver.engine.counters.prefill_tokens_computed == 0
