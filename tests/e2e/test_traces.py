"""One request is one trace over three processes, the KV stream included."""

from pathlib import Path

from kvbaton.cli.collector import collecting, new_trace
from kvbaton.cli.deployment import UpConfig, deployed
from kvbaton.cli.waterfall import Span
from kvbaton.client import AsyncClient
from kvbaton.rpc import telemetry
from support import tiny_models

NUM_PROMPT, MAX_TOKENS = 40, 6

PARENTS = {
    telemetry.SPAN_GENERATE: "kvbaton.v1.InferenceService/Generate",
    telemetry.SPAN_ROUTE: telemetry.SPAN_GENERATE,
    telemetry.SPAN_DECODE_ADMIT: "kvbaton.v1.DecodeService/Decode",
    telemetry.SPAN_DECODE_WAIT: "kvbaton.v1.DecodeService/Decode",
    telemetry.SPAN_DECODE_STREAM: "kvbaton.v1.DecodeService/Decode",
    telemetry.SPAN_PREFILL_QUEUE: "kvbaton.v1.PrefillService/Prefill",
    telemetry.SPAN_PREFILL_COMPUTE: "kvbaton.v1.PrefillService/Prefill",
    telemetry.SPAN_KV_TRANSFER: "kvbaton.v1.PrefillService/Prefill",
}
RPCS = {
    # method: service that serves it, service that calls it
    "kvbaton.v1.DecodeService/Decode": ("kvbaton-decode", "kvbaton-router"),
    "kvbaton.v1.PrefillService/Prefill": ("kvbaton-prefill", "kvbaton-router"),
    "kvbaton.v1.KvTransferService/Transfer": ("kvbaton-decode", "kvbaton-prefill"),
}


async def collect(folder: Path) -> tuple[Span, ...]:
    async with collecting() as collector:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        config = UpConfig(model=str(folder), port=0, kv_memory="4MiB")
        async with deployed(config, lambda *_: None, environment) as deployment:
            trace_id, traceparent = new_trace()
            async with AsyncClient(deployment.address) as client:
                generation = client.generate(
                    [5] * NUM_PROMPT, max_tokens=MAX_TOKENS, ignore_eos=True, metadata=[traceparent]
                )
                await generation.result()
            # The client's half of an RPC is the last to end.
            await collector.wait_for(trace_id, set(PARENTS) | set(RPCS), 20)
        # Stopped services have sent what they had.
        return collector.spans(trace_id)


async def test_one_trace_over_all_hops(tmp_path: Path) -> None:
    spans = await collect(tiny_models.save_tiny_model("llama", tmp_path))
    by_id = {span.span_id: span for span in spans}

    def parent_of(span: Span) -> Span:
        assert span.parent_id is not None
        return by_id[span.parent_id]

    for name, parent in PARENTS.items():
        (span,) = [span for span in spans if span.name == name]
        assert parent_of(span).name == parent
        assert span.end_ns >= span.start_ns
    for method, (server, caller) in RPCS.items():
        (served,) = [span for span in spans if span.name == method and span.service == server]
        called = parent_of(served)
        assert (called.name, called.service) == (method, caller)
    (transfer,) = [span for span in spans if span.name == telemetry.SPAN_KV_TRANSFER]
    token_bytes = 4 * 3 * 2 * (8 + 8)
    assert transfer.attributes[telemetry.ATTR_TRANSFER_BYTES] == NUM_PROMPT * token_bytes
    (root,) = [span for span in spans if span.name == telemetry.SPAN_GENERATE]
    assert [event.name for event in root.events] == [telemetry.EVENT_FIRST_TOKEN, telemetry.EVENT_SECOND_TOKEN]
    assert root.attributes[telemetry.ATTR_INPUT_TOKENS] == NUM_PROMPT
    assert root.attributes[telemetry.ATTR_OUTPUT_TOKENS] == MAX_TOKENS
    assert all(span.attributes.get("error.type") is None for span in spans), "nothing failed"
