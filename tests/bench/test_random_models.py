"""The benchmark models have the sizes that their names claim, and are the same on every run."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import random_models
from support import tiny_models


@pytest.mark.parametrize(("name", "millions"), [("30m", 29.4), ("0.6b", 473.3), ("8b", 7241.7)])
def test_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(random_models.SHAPES[name])
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.1)
    assert model.config.max_position_embeddings >= 4096


def test_a_seed_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(random_models.SHAPES, "tiny", tiny_models.ARCHITECTURES["qwen3"].config())
    weights = [
        load_file(random_models.save_random_model("tiny", tmp_path / str(n), seed) / "model.safetensors")
        for n, seed in enumerate([1, 1, 2])
    ]
    assert {tensor.dtype for tensor in weights[0].values()} == {torch.bfloat16}
    name = "model.layers.2.self_attn.q_proj.weight"
    assert torch.equal(weights[0][name], weights[1][name])
    assert not torch.equal(weights[0][name], weights[2][name])
