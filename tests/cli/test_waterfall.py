"""The waterfall's rows, its bars, and how it looks in a narrow, colourless or ASCII terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from kvbaton.cli.waterfall import (
    Event,
    Span,
    axis_cells,
    bar_cells,
    format_bytes,
    format_duration,
    format_rate,
    phases,
    waterfall,
)
from kvbaton.rpc import telemetry as names

START = 1_800_000_000 * 10**9
MS = 10**6


def span(name: str, start: float, end: float, **more: Any) -> Span:
    return Span(name, "some-service", START + int(start * MS), START + int(end * MS), **more)


def request() -> list[Span]:
    return [
        span(
            names.SPAN_GENERATE,
            0,
            400,
            attributes={
                names.ATTR_REQUEST_MODEL: "tiny",
                names.ATTR_INPUT_TOKENS: 1024,
                names.ATTR_OUTPUT_TOKENS: 64,
            },
            events=(
                Event(names.EVENT_FIRST_TOKEN, START + 100 * MS),
                Event(names.EVENT_SECOND_TOKEN, START + 110 * MS),
            ),
        ),
        span("kvbaton.v1.InferenceService/Generate", -1, 401),
        span(names.SPAN_ROUTE, 0, 1),
        span(names.SPAN_DECODE_ADMIT, 1, 1.5),
        span(names.SPAN_PREFILL_QUEUE, 2, 5),
        span(names.SPAN_PREFILL_COMPUTE, 5, 100, attributes={names.ATTR_PROMPT_TOKENS: 950}),
        span(
            names.SPAN_KV_TRANSFER,
            20,
            104,
            attributes={
                names.ATTR_TRANSFER_BYTES: 84_000_000,
                names.ATTR_TRANSFER_FRAMES: 84,
                names.ATTR_TRANSFER_TRANSPORT: "grpc",
                names.ATTR_TRANSFER_OVERLAPPED_SHARE: 0.952,
            },
        ),
        span(names.SPAN_DECODE_WAIT, 104, 105),
        span(names.SPAN_DECODE_STREAM, 105, 400, attributes={names.ATTR_COMPLETION_TOKENS: 63}),
    ]


def drawn(spans: list[Span], width: int = 80, encoding: str = "utf-8", **options: Any) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="")
    Console(file=file, width=width, **options).print(waterfall(spans))
    file.flush()
    return raw.getvalue().decode(encoding)


def test_rows_durations_and_notes() -> None:
    origin, rows = phases(request())
    assert origin == START
    assert [(row.label, row.duration_ns / MS, row.notes) for row in rows] == [
        ("queue", 3.5, ("decode 0.50, prefill 3.00",)),
        ("prefill", 95, ("950 tokens, 10,000/s",)),
        ("KV transfer", 84, ("84.0 MB, 1.00 GB/s", "grpc, 95% overlapped")),
        ("first token", 100, ("since arrival",)),
        ("second token", 10, ("after the first",)),
        ("decode", 295, ("63 tokens, 214/s",)),
    ]
    assert rows[0].intervals == ((1 * MS, 1_500_000), (2 * MS, 5 * MS))


@pytest.mark.parametrize("missing", range(9))
def test_any_span_may_be_missing(missing: int) -> None:
    spans = request()
    del spans[missing]
    assert "decode" in drawn(spans)


def test_without_the_routers_span_the_axis_starts_with_the_first_phase() -> None:
    origin, rows = phases(request()[3:])
    assert origin == START + MS
    assert [row.label for row in rows] == ["queue", "prefill", "KV transfer", "decode"]


def test_no_spans_is_said() -> None:
    assert drawn([]) == "no spans of this request were received\n"


def test_attributes_may_be_missing_or_absurd() -> None:
    bare = [span(names.SPAN_KV_TRANSFER, 0, 1), span(names.SPAN_DECODE_STREAM, 1, 2)]
    assert [row.notes for row in phases(bare)[1]] == [(), ()]
    odd = {names.ATTR_TRANSFER_BYTES: "many", names.ATTR_TRANSFER_OVERLAPPED_SHARE: 7.0}
    assert phases([span(names.SPAN_KV_TRANSFER, 0, 0, attributes=odd)])[1][0].notes == ("100% overlapped",)
    backwards = phases([span(names.SPAN_PREFILL_COMPUTE, 5, 3)])[1][0]
    assert backwards.duration_ns == 0


def test_retries_and_resumes_are_counted_and_the_last_transfer_is_described() -> None:
    spans = request()
    first = span(names.SPAN_KV_TRANSFER, 6, 7, attributes={names.ATTR_TRANSFER_BYTES: 5})
    resumed = span(names.SPAN_DECODE_STREAM, 410, 510, attributes={names.ATTR_COMPLETION_TOKENS: 1})
    rows = {row.label: row for row in phases([*spans, first, resumed])[1]}
    assert rows["KV transfer x2"].duration_ns == 85 * MS
    assert rows["KV transfer x2"].notes[0].startswith("84.0 MB")
    assert rows["decode x2"].notes[0].startswith("64 tokens")


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = drawn(request(), width).splitlines()
    assert max(len(line) for line in lines) <= width


def test_eighty_columns_without_colour() -> None:
    lines = [line.rstrip() for line in drawn(request()).splitlines()]
    assert lines == [
        "request  400 ms  tiny  tokens: 1,024 in, 64 out",
        "",
        "queue        3.50 ms ▍                                 decode 0.50, prefill 3.00",
        "prefill      95.0 ms ████████▎                         950 tokens, 10,000/s",
        "KV transfer  84.0 ms  ▐██████▋                         84.0 MB, 1.00 GB/s",
        "                                                       grpc, 95% overlapped",
        "first token   100 ms         ◆                         since arrival",
        "second token 10.0 ms         █▏                        after the first",
        "decode        295 ms         ▐████████████████████████ 63 tokens, 214/s",
        "                     0            200 ms        400 ms",
    ]


def test_an_ascii_terminal_gets_ascii() -> None:
    text = drawn(request(), encoding="ascii")
    assert text.isascii()
    assert "####" in text
    assert "^" in text


def test_colour_is_used_where_there_is_some() -> None:
    assert "\x1b[36m" in drawn(request(), force_terminal=True, color_system="standard")


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([(0, 100)], "██████████"),
        ([(0, 50)], "█████     "),
        ([(25, 50)], "  ▐██     "),
        ([(0, 1)], "▏         "),
        ([(0, 0)], "◆         "),
        ([(100, 100)], "         ◆"),
        ([(99, 100)], "         ▐"),
        ([(95, 300)], "         ▐"),
        ([(-50, 20)], "██        "),
        ([(0, 10), (90, 100)], "█        █"),
    ],
)
def test_bars(intervals: list[tuple[int, int]], expected: str) -> None:
    assert bar_cells(intervals, 100, 10) == expected


def test_axes() -> None:
    assert axis_cells(400 * MS, 40) == "0                200 ms           400 ms"
    assert axis_cells(400 * MS, 12) == "0     400 ms"
    assert len(axis_cells(400 * MS, 3)) == 3


@pytest.mark.parametrize(
    ("nanoseconds", "expected"),
    [
        (0, "0.00 ms"),
        (40_000, "0.04 ms"),
        (84_000_000, "84.0 ms"),
        (412 * MS, "412 ms"),
        (3_200 * MS, "3.20 s"),
    ],
)
def test_durations(nanoseconds: int, expected: str) -> None:
    assert format_duration(nanoseconds) == expected


def test_sizes() -> None:
    assert [format_bytes(size) for size in (12, 1_500, 2_500_000, 3e9)] == [
        "12 B",
        "1.5 kB",
        "2.5 MB",
        "3.0 GB",
    ]
    assert [format_rate(rate) for rate in (1.75e9, 1e6)] == ["1.75 GB/s", "0.0010 GB/s"]
