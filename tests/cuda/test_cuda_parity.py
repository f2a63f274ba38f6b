"""On a GPU: the engine's greedy answers in float32, KV moved from one pool to another through host memory."""

from pathlib import Path

import pytest
import torch

from kvbaton.engine.core import Engine
from kvbaton.engine.pool import BlockPool
from kvbaton.engine.request import Phase, Route
from kvbaton.engine.sampling import SamplingParams
from kvbaton.engine.scheduler import Limits, Scheduler
from kvbaton.handoff.landing import fill
from kvbaton.model.loader import load_model
from kvbaton.model.runner import ModelRunner
from kvbaton.model.store import TorchKvStore
from support import tiny_models
from support.requests import new_request

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NUM_BLOCKS, BLOCK, MAX_TOKENS = 64, 8, 12
LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 61]


def worker(folder: Path) -> tuple[Scheduler, Engine, TorchKvStore]:
    loaded = load_model(str(folder), "float32", "cuda")
    store = TorchKvStore(loaded.geometry, NUM_BLOCKS, BLOCK, loaded.device)
    limits = Limits(max_prefill_tokens=16, max_decode_seqs=4, max_waiting=100)
    scheduler = Scheduler(BlockPool(NUM_BLOCKS, BLOCK), limits, loaded.eos_token_ids, loaded.max_model_len)
    return scheduler, Engine(scheduler, ModelRunner(loaded, store)), store


@pytest.mark.parametrize("architecture", list(tiny_models.ARCHITECTURES))
def test_moved_kv_gives_the_answers_of_transformers(architecture: str, tmp_path: Path) -> None:
    folder = tiny_models.save_tiny_model(architecture, tmp_path)
    prompts = tiny_models.random_prompts(LENGTHS)
    params = SamplingParams(max_tokens=MAX_TOKENS, seed=0, ignore_eos=True)
    sender, sending, source = worker(folder)
    receiver, receiving, sink = worker(folder)
    requests = []
    for number, prompt in enumerate(prompts):
        sent = sender.add(new_request(str(number), prompt, params, Route.HAND_OFF), 0.0)
        received = receiver.add(new_request(str(number), prompt, params, Route.RECEIVE), 0.0)
        receiving.step(lambda: 0.0)
        while sent.phase is not Phase.HANDING_OFF:
            sending.step(lambda: 0.0)
        layers, tokens = range(source.geometry.num_layers), range(len(prompt))
        fill(sink.landing(layers, received.blocks, tokens), b"".join(source.read(layers, sent.blocks, tokens)))
        landed = sink.landed()
        assert landed is not None
        landed.wait()
        sender.remove(str(number), 0.0)
        receiver.kv_received(str(number), sent.output[0], 0.0)
        requests.append(received)
    while any(request.phase is not Phase.FINISHED for request in requests):
        receiving.step(lambda: 0.0)
    expected = tiny_models.reference_greedy(folder, prompts, MAX_TOKENS, ignore_eos=True)
    assert [request.output for request in requests] == expected
