"""What a prompt does to those who are reading: a unified worker with and without a target for the gap between tokens.

    make bench-chunks            (or: python bench/chunk_budget.py --targets 0 15 30 60)

One unified worker with the 30m random model, on one core; the router and this client share another. Four answers stream
all the time; beside them come long prompts of 2,000 tokens, one after another, and short ones of 64, one every 0.4 s.
Prints, for each target, the gaps between streamed tokens and the time to the first token of both kinds of prompt, and
writes build/bench/chunks.json.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

import machine
from kvbaton.cli.deployment import UpConfig, deployed
from kvbaton.client import AsyncClient
from kvbaton.v1 import worker_pb2 as pb
from kvbaton.v1.worker_pb2_grpc import WorkerServiceStub

ROOT = Path(__file__).resolve().parent.parent
STREAMS, LONG, SHORT, NUM_LONG = 4, 2000, 64, 4
SHORT_EVERY_SECONDS = 0.4
VOCABULARY = 8192


class Load:
    """Runs one case and keeps its times, in seconds."""

    def __init__(self, client: AsyncClient, seed: int) -> None:
        self._client, self._rng, self._ended = client, random.Random(seed), asyncio.Event()
        self.gaps: list[float] = []
        self.first_long: list[float] = []
        self.first_short: list[float] = []

    async def run(self) -> None:
        """All of it, until the long prompts are through."""
        async with asyncio.TaskGroup() as group:
            for _ in range(STREAMS):
                group.create_task(self._stream())
            group.create_task(self._shorts(group))
            for _ in range(NUM_LONG):
                self.first_long.append(await self._first_token(LONG))
            self._ended.set()

    async def _stream(self) -> None:
        while not self._ended.is_set():
            last: float | None = None
            async for chunk in self._client.generate(self._prompt(32), max_tokens=256, ignore_eos=True):
                now = time.perf_counter()
                if last is not None:
                    self.gaps.append((now - last) / len(chunk.token_ids))
                last = now
                if self._ended.is_set():
                    break

    async def _shorts(self, group: asyncio.TaskGroup) -> None:
        while not self._ended.is_set():
            group.create_task(self._short())
            await asyncio.sleep(SHORT_EVERY_SECONDS)

    async def _short(self) -> None:
        self.first_short.append(await self._first_token(SHORT))

    async def _first_token(self, num_tokens: int) -> float:
        start = time.perf_counter()
        result = self._client.generate(self._prompt(num_tokens), max_tokens=1, ignore_eos=True)
        await result.result()
        return time.perf_counter() - start

    def _prompt(self, num_tokens: int) -> list[int]:
        return [self._rng.randrange(3, VOCABULARY) for _ in range(num_tokens)]


def quantile(samples: Sequence[float], share: float) -> float:
    """In milliseconds."""
    return 1e3 * sorted(samples)[round(share * (len(samples) - 1))]


def rows_of(target: int, load: Load) -> list[dict[str, Any]]:
    """The figures of one case."""
    case = f"target {target} ms" if target else "no target"
    figures = {
        "gap p50": quantile(load.gaps, 0.5),
        "gap p99": quantile(load.gaps, 0.99),
        "gap max": quantile(load.gaps, 1),
        f"first token of {SHORT}, p50": quantile(load.first_short, 0.5),
        f"first token of {SHORT}, p99": quantile(load.first_short, 0.99),
        f"first token of {LONG}, p50": quantile(load.first_long, 0.5),
    }
    return [
        {"case": case, "system": "kvbaton", "metric": metric, "value": value, "unit": "ms"}
        for metric, value in figures.items()
    ]


async def measure(model: Path, targets: Sequence[int]) -> list[dict[str, Any]]:
    """Start a deployment and run each case on it, after one to warm up."""
    config = UpConfig(
        model=str(model), port=0, dtype="bfloat16", prefill=0, decode=0, unified=1, max_prefill_tokens=2048
    )
    rows: list[dict[str, Any]] = []
    async with deployed(config, lambda name, line: None) as deployment, AsyncClient(deployment.address) as client:
        address = deployment.unified[0].address
        async with grpc.aio.insecure_channel(address) as channel:
            for number, target in enumerate([0, *targets]):
                await WorkerServiceStub(channel).SetLimits(pb.SetLimitsRequest(target_itl_ms=target))
                load = Load(client, seed=number)
                await load.run()
                rows += rows_of(target, load) if number else []
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", type=int, default=[0, 15, 30, 60])
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "models" / "30m")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench" / "chunks.json")
    options = parser.parse_args()
    if not options.model.exists():
        script = Path(__file__).resolve().parent / "random_models.py"
        subprocess.run([sys.executable, script, "30m", options.model, "--seed", "1"], check=True)
    rows = asyncio.run(measure(options.model, options.targets))
    header = machine.describe(command="make bench-chunks", seed=1, targets=options.targets)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"header": header, "rows": rows}, indent=1))
    for row in rows:
        sys.stdout.write(f"{row['case']:14} {row['metric']:24} {row['value']:9,.1f} {row['unit']}\n")


if __name__ == "__main__":
    main()
