"""Position embeddings that depend on the longest sequence of a batch end where they would begin to."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvbaton.engine.errors import StartupError
from kvbaton.model.loader import LoadedModel, load_model
from kvbaton.model.trial import context_length
from support import tiny_models

LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


@torch.inference_mode()
def logits(loaded: LoadedModel, positions: range) -> torch.Tensor:
    """Of the first position, with plain attention over tokens at `positions`."""
    loaded.attention.store = loaded.attention.batch = None
    ids, places = torch.arange(len(positions))[None] + 3, torch.tensor([list(positions)])
    output: torch.Tensor = loaded.model(input_ids=ids, position_ids=places, use_cache=False).logits
    return output[0, 0]


def test_other_models_have_their_whole_context(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_model(str(tiny_models.save_tiny_model("llama", tmp_path)), "float32", "cpu")
    assert loaded.max_model_len == 256
    assert "capped" not in caplog.text


@pytest.mark.parametrize(("architecture", "cap"), [("phi3_long", 128), ("llama_dynamic", 256)])
def test_the_context_is_capped_and_told(
    architecture: str, cap: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_model(str(tiny_models.save_tiny_model(architecture, tmp_path)), "float32", "cpu")
    assert loaded.max_model_len == cap
    told = [record for record in caplog.records if record.name == "kvbaton.model.trial"]
    assert [record.levelno for record in told] == [logging.WARNING]
    assert f"beyond {cap} tokens depend on the longest sequence of a batch" in told[0].getMessage()


@pytest.mark.parametrize("architecture", ["phi3_long", "llama_dynamic"])
def test_a_long_sequence_leaves_the_others_of_its_batch_alone(architecture: str, tmp_path: Path) -> None:
    loaded = load_model(str(tiny_models.save_tiny_model(architecture, tmp_path)), "float32", "cpu")
    # Beyond every cap: nothing here may change the frequencies, of this pass or of later ones.
    assert torch.equal(logits(loaded, range(7, 9)), logits(loaded, range(7, 9)))
    before = logits(loaded, range(7, 9))
    logits(loaded, range(400, 403))
    assert torch.equal(logits(loaded, range(7, 9)), before)
    untouched = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        theirs = untouched(torch.arange(2)[None] + 3, position_ids=torch.tensor([[7, 8]]), use_cache=False).logits
    torch.testing.assert_close(before, theirs[0, 0])


def test_each_type_of_layer_may_have_its_own(tmp_path: Path) -> None:
    rope: dict[str, Any] = {
        "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    folder = tiny_models.save_tiny_model("gemma3", tmp_path, rope_parameters=rope)
    loaded = load_model(str(folder), "float32", "cpu")
    assert loaded.max_model_len == 256
    kinds = [module.rope_type for module in loaded.model.modules() if hasattr(module, "rope_type")]
    assert kinds == [{"full_attention": "default", "sliding_attention": "default"}]


def test_position_embeddings_of_a_model_s_own_making_are_refused(tmp_path: Path) -> None:
    loaded = load_model(str(tiny_models.save_tiny_model("llama", tmp_path)), "float32", "cpu")
    loaded.model.config.rope_parameters = LONGROPE | {"original_max_position_embeddings": 32}
    with pytest.raises(StartupError, match="it has longrope position embeddings of its own"):
        context_length(loaded.model, "a-model")
