"""Run by itself, prints whether a loaded model's requests compile anything: `python -m support.kernels MODEL DTYPE`."""

import sys
from pathlib import Path

from numba.core.dispatcher import Dispatcher

from kvbaton.engine.core import Engine
from kvbaton.engine.pool import BlockPool
from kvbaton.engine.request import Phase
from kvbaton.engine.sampling import SamplingParams
from kvbaton.engine.scheduler import Limits, Scheduler
from kvbaton.model.loader import load_model
from kvbaton.model.runner import ModelRunner
from kvbaton.model.store import TorchKvStore
from support import tiny_models
from support.requests import new_request


def signatures() -> dict[str, int]:
    """How many signatures of each kernel are there, compiled or from the cache."""
    found: dict[str, int] = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("kvbaton.model.cpu"):
            kernels = {key: value for key, value in vars(module).items() if isinstance(value, Dispatcher)}
            found.update({f"{name}.{key}": len(kernel.signatures) for key, kernel in kernels.items()})
    return found


def serve(folder: Path, dtype: str) -> tuple[dict[str, int], dict[str, int]]:
    """The signatures after the model was loaded, and after it has served prompts, in chunks and alone, and decodes."""
    loaded = load_model(str(folder), dtype, "cpu")
    store = TorchKvStore(loaded.geometry, 64, 8, loaded.device)
    scheduler = Scheduler(
        BlockPool(64, 8), Limits(max_prefill_tokens=13, max_decode_seqs=8, max_waiting=8), frozenset(), 200
    )
    engine = Engine(scheduler, ModelRunner(loaded, store))
    before = signatures()
    requests = [
        scheduler.add(new_request(str(n), prompt, SamplingParams(max_tokens=5, seed=0, prompt_logprobs=0)), 0.0)
        for n, prompt in enumerate(tiny_models.random_prompts([1, 9, 40]))
    ]
    while any(request.phase is not Phase.FINISHED for request in requests):
        assert not engine.step(lambda: 0.0).failed
    return before, signatures()


if __name__ == "__main__":
    at_load, afterwards = serve(Path(sys.argv[1]), sys.argv[2])
    sys.stdout.write(f"{sum(at_load.values())} {sum(afterwards.values())}\n")
