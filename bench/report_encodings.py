"""The section of docs/benchmarks.md about encodings of KV."""

from typing import Any

SECTION = """\
## KV that is converted on its way

`{command}`, {date}, commit {commit}: {processor}. What `--kv-encoding` saves and costs: bytes of KV per token of
the prompt, and the absolute difference Δ between an answer's log-probabilities on KV that was converted and on KV that
was not, teacher-forced: {num_prompts} prompts of {num_tokens} tokens, and of each answer the {num_forced} tokens after
the first, which the prefill worker samples. *baton-tiny* reads stories like those it was trained on, answers are its
own at temperature 1; *30m* has random weights. Conversion is of one core, in GB of KV in memory a second, with its
blocks gathered and a payload allocated.

{table}

int8 and float8 (e4m3) have a bfloat16 scale for each token and head of K and of V. At the same size int8 is the nearer
one, since a head's elements do not differ by the powers of two that float8 spends its bits on.
"""


def section(result: dict[str, Any]) -> str:
    """The whole section."""
    header = result["header"]
    return SECTION.format(**header, num_forced=header["num_answer"] - 1, table="\n".join(table(result["rows"])))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines: one for each model and encoding, in the order of the rows."""
    lines = [
        "| model and pool | encoding | bytes per token | of the pool's | mean Δ | p99 | max | encode | decode |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        cells.setdefault((row["case"], row["system"]), {})[row["metric"]] = row["value"]
    whole = {case: figures["bytes per token"] for (case, _), figures in reversed(cells.items())}
    for (case, encoding), figures in cells.items():
        size = figures["bytes per token"]
        shown = [f"{size:,.0f}", f"{100 * size / whole[case]:.0f} %"]
        shown += [f"{figures[name]:.4f}" if name in figures else "–" for name in ("mean", "p99", "max")]
        shown += [f"{figures[name]:.1f}" if name in figures else "–" for name in ("encode", "decode")]
        name = encoding if "mean" in figures else "as it is"
        lines.append("| " + " | ".join([case, name, *shown]) + " |")
    return lines
