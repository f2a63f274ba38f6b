"""From a prompt's end on the prefill worker to its first decode step on the decode worker, as the services report it.

    make bench-handoff          (or: python bench/handoff_latency.py --requests 0.6b=20 30m=100 --transports grpc)

A router, a prefill and a decode worker run as `kvbaton up` starts them, each worker on a core of its own; router and
client share the decode worker's, which has nothing to do while a prompt is computed. Requests come one by one, with
prompts of random tokens, so that no prefix cache helps. The figures are those of the request's own trace: spans
`prefill.compute`, `kv.transfer`, `decode.wait` and `decode.stream` (docs/observability.md), whose times are of one
steady wall clock in each process; on one host they differ by no more than the wall clock was stepped between the
processes' starts, which is measured too. Prints a table and writes build/bench/handoff-latency.json.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
from kvbaton.cli.collector import SpanCollector, collecting, new_trace
from kvbaton.cli.deployment import Deployment, Process, UpConfig, deployed
from kvbaton.cli.waterfall import Span
from kvbaton.client import AsyncClient
from kvbaton.rpc import telemetry
from random_models import SHAPES

ROOT = Path(__file__).resolve().parent.parent
NUM_TOKENS, NEW_TOKENS, WARM_UP = 2048, 4, 2
NAMES = {
    telemetry.SPAN_PREFILL_COMPUTE,
    telemetry.SPAN_KV_TRANSFER,
    telemetry.SPAN_DECODE_WAIT,
    telemetry.SPAN_DECODE_STREAM,
}
SPAN_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class Passage:
    """One request's hand-off. Times in seconds."""

    handoff: float
    """From the prompt's end, its last layer computed and its first token sampled, to the first decode step."""
    arrival: float
    """Of that, until the decode worker's engine knew that the KV was verified and in place."""
    transfer: float
    """From the first frame to Applied."""
    hidden_share: float
    """The part of `transfer` that passed before the prompt's end, 0 to 1."""
    prefill: float
    """Computing the prompt."""


def passage(spans: Sequence[Span]) -> Passage:
    """What a request's spans say. Raises KeyError when one is missing."""
    by_name = {span.name: span for span in spans}
    prefill, transfer, wait, stream = (
        by_name[name]
        for name in (
            telemetry.SPAN_PREFILL_COMPUTE,
            telemetry.SPAN_KV_TRANSFER,
            telemetry.SPAN_DECODE_WAIT,
            telemetry.SPAN_DECODE_STREAM,
        )
    )
    share = transfer.attributes[telemetry.ATTR_TRANSFER_OVERLAPPED_SHARE]
    assert isinstance(share, int | float)
    return Passage(
        handoff=(stream.start_ns - prefill.end_ns) / 1e9,
        arrival=(wait.start_ns - prefill.end_ns) / 1e9,
        transfer=transfer.duration_ns / 1e9,
        hidden_share=float(share),
        prefill=prefill.duration_ns / 1e9,
    )


def quantile(samples: Sequence[float], share: float) -> float:
    """The sample that `share` of them do not exceed; of few samples a high one is the largest."""
    return sorted(samples)[round(share * (len(samples) - 1))]


def rows_of(case: str, system: str, passages: Sequence[Passage], allowance: float | None) -> list[dict[str, Any]]:
    """The figures of one case; `allowance` in seconds."""
    handoffs = [1e3 * each.handoff for each in passages]
    figures = {
        "hand-off p50": (statistics.median(handoffs), "ms"),
        "hand-off p99": (quantile(handoffs, 0.99), "ms"),
        "until the KV is in place p50": (1e3 * statistics.median(each.arrival for each in passages), "ms"),
        "transfer p50": (1e3 * statistics.median(each.transfer for each in passages), "ms"),
        "hidden share p50": (100 * statistics.median(each.hidden_share for each in passages), "%"),
        "prefill p50": (1e3 * statistics.median(each.prefill for each in passages), "ms"),
        "allowance": (None if allowance is None else 1e3 * allowance, "ms"),
    }
    return [
        {"case": case, "system": system, "metric": metric, "value": value, "unit": unit, "requests": len(passages)}
        for metric, (value, unit) in figures.items()
    ]


def last_layer_bytes(model: str) -> int:
    """KV of all tokens in one layer: what can only leave when the prompt is nearly computed."""
    config = SHAPES[model]
    return int(NUM_TOKENS * config.num_key_value_heads * config.head_dim * 2 * 2)


def link_rate(rows: Sequence[Mapping[str, Any]], system: str) -> float | None:
    """Bytes a second of 8 MiB, the last layer's size in the larger model, in bench/handoff.py's rows."""
    wanted = ("8 MiB, in order", system, "rate")
    values = (row["value"] for row in rows if (row["case"], row["system"], row["metric"]) == wanted)
    rate = next(values, None)
    return None if rate is None else float(rate) * 1e9


async def measure(config: UpConfig, model: str, num_requests: int, cores: Sequence[int]) -> list[Passage]:
    """Start a deployment and send requests, one by one, after some to warm up."""
    passages = []
    async with collecting() as collector:
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
            "OTEL_EXPORTER_OTLP_INSECURE": "true",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }
        async with deployed(config, _log, environment) as deployment, AsyncClient(deployment.address) as client:
            _pin(deployment, cores)
            rng = random.Random(1)
            for number in range(num_requests + WARM_UP):
                prompt = [rng.randrange(3, SHAPES[model].vocab_size) for _ in range(NUM_TOKENS)]
                found = await _request(client, collector, prompt)
                if number >= WARM_UP:
                    passages.append(found)
    return passages


async def _request(client: AsyncClient, collector: SpanCollector, prompt: list[int]) -> Passage:
    trace_id, traceparent = new_trace()
    answer = client.generate(prompt, max_tokens=NEW_TOKENS, ignore_eos=True, metadata=[traceparent])
    await answer.result()
    return passage(await collector.wait_for(trace_id, NAMES, SPAN_TIMEOUT_SECONDS))


def _pin(deployment: Deployment, cores: Sequence[int]) -> None:
    """Prefill workers to the first core; decode workers, router and this process to the last."""
    for processes, core in (
        (deployment.prefill, cores[0]),
        (deployment.decode, cores[-1]),
        ([deployment.router], cores[-1]),
    ):
        for process in processes:
            if process is not None:
                _pin_process(process, core)


def _pin_process(process: Process, core: int) -> None:
    # A thread that a thread starts has its cores.
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})


def _log(name: str, line: str) -> None:
    if "WARNING" in line or "ERROR" in line:
        sys.stderr.write(f"{name}: {line}\n")


def wall_clock_offset() -> int:
    """Nanoseconds between the wall clock and the monotonic one; it changes when the wall clock is stepped."""
    # Of a hundred readings the one with the least time between the two.
    return max(time.time_ns() - time.monotonic_ns() for _ in range(100))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", nargs="+", default=["0.6b=20", "30m=100"], help="of each model: name=number")
    parser.add_argument("--transports", nargs="+", default=["grpc", "shared_memory"])
    parser.add_argument("--cores", nargs="+", type=int, default=[0, 1], help="the prefill and the decode worker's")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "models")
    parser.add_argument("--throughput", type=Path, default=ROOT / "build" / "bench" / "handoff.json")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench" / "handoff-latency.json")
    options = parser.parse_args()
    links = json.loads(options.throughput.read_text())["rows"] if options.throughput.exists() else []
    offset = wall_clock_offset()
    os.sched_setaffinity(0, {options.cores[-1]})
    rows: list[dict[str, Any]] = []
    for each in options.requests:
        model, _, number = each.partition("=")
        path = options.folder / model
        if not path.exists():
            script = Path(__file__).resolve().parent / "random_models.py"
            subprocess.run([sys.executable, script, model, path, "--seed", "1"], check=True)
        for transport in options.transports:
            config = UpConfig(model=str(path), port=0, dtype="bfloat16", kv_memory="1GiB", transport=transport)
            passages = asyncio.run(measure(config, model, int(number), options.cores))
            rate = link_rate(links, f"kvbaton {transport}")
            allowance = None if rate is None else last_layer_bytes(model) / rate
            rows += rows_of(f"{model}, {NUM_TOKENS} tokens", f"kvbaton {transport}", passages, allowance)
    header = machine.describe(
        command="make bench-handoff",
        seed=1,
        cores=options.cores,
        clock_step_microseconds=abs(wall_clock_offset() - offset) / 1e3,
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"header": header, "rows": rows}, indent=1))
    for row in rows:
        value = "–" if row["value"] is None else f"{row['value']:10,.2f} {row['unit']}"
        sys.stdout.write(f"{row['case']:20} {row['system']:22} {row['metric']:30} {value}\n")


if __name__ == "__main__":
    main()
