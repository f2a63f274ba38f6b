"""The sections of docs/benchmarks.md about the hand-off, and their chart."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

HANDOFF = """\
## KV from pool to pool

`{command}`, {date}, commit {commit}: {processor}, Linux {kernel}; NIXL {nixl}, Mooncake {mooncake}.

Two processes, the prefill side on core {first_core} and the decode side on core {last_core}, each with a KV pool of the
0.6b model's shape (28 layers, 8 KV heads of 128, bfloat16, blocks of 16 tokens). All systems take turns; medians of
{rounds} rounds after one to warm up, in which every byte that had arrived was compared. A transfer begins with what a
request knows, its block lists, and ends when the decode side knows that all of it is in its pool; kvbaton's end when
the prefill side has read *Applied*, which is later. *In order*: the blocks follow one another, as in a fresh pool;
*shuffled*: they lie anywhere, as in one that has been in use.

Over sockets, GB/s. Raw TCP is one stream from pool to pool, `sendmsg` and `recvmsg_into` in pieces of 1 or 4 MiB, of
which the better counts, and nothing else: no framing, no checksum. kvbaton's column has everything that its services
do: two CRC32C of every byte, order and coverage checks, tickets, gRPC's wire format.

{sockets}

Within a host, GB/s. memcpy is one thread between two pools, run by run, and CRC32C one that reads a pool. kvbaton's
column has all of both: the prefill side checksums, the decode side copies and checksums at once, and what was copied
is confirmed. NIXL uses what UCX chooses when it may choose anything, and checks nothing.

{memory}

![GB/s from pool to pool](benchmarks-handoff.svg)

Processor time, user's and kernel's, of all threads, in seconds for a GB: prefill side + decode side. NIXL's two sides
poll while they wait, and so does whoever uses it.

{cpu}

Of four ways to use NIXL the best counts in each case: the prefill side writes, and a notification behind the data tells
the decode side; or the decode side reads; either with a prepared descriptor for each block, layer, K and V, as vLLM
does it, or with descriptors that are made for each transfer, of the runs of blocks that follow one another. Its
progress thread, which is on by default, is off: with it, on one core a side, NIXL was up to twenty times slower.
Mooncake has its connection pool on and slices of 1 MiB, and the writer tells the reader through a socket, as SGLang
does.
"""

LATENCY = """\
## From a prompt's end to its first decode step

`{command}`, {date}, commit {commit}, same machine: a router, a prefill worker on core {first_core} and a decode
worker on core {last_core}, as `kvbaton up` starts them; random-weight models, prompts of 2,048 random tokens, one
request at a time. The figures are those of each request's own trace (`docs/observability.md`). *Hand-off*: from the
prompt's end on the prefill worker (its last layer computed, its first token sampled) to the start of the decode
worker's first step; *KV in place*: the part of it until that worker's engine knows that all KV is verified and in its
blocks. *Transfer*: from the first frame to *Applied*; *hidden*: the share of it that passed while the prompt was still
being computed. *Last layer*: its KV over the link, at the rate of 8 MiB in the tables above; the rest can have left
before. Milliseconds.

{table}

The spans' times are Unix times of one steady clock in each process, which on one host differ by no more than the wall
clock was stepped between the processes' starts: {clock_step_microseconds:.1f} µs during this run.
"""

OVER_SOCKETS = ("raw TCP", "kvbaton grpc", "NIXL TCP", "Mooncake TCP")
IN_MEMORY = ("memcpy", "kvbaton shared_memory", "NIXL shared memory")
_COLOURS = {
    "raw TCP": "#495057",
    "kvbaton grpc": "#0b7285",
    "NIXL TCP": "#f08c00",
    "Mooncake TCP": "#ae3ec9",
    "memcpy": "#adb5bd",
    "kvbaton shared_memory": "#3bc9db",
    "NIXL shared memory": "#ffd43b",
}

Rows = Sequence[Mapping[str, Any]]


def section(result: Mapping[str, Any]) -> str:
    """What bench/handoff.py measured."""
    header, rows = result["header"], result["rows"]
    return HANDOFF.format(
        **header,
        first_core=header["cores"][0],
        last_core=header["cores"][-1],
        sockets="\n".join(rate_table(rows, OVER_SOCKETS, ours="kvbaton grpc")),
        memory="\n".join(rate_table(rows, IN_MEMORY, ours="kvbaton shared_memory", beside=["CRC32C"])),
        cpu="\n".join(cpu_table(rows)),
    )


def latency_section(result: Mapping[str, Any]) -> str:
    """What bench/handoff_latency.py measured."""
    header, rows = result["header"], result["rows"]
    return LATENCY.format(
        **header,
        first_core=header["cores"][0],
        last_core=header["cores"][-1],
        table="\n".join(latency_table(rows)),
    )


def latency_table(rows: Rows) -> list[str]:
    """Markdown lines: one row for each model and transport."""
    columns = {
        "requests": None,
        "hand-off p50": "hand-off p50",
        "p99": "hand-off p99",
        "KV in place p50": "until the KV is in place p50",
        "last layer": "allowance",
        "hidden, %": "hidden share p50",
        "transfer p50": "transfer p50",
        "prefill p50": "prefill p50",
    }
    lines = ["| | | " + " | ".join(columns) + " |", "|---|---|" + "--:|" * len(columns)]
    for case, system in dict.fromkeys((row["case"], row["system"]) for row in rows):
        cells = [
            case,
            system,
            next(str(row["requests"]) for row in rows if (row["case"], row["system"]) == (case, system)),
        ]
        cells += [shown(value(rows, case, system, metric)) for metric in columns.values() if metric]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def rate_table(rows: Rows, systems: Sequence[str], ours: str, beside: Sequence[str] = ()) -> list[str]:
    """Markdown lines: GB/s of each system in each case, and how many times another's rate ours is."""
    others = [system for system in systems if system != ours]
    head = ["", *systems, *beside, *(f"{ours} ÷ {other}" for other in others)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for case in _cases(rows):
        values = {system: value(rows, case, system, "rate") for system in (*systems, *beside)}
        cells = [case, *(shown(each) for each in values.values())]
        for other in others:
            known = values[ours] and values[other]
            cells.append(f"**{values[ours] / values[other]:.2f}**" if known else "–")  # type: ignore[operator]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def cpu_table(rows: Rows) -> list[str]:
    """Markdown lines: the processor time of both sides of each system in each case."""
    systems = [*OVER_SOCKETS, *IN_MEMORY[1:]]
    lines = ["| | " + " | ".join(systems) + " |", "|---|" + "--:|" * len(systems)]
    for case in _cases(rows):
        cells = [case]
        for system in systems:
            both = [value(rows, case, system, metric) for metric in ("prefill CPU", "decode CPU")]
            cells.append(" + ".join(shown(each) for each in both) if both[0] is not None else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def chart(result: Mapping[str, Any]) -> str:
    """An SVG of bars: GB/s of each system, where blocks are in order."""
    rows: Rows = result["rows"]
    groups: list[tuple[str, dict[str, float]]] = []
    for case in _cases(rows):
        rates = [(system, value(rows, case, system, "rate")) for system in _COLOURS]
        if case.endswith("in order"):
            groups.append((case.partition(",")[0], {name: rate for name, rate in rates if rate is not None}))
    bar, gap, left, width, legend = 11, 12, 80, 760, 48
    longest = max((rate for _, bars in groups for rate in bars.values()), default=1.0)
    scale = (width - left - 50) / longest
    height = legend + sum(len(bars) * bar + gap for _, bars in groups)
    size = f'width="{width}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for index, (system, colour) in enumerate(_COLOURS.items()):
        x, y = left + index % 4 * 165, 8 + index // 4 * 16
        parts.append(f'<rect x="{x}" y="{y}" width="11" height="11" fill="{colour}"/>')
        parts.append(f'<text x="{x + 16}" y="{y + 10}" fill="#212529">{system}</text>')
    top = legend
    for label, bars in groups:
        middle = top + len(bars) * bar / 2 + 4
        parts.append(f'<text x="{left - 8}" y="{middle:.0f}" text-anchor="end" fill="#212529">{label}</text>')
        for system, rate in bars.items():
            length = rate * scale
            parts.append(
                f'<rect x="{left}" y="{top}" width="{length:.1f}" height="{bar - 2}" fill="{_COLOURS[system]}"/>'
            )
            parts.append(f'<text x="{left + length + 4:.1f}" y="{top + 9}" font-size="10">{rate:.2f}</text>')
            top += bar
        top += gap
    return "\n".join([*parts, "</svg>", ""])


def value(rows: Rows, case: str, system: str, metric: str) -> float | None:
    """Of one row; None when it was not measured."""
    keys = ("case", "system", "metric")
    found = (row["value"] for row in rows if tuple(row[key] for key in keys) == (case, system, metric))
    return next(found, None)


def shown(number: float | None) -> str:
    """With two digits after the point, or none when it is large; a dash for what was not measured."""
    if number is None:
        return "–"
    return f"{number:,.0f}" if number >= 1000 else f"{number:.2f}"


def _cases(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["case"] for row in rows))
