"""A model that is missing, broken, or would answer wrongly, is refused in one line that says which and why."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from kvbaton.engine.errors import StartupError
from kvbaton.engine.geometry import LayerGeometry
from kvbaton.model.cpu.linear import can_pack
from kvbaton.model.loader import load_model
from support import tiny_models
from support.refused_models import NOT_CAUSAL, REFUSED


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny_models.save_tiny_model("llama", tmp_path / "tiny-llama")


def refusal(path: str | Path, dtype: str = "float32", device: str = "cpu") -> str:
    """The message, which is one line for an operator to read."""
    with pytest.raises(StartupError) as caught:
        load_model(str(path), dtype, device)
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def test_a_model_is_known_by_what_it_is(llama: Path) -> None:
    loaded = load_model(str(llama), "float32", "cpu")
    assert loaded.architecture == "LlamaForCausalLM"
    assert loaded.geometry.layers == (LayerGeometry(2, 8, 8),) * 3
    assert loaded.geometry.dtype == "float32"
    assert (loaded.vocab_size, loaded.max_model_len) == (97, 256)
    assert loaded.eos_token_ids == {2}


@pytest.mark.parametrize("path", ["/no/such/model", "./no-such-model", "no-such-model", "~/no-such-model", "a/b/c"])
def test_a_missing_directory(path: str) -> None:
    assert refusal(path) == f"model directory {path!r} does not exist"


def test_a_hub_name_that_is_not_to_be_had() -> None:
    assert refusal("kvbaton-tests/no-such-model").startswith("model 'kvbaton-tests/no-such-model' cannot be loaded: ")


def test_the_home_directory_is_expanded(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(llama.parent))
    assert load_model(f"~/{llama.name}", "float32", "cpu").vocab_size == 97


def test_an_empty_directory(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"model {str(tmp_path)!r} cannot be loaded: ")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00not json at all"),
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "no-such-architecture"}'),
    ],
)
def test_a_broken_file(llama: Path, file: str, content: bytes) -> None:
    (llama / file).write_bytes(content)
    assert refusal(llama).startswith(f"model {str(llama)!r} cannot be loaded: ")


def test_a_truncated_weights_file(llama: Path) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(llama).startswith(f"model {str(llama)!r} cannot be loaded: ")


def test_a_missing_weight_is_named(llama: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_weights(llama, lambda tensors: tensors.__delitem__(name))
    assert refusal(llama) == f"model {str(llama)!r} lacks 1 of its weights, for example {name}"


def test_a_weight_of_the_wrong_shape_is_no_start(llama: Path) -> None:
    edit_weights(llama, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    assert str(llama) in refusal(llama)


@pytest.mark.parametrize("dtype", ["float16", "int8", "", "torch.float32"])
def test_an_unknown_dtype(llama: Path, dtype: str) -> None:
    assert refusal(llama, dtype) == f"dtype {dtype!r} is not one of ['bfloat16', 'float32'] or 'auto'"


def test_a_checkpoint_s_own_dtype_that_kv_is_not_held_in(llama: Path) -> None:
    edit_weights(llama, lambda tensors: tensors.update({k: t.half() for k, t in tensors.items()}))
    edit_json(llama / "config.json", dtype="float16")
    assert "has dtype float16; choose one of" in refusal(llama, "auto")
    assert load_model(str(llama), "float32", "cpu").geometry.dtype == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_bfloat16(llama: Path, dtype: str) -> None:
    edit_weights(llama, lambda tensors: tensors.update({k: t.bfloat16() for k, t in tensors.items()}))
    edit_json(llama / "config.json", dtype="bfloat16")
    loaded = load_model(str(llama), dtype, "cpu")
    assert loaded.geometry.dtype == "bfloat16"
    row = torch.zeros(1, 1, dtype=torch.long)
    assert loaded.forward(row, row, row[0]).dtype == torch.bfloat16


def test_an_unknown_device(llama: Path) -> None:
    assert refusal(llama, device="abacus") == "device 'abacus' is not known to torch"


def test_a_device_that_is_not_there(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no CUDA device" in refusal(llama, device="cuda")


@pytest.mark.filterwarnings("ignore")  # transformers' own, while it makes these models
@pytest.mark.parametrize("architecture", list(REFUSED))
def test_a_model_that_would_answer_wrongly_is_refused(architecture: str, tmp_path: Path) -> None:
    refused = REFUSED[architecture]
    model = transformers.AutoModelForCausalLM.from_config(refused.config(), dtype=torch.float32)
    assert type(model).__name__ == architecture
    model.save_pretrained(tmp_path)
    expected = f"model {str(tmp_path)!r} ({architecture}) cannot be served: {refused.reason}"
    assert refusal(tmp_path).startswith(expected)


@pytest.mark.parametrize("architecture", list(NOT_CAUSAL))
def test_a_model_of_another_kind_is_refused_before_its_weights_are_looked_for(
    architecture: str, tmp_path: Path
) -> None:
    refused = NOT_CAUSAL[architecture]
    config = refused.config()
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    assert refusal(tmp_path) == f"model {str(tmp_path)!r} ({architecture}) cannot be served: {refused.reason}"


def test_equal_models_have_equal_digests_and_others_do_not(llama: Path) -> None:
    def digest() -> str:
        return load_model(str(llama), "float32", "cpu").weights_digest

    first = digest()
    assert digest() == first
    in_float32, in_bfloat16 = (load_model(str(llama), dtype, "cpu") for dtype in ("float32", "bfloat16"))
    assert in_bfloat16.weights_digest != first
    assert in_bfloat16.rounded_digest == in_float32.rounded_digest != first
    edit_weights(llama, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"] * 1.001}))
    changed = digest()
    assert changed != first
    edit_weights(llama, lambda tensors: tensors["model.norm.weight"][-1].add_(1))
    assert digest() not in (first, changed)


@pytest.mark.parametrize(("eos", "expected"), [(5, {5}), ([5, 6, 7], {5, 6, 7}), (None, {2})])
def test_eos_ids_come_from_the_generation_config_first(llama: Path, eos: Any, expected: set[int]) -> None:
    edit_json(llama / "generation_config.json", eos_token_id=eos)
    assert load_model(str(llama), "float32", "cpu").eos_token_ids == expected


def test_a_model_without_eos_has_none(llama: Path) -> None:
    edit_json(llama / "generation_config.json", eos_token_id=None)
    edit_json(llama / "config.json", eos_token_id=None)
    assert load_model(str(llama), "float32", "cpu").eos_token_ids == frozenset()


def test_a_model_that_does_not_bear_faster_parts_is_served_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # As some do: their last layer is given what its weight's dtype asks for. A packed weight cannot be looked at.
    folder = tiny_models.save_tiny_model("gemma3", tmp_path, hidden_size=64)
    plain = transformers.Gemma3ForCausalLM.forward

    def forward(model: Any, *args: Any, **named: Any) -> Any:
        assert model.lm_head.weight.dtype is torch.bfloat16
        return plain(model, *args, **named)

    monkeypatch.setattr(transformers.Gemma3ForCausalLM, "forward", forward)
    loaded = load_model(str(folder), "bfloat16", "cpu")
    with torch.inference_mode():
        logits = loaded.forward(torch.tensor([[5, 6]]), torch.tensor([[0, 1]]), torch.tensor([1]))
    assert logits.shape == (1, 97)
    assert ("served as it is" in caplog.text) == can_pack(torch.bfloat16)
