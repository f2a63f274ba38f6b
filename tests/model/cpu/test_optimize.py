"""What is replaced in a model, and what is not: only a part that gives the same."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from kvbaton.model.attention import PagedAttention
from kvbaton.model.cpu.attention import CpuAttention
from kvbaton.model.cpu.decoder import compiled_decoder
from kvbaton.model.cpu.layer import CompiledLayer
from kvbaton.model.cpu.linear import PackedLinear, can_pack
from kvbaton.model.cpu.modules import CompiledRmsNorm, FusedGatedMlp
from kvbaton.model.cpu.optimize import optimize
from support import tiny_models

packs = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="no oneDNN kernels for bfloat16 here")
ROUNDING = 0.05
"""How far apart bfloat16 leaves the logits of wide random weights; a wrong layer is further off than their norm."""

TOKENS = torch.tensor([[5, 9, 11, 3, 40, 41, 42]])


def loaded(architecture: str, folder: Path, dtype: torch.dtype, **overrides: Any) -> tuple[Any, PagedAttention]:
    """A model on the CPU's attention, after its trial."""
    tiny_models.save_tiny_model(architecture, folder, **overrides)
    attention = PagedAttention(CpuAttention())
    attention.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention.name)
    logits(model)
    return model, attention


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    positions = torch.arange(TOKENS.shape[1])[None]
    result: torch.Tensor = model(input_ids=TOKENS, position_ids=positions, use_cache=False).logits[0].float()
    return result


def kinds(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(type(module) is kind for module in model.modules())


@packs
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_common_layers_become_one(architecture: str, tmp_path: Path) -> None:
    model, attention = loaded(architecture, tmp_path, torch.bfloat16)
    before = logits(model)
    optimize(model, attention)
    assert kinds(model, CompiledLayer) == model.config.num_hidden_layers
    assert compiled_decoder(model) is not None
    assert (logits(model) - before).norm() / before.norm() < ROUNDING


@packs
def test_other_layers_get_faster_parts(tmp_path: Path) -> None:
    model, attention = loaded("gemma3", tmp_path, torch.bfloat16)
    before = logits(model)
    optimize(model, attention)
    assert kinds(model, CompiledLayer) == 0
    assert compiled_decoder(model) is None
    assert kinds(model, FusedGatedMlp) == model.config.num_hidden_layers
    assert kinds(model, CompiledRmsNorm) == 6 * model.config.num_hidden_layers + 1
    assert (logits(model) - before).norm() / before.norm() < ROUNDING


def test_float32_keeps_its_linear_layers(tmp_path: Path) -> None:
    model, attention = loaded("llama", tmp_path, torch.float32)
    before = logits(model)
    optimize(model, attention)
    assert kinds(model, PackedLinear) == kinds(model, CompiledLayer) == 0
    assert kinds(model, CompiledRmsNorm) == 2 * model.config.num_hidden_layers + 1
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


class ShiftedRMSNorm(nn.Module):
    """Looks like the usual norm, and is another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32, dtype=torch.bfloat16))
        self.variance_epsilon = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, (32,), self.weight, 1e-6) + 0.1


@packs
def test_a_part_that_gives_something_else_stays(tmp_path: Path) -> None:
    model, attention = loaded("llama", tmp_path, torch.bfloat16)
    layer = model.model.layers[1]
    layer.post_attention_layernorm = ShiftedRMSNorm()
    plain = layer.forward
    model.model.layers[0].forward = lambda *args, **kwargs: 2 * plain(*args, **kwargs)
    optimize(model, attention)
    assert isinstance(model.model.layers[1], CompiledLayer), "its norm stayed, and the rest is as usual"
    assert kinds(model, ShiftedRMSNorm) == 1
    assert not isinstance(model.model.layers[0], CompiledLayer), "its forward pass is not the usual one"
    assert compiled_decoder(model) is None


@packs
def test_a_layer_that_changes_far_into_the_context_stays(tmp_path: Path) -> None:
    model, attention = loaded("llama", tmp_path, torch.bfloat16)
    layer = model.model.layers[1]
    plain = layer.forward

    def forward(hidden: torch.Tensor, position_ids: torch.Tensor | None = None, **named: Any) -> torch.Tensor:
        output: torch.Tensor = plain(hidden, position_ids=position_ids, **named)
        return output if position_ids is None else output * (1 + (position_ids > 100).to(output.dtype))[..., None]

    layer.forward = forward
    optimize(model, attention)
    assert not isinstance(model.model.layers[1], CompiledLayer)
    assert kinds(model, CompiledLayer) == 2


@packs
def test_a_part_that_clamps_what_is_large_stays(tmp_path: Path) -> None:
    model, attention = loaded("llama", tmp_path, torch.bfloat16)
    mlp = model.model.layers[1].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x.clamp(-9, 9))
    optimize(model, attention)
    assert kinds(model, FusedGatedMlp) == 2


@packs
def test_a_layer_that_changes_little_is_replaced(tmp_path: Path) -> None:
    # As trained ones: what they add is small beside what goes through, whose rounding is no difference.
    model, attention = loaded("llama", tmp_path, torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.001
            layer.mlp.down_proj.weight *= 0.0005
    optimize(model, attention)
    assert kinds(model, CompiledLayer) == 3


@packs
def test_parts_in_float32_within_a_bfloat16_model(tmp_path: Path) -> None:
    model, attention = loaded("llama", tmp_path, torch.bfloat16, hidden_size=64)
    model.model.norm.float()
    model.lm_head.float()
    before = logits(model)
    optimize(model, attention)
    assert type(model.lm_head) is nn.Linear
    assert (logits(model) - before).norm() / before.norm() < ROUNDING


@packs
def test_layers_that_are_called_twice(tmp_path: Path) -> None:
    model, attention = loaded("gemma3", tmp_path, torch.bfloat16)
    layers = model.model.layers
    layers[2].forward = lambda *args, **named: layers[0].forward(*args, **named)
    before = logits(model)
    optimize(model, attention)
    assert (logits(model) - before).norm() / before.norm() < ROUNDING


@packs
def test_models_that_scale_their_logits_keep_their_own_loop(tmp_path: Path) -> None:
    model, attention = loaded("llama", tmp_path, torch.bfloat16)

    def halve(_: nn.Module, __: Any, output: Any) -> None:
        output.logits = output.logits * 0.5

    model.register_forward_hook(halve)
    optimize(model, attention)
    assert kinds(model, CompiledLayer) == 3
    assert compiled_decoder(model) is None


@packs
def test_weights_are_never_in_memory_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, attention = loaded("gemma3", tmp_path, torch.bfloat16)
    first, alive = weakref.ref(model.model.layers[0].mlp), []

    def fused(*args: Any) -> FusedGatedMlp:
        alive.append(first() is not None)
        return FusedGatedMlp(*args)

    monkeypatch.setattr("kvbaton.model.cpu.optimize.FusedGatedMlp", fused)
    optimize(model, attention)
    assert alive == [True, False, False]
