"""The benchmark for a GPU counts bytes and operations as it says, and says so where there is no GPU."""

import engine_cuda
import pytest
import torch
import transformers

from kvbaton.engine.geometry import KvGeometry, LayerGeometry

CONFIG = transformers.Qwen3Config(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=6,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=2,
    tie_word_embeddings=False,
)
# Query, key, value and output; gate, up and down; two norms, and one each for query and key.
LAYER = 4 * 4 + 2 * (4 * 2) + 4 * 4 + 3 * (4 * 6) + 2 * 4 + 2 * 2
LAST_NORM = 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        engine_cuda.main(["--models", "0.6b"])
    assert caught.value.code == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_every_weight_is_read_but_the_embeddings() -> None:
    model = transformers.AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    assert engine_cuda.layer_parameters(model) == 2 * LAYER + LAST_NORM
    assert engine_cuda.read_weights(model) == 2 * (2 * LAYER + LAST_NORM + 10 * 4)


def test_a_decode_step_reads_weights_and_kv() -> None:
    geometry = KvGeometry((LayerGeometry(2, 3, 3),) * 2, "bfloat16")
    assert engine_cuda.decode_bytes(1000, geometry, batch=5, context=7) == 1000 + 5 * 7 * (2 * 2 * 6 * 2)


def test_a_prompts_operations() -> None:
    # Two products of a query with each key that it sees: 1 + 2 + 3 pairs.
    attention = 2 * 2 * (2 * 2) * 2 * 6
    assert engine_cuda.prefill_flops(CONFIG, 100, batch=5, prompt=3) == 5 * (2 * 100 * 3 + attention + 2 * 10 * 4)
