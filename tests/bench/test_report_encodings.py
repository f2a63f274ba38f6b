"""Of each encoding the page says what part of the pool's bytes travels, and how far answers move."""

from typing import Any

import report_encodings


def row(system: str, metric: str, value: float) -> dict[str, Any]:
    return {"case": "a", "system": system, "metric": metric, "value": value, "unit": ""}


def test_sizes_are_parts_of_what_lies_in_the_pool() -> None:
    figures = {"mean": 0.01, "p99": 0.1, "max": 0.25, "encode": 2.0, "decode": 3.0}
    rows = [row("bfloat16", "bytes per token", 1000), row("int8", "bytes per token", 516)]
    rows += [row("int8", metric, value) for metric, value in figures.items()]
    _, _, plain, int8 = report_encodings.table(rows)
    assert plain == "| a | as it is | 1,000 | 100 % | – | – | – | – | – |"
    assert int8 == "| a | int8 | 516 | 52 % | 0.0100 | 0.1000 | 0.2500 | 2.0 | 3.0 |"
