"""What is known of a checkpoint before its weights are read: their size, and whether it needs code of its own."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
import transformers.dynamic_module_utils

from kvbaton.engine.errors import StartupError
from kvbaton.model import loader
from kvbaton.model.checkpoint import weights_bytes
from kvbaton.model.loader import load_model
from kvbaton.model.memory import Memory
from support import tiny_models

MODELING = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny_models.save_tiny_model("llama", tmp_path / "tiny-llama")


def own_code(folder: Path, marker: Path, model_type: str) -> None:
    """Give a Llama checkpoint code of its own, which leaves `marker` when it is run."""
    (folder / "modeling_own.py").write_text(MODELING.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = model_type
    config["architectures"] = ["OwnForCausalLM"]
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))


def test_the_weights_size_is_known_from_the_headers(llama: Path) -> None:
    num_elements = sum(tensor.numel() for tensor in safetensors.torch.load_file(llama / "model.safetensors").values())
    assert weights_bytes(str(llama), None) == weights_bytes(str(llama), torch.float32) == 4 * num_elements
    assert weights_bytes(str(llama), torch.bfloat16) == 2 * num_elements
    assert load_model(str(llama), "bfloat16", "cpu").weights_bytes == 2 * num_elements


def test_whole_numbers_keep_their_width(tmp_path: Path) -> None:
    tensors = {
        "packed": torch.zeros(10, 3, dtype=torch.int8),
        "scale": torch.zeros(10, dtype=torch.float16),
        "small": torch.zeros(4, dtype=torch.float8_e4m3fn),
        "order": torch.zeros(2, dtype=torch.int64),
    }
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert weights_bytes(str(tmp_path), None) == 30 + 20 + 4 + 16
    assert weights_bytes(str(tmp_path), torch.float32) == 30 + 40 + 4 + 16


def test_shards_are_summed(llama: Path) -> None:
    whole = weights_bytes(str(llama), None)
    tensors = safetensors.torch.load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(names)}
    for file in sorted(set(files.values())):
        part = {name: tensors[name] for name in names if files[name] == file}
        safetensors.torch.save_file(part, llama / file, metadata={"format": "pt"})
    (llama / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert weights_bytes(str(llama), None) == whole
    assert load_model(str(llama), "float32", "cpu").weights_bytes == whole


def test_a_checkpoint_without_headers_has_no_known_size(tmp_path: Path) -> None:
    assert weights_bytes(str(tmp_path), None) == 0


def test_weights_that_do_not_fit_are_not_read(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object, **__: object) -> None:
        pytest.fail("it was read")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", read)
    needed = weights_bytes(str(llama), torch.float32)
    monkeypatch.setattr(loader, "memory_of", lambda device: Memory(4 * needed, needed - 1))
    with pytest.raises(StartupError) as caught:
        load_model(str(llama), "float32", "cpu")
    assert str(caught.value).startswith(f"model {str(llama)!r} does not fit: its weights take 0.1 MiB, and cpu has ")


@pytest.mark.parametrize("model_type", ["own", "vit"])
def test_code_of_its_own_is_not_run_unless_it_is_trusted(model_type: str, llama: Path, tmp_path: Path) -> None:
    own_code(llama, tmp_path / "marker", model_type)
    with pytest.raises(StartupError) as caught:
        load_model(str(llama), "float32", "cpu")
    message = str(caught.value)
    assert message.startswith(f"model {str(llama)!r} needs code that comes with it (auto_map in its config.json)")
    assert "--trust-remote-code" in message
    assert not (tmp_path / "marker").exists()


def test_code_of_its_own_is_run_when_it_is_trusted(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    own_code(llama, tmp_path / "marker", "own")
    assert load_model(str(llama), "float32", "cpu", trust_remote_code=True).architecture == "OwnForCausalLM"
    assert (tmp_path / "marker").exists()


def test_code_of_its_own_beside_a_known_architecture_is_not_needed(llama: Path, tmp_path: Path) -> None:
    own_code(llama, tmp_path / "marker", "llama")
    assert load_model(str(llama), "float32", "cpu").architecture == "LlamaForCausalLM"
    assert not (tmp_path / "marker").exists()
