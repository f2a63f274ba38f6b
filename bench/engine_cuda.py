"""The engine on a GPU: decode steps against the memory's speed, prompts against the matrix unit's, and transformers.

    python bench/engine_cuda.py --models 0.6b 8b --batches 1 8 64

A decode step must read the weights and the KV once: its roofline is those bytes at the rate at which the device
copies. A prompt's is its floating point operations at the rate of a large bfloat16 matrix product. Both are measured.
The other system is `generate_batch`, transformers' continuous batching, with the same weights on the same device.
Models have random weights (random_models.py) and are made at first use.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from kvbaton.engine.core import Engine
from kvbaton.engine.geometry import KvGeometry
from kvbaton.engine.new_request import NewRequest
from kvbaton.engine.pool import BlockPool
from kvbaton.engine.request import Phase, Request, Route
from kvbaton.engine.sampling import SamplingParams
from kvbaton.engine.scheduler import Limits, Scheduler
from kvbaton.model.cuda.kernel import PAGE_MULTIPLE
from kvbaton.model.loader import LoadedModel, load_model
from kvbaton.model.runner import ModelRunner
from kvbaton.model.store import TorchKvStore
from random_models import SHAPES, save_random_model

WARM_UP, STEPS = 8, 32
OURS, THEIRS = "kvbaton", "transformers"


@dataclass(frozen=True, slots=True)
class Row:
    """One number."""

    case: str
    system: str
    metric: str
    value: float
    unit: str


@dataclass(frozen=True, slots=True)
class Rates:
    """What the device can do."""

    bytes_per_second: float
    flops_per_second: float


def seconds_of(work: Callable[[], object], repeats: int = 10) -> float:
    """Median time of `work` on the device, after two runs that do not count."""
    times = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def measure_rates() -> Rates:
    """Copying a GiB reads and writes it; 8192 cubed is a product large enough for any device."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copying = seconds_of(lambda: target.copy_(source))
    matrix = torch.randn(8192, 8192, device="cuda").to(torch.bfloat16)
    product = seconds_of(lambda: matrix @ matrix)
    return Rates(2 * source.numel() / copying, 2 * 8192**3 / product)


def decode_bytes(read_weights: int, geometry: KvGeometry, batch: int, context: int) -> int:
    """Bytes that a decode step cannot do without."""
    return read_weights + batch * context * geometry.token_bytes


def prefill_flops(config: Any, layer_parameters: int, batch: int, prompt: int) -> int:
    """Floating point operations of the layers and of causal attention; the head sees one token of each prompt."""
    attention: int = (
        4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * prompt * (prompt + 1) // 2
    )
    head: int = 2 * config.vocab_size * config.hidden_size
    return batch * (2 * layer_parameters * prompt + attention + head)


def layer_parameters(model: Any) -> int:
    """Parameters that every token is multiplied with: all but embeddings and head."""
    outside = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    return sum(part.numel() for part in model.parameters() if id(part) not in outside)


def read_weights(model: Any) -> int:
    """Bytes of weights that a step reads: the layers and the head. Of the embeddings it reads some rows."""
    head: torch.Tensor = model.get_output_embeddings().weight
    return layer_parameters(model) * head.element_size() + head.nbytes


def prompts_of(batch: int, length: int) -> list[list[int]]:
    """Seeded token ids."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, 30000, (batch, length), generator=generator).tolist()


class OurEngine:
    """The engine, without services around it."""

    def __init__(self, loaded: LoadedModel, batch: int, tokens: int) -> None:
        """With room for `batch` sequences of `tokens` tokens."""
        num_blocks = batch * (tokens // PAGE_MULTIPLE + 1)
        store = TorchKvStore(loaded.geometry, num_blocks, PAGE_MULTIPLE, loaded.device)
        limits = Limits(max_prefill_tokens=batch * tokens, max_decode_seqs=batch, max_waiting=batch)
        self._scheduler = Scheduler(BlockPool(num_blocks, PAGE_MULTIPLE), limits, frozenset(), loaded.max_model_len)
        self._engine = Engine(self._scheduler, ModelRunner(loaded, store))

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[float]:
        """Seconds of each step until all have `max_tokens` tokens; the first one is the prompts'."""
        params = SamplingParams(max_tokens=max_tokens, seed=0, ignore_eos=True)
        requests: list[Request] = []
        for number, prompt in enumerate(prompts):
            new = NewRequest(request_id=str(number), prompt=prompt, sampling=params, route=Route.LOCAL)
            requests.append(self._scheduler.add(new, 0.0))
        times = []
        while any(request.phase is not Phase.FINISHED for request in requests):
            begin = time.perf_counter()
            failed = self._engine.step(time.monotonic).failed
            times.append(time.perf_counter() - begin)
            for _, error in failed:
                raise error
        return times


def ours(loaded: LoadedModel, name: str, arguments: argparse.Namespace, rates: Rates) -> Iterator[Row]:
    """Both kinds of step; each of them ends with its tokens on the host."""
    config, geometry = loaded.model.config, loaded.geometry
    for batch in arguments.batches:
        tokens = arguments.context + WARM_UP + STEPS
        engine = OurEngine(loaded, batch, tokens + 1)
        steps = engine.run(prompts_of(batch, arguments.context), WARM_UP + STEPS)
        step = statistics.median(steps[-STEPS:])
        case = f"{name} decode, batch {batch} at {arguments.context}"
        least = decode_bytes(read_weights(loaded.model), geometry, batch, tokens - STEPS // 2) / rates.bytes_per_second
        yield Row(case, OURS, "step", step * 1e3, "ms")
        yield Row(case, OURS, "share of memory roofline", least / step, "")
        del engine
    for batch in arguments.prompts:
        prompts = prompts_of(batch, arguments.context)
        # A fresh engine each time: a prompt that comes again is found in the prefix cache.
        steps = [OurEngine(loaded, batch, arguments.context + 2).run(prompts, 1)[0] for _ in range(5)]
        step = statistics.median(steps[1:])
        case = f"{name} prefill, {batch} of {arguments.context}"
        flops = prefill_flops(config, layer_parameters(loaded.model), batch, arguments.context)
        yield Row(case, OURS, "prompt tokens", batch * arguments.context / step, "tok/s")
        yield Row(case, OURS, "share of GEMM rate", flops / rates.flops_per_second / step, "")


def theirs(folder: Path, name: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """By the times that `generate_batch` notes for each token, without its warm-up."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    for batch in sorted({*arguments.batches, *arguments.prompts}):
        results = model.generate_batch(
            prompts_of(batch, arguments.context),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=WARM_UP + STEPS, do_sample=False, eos_token_id=-1, use_cache=True
            ),
            record_timestamps=True,
        )
        outputs = list(results.values())
        if batch in arguments.batches:
            last = [output.timestamps[-STEPS:] for output in outputs]
            gaps = [b - a for times in last for a, b in zip(times, times[1:], strict=False)]
            case = f"{name} decode, batch {batch} at {arguments.context}"
            yield Row(case, THEIRS, "step", statistics.median(gaps) * 1e3, "ms")
        if batch in arguments.prompts:
            first = max(output.timestamps[0] for output in outputs) - min(output.created_time for output in outputs)
            case = f"{name} prefill, {batch} of {arguments.context}"
            yield Row(case, THEIRS, "prompt tokens", batch * arguments.context / first, "tok/s")


def free() -> None:
    """Give back what the last system held."""
    gc.collect()
    torch.cuda.empty_cache()


def report(row: Row) -> Row:
    """Print a row as it comes."""
    sys.stdout.write(f"{row.case:<40} {row.system:<14} {row.metric:<26} {row.value:>12,.3f} {row.unit}\n")
    sys.stdout.flush()
    return row


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Ends the process with a reason where there is no GPU."""
    parser = argparse.ArgumentParser(description="Measure the engine on a GPU.")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["0.6b", "8b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64], help="sequences that decode together")
    parser.add_argument("--prompts", nargs="+", type=int, default=[1, 8], help="prompts computed together")
    parser.add_argument("--context", type=int, default=2048, help="tokens of each prompt")
    parser.add_argument("--folder", type=Path, default=Path("build/models"), help="where models are, or are made")
    parser.add_argument("--output", type=Path, default=Path("build/bench/engine_cuda.json"))
    parser.add_argument("--ours-only", action="store_true", help="leave transformers out")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error(f"this measures a GPU, and torch {torch.__version__} sees no CUDA device")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, print it, and write it as JSON."""
    arguments = parse(argv)
    rates, rows = measure_rates(), []
    for name in arguments.models:
        folder = arguments.folder / name
        if not folder.is_dir():
            save_random_model(name, folder, seed=1, device="cuda")
            free()
        loaded = load_model(str(folder), "bfloat16", "cuda")
        rows += [report(row) for row in ours(loaded, name, arguments, rates)]
        del loaded
        free()
        if not arguments.ours_only:
            rows += [report(row) for row in theirs(folder, name, arguments)]
            free()
    header = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        **asdict(rates),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"header": header, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
