"""kvbaton's engine under bench/engine.py: scheduler, pool, runner and sampler, as a worker has them.

python engine_kvbaton.py MODEL_DIR
"""

import sys
import time

import torch

from kvbaton.engine.core import Engine
from kvbaton.engine.new_request import NewRequest
from kvbaton.engine.pool import BlockPool
from kvbaton.engine.request import Route
from kvbaton.engine.sampling import SamplingParams
from kvbaton.engine.scheduler import Limits, Scheduler
from kvbaton.model.loader import load_model
from kvbaton.model.runner import ModelRunner
from kvbaton.model.store import TorchKvStore
from peers.protocol import Steps, Work, serve

BLOCK_SIZE = 16
NUM_BLOCKS = 1024


class Kvbaton:
    """An engine without its thread."""

    def __init__(self, model_dir: str) -> None:
        torch.set_num_threads(1)
        self._loaded = load_model(model_dir, "bfloat16", "cpu")
        store = TorchKvStore(self._loaded.geometry, NUM_BLOCKS, BLOCK_SIZE, self._loaded.device)
        self._runner = ModelRunner(self._loaded, store)

    def measure(self, work: Work) -> Steps:
        """Time each step until all is done."""
        limits = Limits(max_prefill_tokens=4096, max_decode_seqs=256, max_waiting=256)
        # A new pool each time: nothing is found in a prefix cache.
        pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        scheduler = Scheduler(pool, limits, frozenset(), self._loaded.max_model_len)
        engine = Engine(scheduler, self._runner)
        sampling = SamplingParams(max_tokens=work.steps + 1, seed=0, ignore_eos=True)
        for index, prompt in enumerate(work.prompts(self._loaded.vocab_size)):
            request = NewRequest(request_id=str(index), prompt=prompt, sampling=sampling, route=Route.LOCAL)
            scheduler.add(request, time.perf_counter())
        num_begun, result = 0, Steps(0.0, [])
        while True:
            waiting = num_begun < work.batch
            start = time.perf_counter()
            step = engine.step(time.perf_counter)
            elapsed = time.perf_counter() - start
            if not step.worked:
                return result
            for _, error in step.failed:
                raise error
            num_begun += sum(event.index == 0 for event in step.sampled)
            if waiting:
                result.prefill_seconds += elapsed
            else:
                result.decode_seconds.append(elapsed)


if __name__ == "__main__":
    serve(Kvbaton(sys.argv[1]).measure)
