"""The page says who is faster the right way round, and of what was not measured it says that."""

from typing import Any

import report


def row(case: str, metric: str, system: str, value: float) -> dict[str, Any]:
    return {"case": case, "metric": metric, "system": system, "value": value, "unit": ""}


def result(*, vllm: bool) -> dict[str, Any]:
    rows = [
        row("a", "prefill", "kvbaton", 300.0),
        row("a", "prefill", "transformers", 100.0),
        row("a", "prefill", "roofline", 400.0),
        row("a", "decode step", "kvbaton", 5.0),
        row("a", "decode step", "transformers", 20.0),
        row("a", "decode step", "roofline", 2.5),
    ]
    if vllm:
        rows += [row("a", "prefill", "vllm", 150.0), row("a", "decode step", "vllm", 4.0)]
    return {"header": {}, "rows": rows}


def test_a_rate_is_better_when_large_and_a_time_when_small() -> None:
    _, _, prefill, decode = report.engine_table(result(vllm=True))
    assert prefill == "| a | prefill, tok/s | 300 | 150 | 100 | **2.00** | **3.00** | 75 % |"
    assert decode == "| a | decode step, ms | 5.0 | 4.0 | 20.0 | **0.80** | **4.00** | 50 % |"


def test_what_was_not_measured() -> None:
    _, _, prefill, _ = report.engine_table(result(vllm=False))
    assert prefill == "| a | prefill, tok/s | 300 | – | 100 | – | **3.00** | 75 % |"


def test_bars_are_relative_to_vllm() -> None:
    picture = report.chart(result(vllm=True))
    assert picture.startswith("<svg ")
    for ratio in ("2.00", "1.00", "0.67", "0.80", "0.20"):
        assert f">{ratio}</text>" in picture


def test_a_page_without_results_has_a_title_alone() -> None:
    assert report.page(None, None) == report.TITLE
