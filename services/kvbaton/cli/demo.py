"""`kvbaton demo`: a deployment with the bundled model, one question, and the waterfall of its trace."""

import sys

from rich.console import Console

from kvbaton.cli.collector import SpanCollector, collecting, new_trace
from kvbaton.cli.deployment import Deployment, UpConfig, deployed
from kvbaton.cli.up import overview
from kvbaton.cli.waterfall import waterfall
from kvbaton.client import AsyncClient, KvbatonError
from kvbaton.rpc import telemetry
from kvbaton.rpc.errors import root_cause
from kvbaton.rpc.serving import run

STORY = (
    "The red lamp is with Ann. The blue key is in the kitchen. Tom has seven apples. "
    "The red key is in the garden. The blue lamp is with Ben."
)
QUESTION = "Where is the blue key?"
ANSWER = "The blue key is in the kitchen."

_SPANS = {
    telemetry.SPAN_GENERATE,
    telemetry.SPAN_DECODE_ADMIT,
    telemetry.SPAN_PREFILL_QUEUE,
    telemetry.SPAN_PREFILL_COMPUTE,
    telemetry.SPAN_KV_TRANSFER,
    telemetry.SPAN_DECODE_STREAM,
}
_SPAN_TIMEOUT_SECONDS = 15.0


def run_demo() -> int:
    """Run it; exit code 0 when the model's answer is right. Raises StartupError when something cannot start."""
    try:
        return run(_demo(Console()))
    except BaseExceptionGroup as error:
        raise root_cause(error) from error


async def _demo(console: Console) -> int:
    log: list[str] = []

    def on_line(name: str, line: str) -> None:
        log.append(f"{name:<10} {line}")

    console.print("Starting a router, one prefill and one decode worker with the bundled model …", style="bold")
    try:
        async with collecting() as collector:
            # Spans are sent in batches; the demo does not want to wait five seconds for the last one.
            environment = {
                "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
                "OTEL_EXPORTER_OTLP_INSECURE": "true",
                "OTEL_BSP_SCHEDULE_DELAY": "200",
            }
            async with deployed(UpConfig(port=0, kv_memory="64MiB"), on_line, environment) as deployment:
                console.print(overview(deployment))
                return await _ask(console, deployment, collector)
    except BaseException:
        sys.stderr.write("\n".join(log) + "\n")
        raise


async def _ask(console: Console, deployment: Deployment, collector: SpanCollector) -> int:
    console.print(f"\n[bold]You[/]    {STORY} {QUESTION}\n[bold]Model[/]  ", end="")
    trace_id, traceparent = new_trace()
    async with AsyncClient(deployment.address) as client:
        # The first request of a fresh deployment also opens connections: not what a user would see. What it leaves in
        # the prefix caches is not used, so that the whole prompt is computed and moved before the user's eyes.
        warm = [{"role": "user", "content": f"{STORY} Who has the red lamp?"}]
        await client.generate(warm, cache_salt="warm-up", timeout=60).result()
        prompt = [{"role": "user", "content": f"{STORY} {QUESTION}"}]
        generation = client.generate(prompt, timeout=60, metadata=[traceparent])
        try:
            async for chunk in generation:
                console.print(chunk.text, end="", style="green", markup=False, highlight=False)
            result = await generation.result()
        except KvbatonError as error:
            console.print(f"[bold red]failed:[/] {error}")
            return 1
    console.print("\n")
    console.print(waterfall(await collector.wait_for(trace_id, _SPANS, _SPAN_TIMEOUT_SECONDS)))
    if result.text.strip() != ANSWER:
        console.print(f"[bold red]The right answer was:[/] {ANSWER}")
        return 1
    console.print(
        "\n[bold green]Right.[/] The KV cache crossed from one process to the other, and was not lost on the way."
    )
    return 0
