"""One request's trace as a waterfall in the terminal: where its time went, phase by phase, on one time
axis.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from rich.console import Group
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from kvbaton.rpc import telemetry as names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

AttributeValue = str | bool | int | float | tuple[str, ...]


@dataclass(frozen=True)
class Event:
    """A moment in a span, in Unix nanoseconds."""

    name: str
    time_ns: int


@dataclass(frozen=True)
class Span:
    """One span of a trace, with times in Unix nanoseconds and ids in hexadecimal; the root's `parent_id`
    is "".
    """

    name: str
    service: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    span_id: str = ""
    parent_id: str = ""
    events: tuple[Event, ...] = ()

    @property
    def duration_ns(self) -> int:
        """Never negative, whatever a clock did."""
        return max(0, self.end_ns - self.start_ns)


@dataclass(frozen=True)
class Row:
    """One line of the waterfall. A row whose intervals have no length is a moment, and is drawn as a
    marker.
    """

    label: str
    style: str
    intervals: tuple[tuple[int, int], ...]
    """Start and end of each piece, in nanoseconds from the request's start."""
    duration_ns: int
    """What the duration column says; for a moment, its distance from the request's start."""
    notes: tuple[str, ...] = ()


def waterfall(spans: Iterable[Span]) -> RenderableType:
    """Draw the phases of one request; what has no span is left out. Fits 80 columns, and needs no colour."""
    known = tuple(spans)
    origin, rows = phases(known)
    if not rows:
        return Text("no spans of this request were received", style="dim")
    total = max(max(end for _, end in row.intervals) for row in rows)
    root = _longest(known, names.SPAN_GENERATE)
    if root is not None:
        total = max(total, root.end_ns - origin)
    total = max(total, 1)
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False, expand=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(ratio=1, min_width=16)
    table.add_column(style="dim", no_wrap=True)
    for row in rows:
        duration = Text(format_duration(row.duration_ns), style="bold")
        table.add_row(Text(row.label), duration, _Bar(row, total), Text("\n".join(row.notes)))
    table.add_row("", "", _Axis(total), "")
    return Group(_headline(root, total), "", table)


def phases(spans: Sequence[Span]) -> tuple[int, tuple[Row, ...]]:
    """Return the request's start in Unix nanoseconds, and the rows in the order in which they happen."""
    root = _longest(spans, names.SPAN_GENERATE)
    drawn = [span for span in spans if span.name in _DRAWN]
    origin = root.start_ns if root is not None else min((span.start_ns for span in drawn), default=0)
    moments = {event.name: event.time_ns - origin for event in (root.events if root is not None else ())}
    first, second = moments.get(names.EVENT_FIRST_TOKEN), moments.get(names.EVENT_SECOND_TOKEN)

    rows: list[Row | None] = [
        _phase("queue", "yellow", spans, origin, _QUEUE, _queue_notes),
        _phase("prefill", "cyan", spans, origin, (names.SPAN_PREFILL_COMPUTE,), _prefill_notes),
        _phase("KV transfer", "magenta", spans, origin, (names.SPAN_KV_TRANSFER,), _transfer_notes),
    ]
    if first is not None:
        rows.append(Row("first token", "bold green", ((first, first),), first, ("since arrival",)))
    if first is not None and second is not None:
        rows.append(Row("second token", "blue", ((first, second),), second - first, ("after the first",)))
    rows.append(_phase("decode", "green", spans, origin, (names.SPAN_DECODE_STREAM,), _decode_notes))
    return origin, tuple(row for row in rows if row is not None)


_QUEUE: Final = (names.SPAN_DECODE_ADMIT, names.SPAN_PREFILL_QUEUE)
_DRAWN: Final = frozenset({*_QUEUE, names.SPAN_PREFILL_COMPUTE, names.SPAN_KV_TRANSFER, names.SPAN_DECODE_STREAM})


def _phase(
    label: str,
    style: str,
    spans: Sequence[Span],
    origin: int,
    wanted: tuple[str, ...],
    notes: Callable[[list[Span]], tuple[str, ...]],
) -> Row | None:
    """Make the row of all spans with the wanted names; a retried or resumed phase has several."""
    found = sorted((span for span in spans if span.name in wanted), key=lambda span: span.start_ns)
    if not found:
        return None
    if len(wanted) == 1 and len(found) > 1:
        label = f"{label} x{len(found)}"
    intervals = tuple((span.start_ns - origin, span.start_ns - origin + span.duration_ns) for span in found)
    return Row(label, style, intervals, sum(span.duration_ns for span in found), notes(found))


def _queue_notes(spans: list[Span]) -> tuple[str, ...]:
    parts = []
    for name, label in ((names.SPAN_DECODE_ADMIT, "decode"), (names.SPAN_PREFILL_QUEUE, "prefill")):
        found = [span.duration_ns for span in spans if span.name == name]
        if found:
            parts.append(f"{label} {format_duration(sum(found)).removesuffix(' ms')}")
    return (", ".join(parts),)


def _prefill_notes(spans: list[Span]) -> tuple[str, ...]:
    return _token_notes(spans, names.ATTR_PROMPT_TOKENS)


def _decode_notes(spans: list[Span]) -> tuple[str, ...]:
    return _token_notes(spans, names.ATTR_COMPLETION_TOKENS)


def _token_notes(spans: list[Span], attribute: str) -> tuple[str, ...]:
    tokens = sum(_number(span, attribute) for span in spans)
    nanoseconds = sum(span.duration_ns for span in spans)
    if tokens <= 0:
        return ()
    count = f"{tokens:,.0f} {'token' if tokens == 1 else 'tokens'}"
    return (f"{count}, {tokens * 1e9 / nanoseconds:,.0f}/s" if nanoseconds else count,)


def _transfer_notes(spans: list[Span]) -> tuple[str, ...]:
    # Of several attempts the last is the one whose KV was used.
    last = spans[-1]
    size = _number(last, names.ATTR_TRANSFER_BYTES)
    notes = []
    if size > 0:
        rate = f", {format_rate(size * 1e9 / last.duration_ns)}" if last.duration_ns else ""
        notes.append(format_bytes(size) + rate)
    parts = []
    if transport := last.attributes.get(names.ATTR_TRANSFER_TRANSPORT):
        parts.append(str(transport))
    if names.ATTR_TRANSFER_OVERLAPPED_SHARE in last.attributes:
        share = min(1.0, max(0.0, _number(last, names.ATTR_TRANSFER_OVERLAPPED_SHARE)))
        parts.append(f"{share:.0%} overlapped")
    if parts:
        notes.append(", ".join(parts))
    return tuple(notes)


def _headline(root: Span | None, total: int) -> Text:
    text = Text.assemble(("request", "bold"), "  ", (format_duration(total), "bold"))
    if root is None:
        return text
    if model := root.attributes.get(names.ATTR_REQUEST_MODEL):
        text.append(f"  {model}")
    counts = [
        f"{_number(root, attribute):,.0f} {label}"
        for attribute, label in ((names.ATTR_INPUT_TOKENS, "in"), (names.ATTR_OUTPUT_TOKENS, "out"))
        if attribute in root.attributes
    ]
    if counts:
        text.append(f"  tokens: {', '.join(counts)}", style="dim")
    text.truncate(78, overflow="ellipsis")
    return text


def _longest(spans: Sequence[Span], name: str) -> Span | None:
    return max((span for span in spans if span.name == name), key=lambda span: span.duration_ns, default=None)


def _number(span: Span, attribute: str) -> float:
    value = span.attributes.get(attribute, 0)
    return float(value) if isinstance(value, int | float) else 0.0


def format_duration(nanoseconds: int) -> str:
    """Write a duration with three digits or so: 0.04 ms, 8.31 ms, 84.0 ms, 412 ms, 3.20 s."""
    milliseconds = nanoseconds / 1e6
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.2f} s"
    digits = 2 if milliseconds < 10 else 1 if milliseconds < 100 else 0
    return f"{milliseconds:.{digits}f} ms"


def format_bytes(count: float) -> str:
    """Write a number of bytes in decimal units, as the rate beside it is."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def format_rate(bytes_per_second: float) -> str:
    """Write a bandwidth in GB/s."""
    gigabytes = bytes_per_second / 1e9
    return f"{gigabytes:.2f} GB/s" if gigabytes >= 0.01 else f"{gigabytes:.4f} GB/s"


class _Bar:
    """A row's pieces on the time axis, drawn to an eighth of a cell where the terminal can."""

    def __init__(self, row: Row, total: int) -> None:
        self._row = row
        self._total = total

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cells = bar_cells(self._row.intervals, self._total, options.max_width, ascii_only=options.ascii_only)
        yield Segment(cells, Style.parse(self._row.style))


class _Axis:
    """The scale below the bars: its start, middle and end."""

    def __init__(self, total: int) -> None:
        self._total = total

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Segment(axis_cells(self._total, options.max_width), Style(dim=True))


def bar_cells(intervals: Iterable[tuple[int, int]], total: int, width: int, *, ascii_only: bool = False) -> str:
    """Draw intervals of an axis of `total` nanoseconds into `width` cells.

    A piece is never invisible: the shortest one has an eighth of a cell, and a moment is a marker.
    """
    line = [" "] * width
    for start, end in intervals:
        # In eighths of a cell. A block glyph can be cut anywhere on its right side, on its left only in the
        # middle.
        begin = min(width * 8 - 1, max(0, start * width * 8 // total))
        first = begin // 8
        if start == end:
            line[first] = "^" if ascii_only else "◆"
            continue
        stop = min(width * 8, max(begin + 1, round(end * width * 8 / total)))
        for cell in range(first, (stop + 7) // 8):
            filled = min(8, stop - cell * 8)
            late = cell == first and begin % 8 >= 4 and filled == 8
            line[cell] = "#" if ascii_only else "▐" if late else " ▏▎▍▌▋▊▉█"[filled]
    return "".join(line)


def axis_cells(total: int, width: int) -> str:
    """Write the scale: 0, and the middle if there is room, and the end."""
    end, middle = format_duration(total), format_duration(total // 2)
    line = "0".ljust(width - len(end)) + end
    at = (width - len(middle)) // 2
    if at > 2 and at + len(middle) + 2 < width - len(end):
        line = line[:at] + middle + line[at + len(middle) :]
    return line[:width]
