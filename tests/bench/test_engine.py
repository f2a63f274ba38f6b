"""What the engine's benchmark takes for the machine's limit counts every weight and every token's KV once."""

import engine
import pytest
import transformers

import random_models

CONFIG = transformers.Qwen3Config(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=6,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=2,
)
# Query and output, key and value; gate, up and down.
LAYER = 2 * (4 * 4) + 2 * (4 * 2) + 3 * (4 * 6)


def test_sizes() -> None:
    assert engine._sizes(CONFIG) == (2 * LAYER + 10 * 4, 2 * 2 * 2 * 2, 2 * LAYER)


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(random_models.SHAPES, "tiny", CONFIG)
    rows = {(row["case"], row["metric"]): row["value"] for row in engine.roofline("tiny", read=1e3, gemm=1e6)}
    weights, kv = 2 * (2 * LAYER + 40), 16
    assert rows["tiny, 512 tokens", "decode step"] == pytest.approx(1e3 * (weights + 512 * kv) / 1e3)
    assert rows["tiny, 8 x 512 tokens", "decode step"] == pytest.approx(1e3 * (weights + 8 * 512 * kv) / 1e3)
    # Causal attention of 512 tokens: on average 256 keys, two products of 2 x 2 elements, two operations each.
    attention = 2 * 2 * (256 * 2 * 2 * 2)
    assert rows["tiny, 512 tokens", "prefill"] == pytest.approx(1e6 / (2 * 2 * LAYER + attention))
