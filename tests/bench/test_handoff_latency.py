"""What a request's spans say about its hand-off, and what is made of it."""

import handoff_latency
import pytest
from handoff_latency import Passage

import report_handoff
from kvbaton.cli.waterfall import Span
from kvbaton.rpc import telemetry


def span(name: str, start_ms: float, end_ms: float, **attributes: float) -> Span:
    return Span(name, "service", int(start_ms * 1e6), int(end_ms * 1e6), attributes)


SPANS = [
    span(telemetry.SPAN_PREFILL_COMPUTE, 100, 600),
    span(telemetry.SPAN_KV_TRANSFER, 200, 604, **{telemetry.ATTR_TRANSFER_OVERLAPPED_SHARE: 0.99}),
    span(telemetry.SPAN_DECODE_WAIT, 603, 605),
    span(telemetry.SPAN_DECODE_STREAM, 605, 700),
]


def test_a_passage_begins_with_the_prompts_end() -> None:
    found = handoff_latency.passage(SPANS)
    assert found.handoff == pytest.approx(0.005)
    assert found.arrival == pytest.approx(0.003)
    assert found.transfer == pytest.approx(0.404)
    assert found.hidden_share == 0.99
    assert found.prefill == pytest.approx(0.5)


def test_a_passage_needs_all_spans() -> None:
    with pytest.raises(KeyError, match=telemetry.SPAN_KV_TRANSFER):
        handoff_latency.passage([each for each in SPANS if each.name != telemetry.SPAN_KV_TRANSFER])


def test_quantiles() -> None:
    samples = [float(number) for number in range(101)]
    assert handoff_latency.quantile(samples, 0.5) == 50
    assert handoff_latency.quantile(samples, 0.99) == 99
    assert handoff_latency.quantile([3.0, 1.0, 2.0], 0.99) == 3


def test_the_last_layer_of_a_model() -> None:
    assert handoff_latency.last_layer_bytes("0.6b") == 2048 * 8 * 128 * 2 * 2


def test_the_links_rate() -> None:
    row = {"case": "8 MiB, in order", "system": "kvbaton grpc", "metric": "rate", "value": 2.5}
    assert handoff_latency.link_rate([row], "kvbaton grpc") == 2.5e9
    assert handoff_latency.link_rate([row], "kvbaton shared_memory") is None
    assert handoff_latency.link_rate([{**row, "value": None}], "kvbaton grpc") is None


def test_the_table_has_a_line_for_each_model_and_transport() -> None:
    passages = [Passage(0.002 * number, 0.001, 1.5, 0.99, 2.0) for number in range(1, 4)]
    rows = handoff_latency.rows_of("30m, 2048 tokens", "kvbaton grpc", passages, allowance=None)
    line = "| 30m, 2048 tokens | kvbaton grpc | 3 | 4.00 | 6.00 | 1.00 | – | 99.00 | 1,500 | 2,000 |"
    assert report_handoff.latency_table(rows)[2] == line
    names = ("command", "date", "commit")
    header = {**dict.fromkeys(names, "x"), "cores": [0, 1], "clock_step_microseconds": 0.25}
    section = report_handoff.latency_section({"header": header, "rows": rows})
    assert line in section
    assert "0.2 µs" in section
