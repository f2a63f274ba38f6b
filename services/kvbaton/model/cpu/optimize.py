"""Replaces parts of a loaded model by faster ones for a CPU, each only when it gives what the part itself gave.

Nothing here knows an architecture. A module is recognised by what it is made of, and its replacement is tried out
against it on random input before it takes its place; what differs stays as it was.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from kvbaton.model.attention import PagedAttention
from kvbaton.model.cpu.layer import CompiledLayer, looks_common
from kvbaton.model.cpu.linear import PackedLinear, SharedInput, SharedInputMember, can_pack
from kvbaton.model.cpu.modules import CompiledRmsNorm, FusedGatedMlp

logger = logging.getLogger(__name__)

_SAME_INPUT = ("q_proj", "k_proj", "v_proj")
_GATED_MLP = ("gate_proj", "up_proj", "down_proj")
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
_TRIAL_ROWS = 3
_MIN_PACKED_FEATURES = 64
"""A layer smaller than this is bound by the call, not by its weights."""


@torch.inference_mode()
def optimize(model: nn.Module, attention: PagedAttention) -> None:
    """Replace what can be replaced in `model`, whose parameters are all on the CPU and whose layers use `attention`.

    It can no longer be saved.
    """
    generator = torch.Generator().manual_seed(0)
    _replace(model, _faster_norm, generator)
    if can_pack(next(model.parameters()).dtype):
        _replace(model, _faster_mlp, generator)
        _replace_layers(model, attention, generator)
        for _, parent in list(model.named_modules()):
            _share_input(parent, generator)
        _replace(model, _faster_linear, generator)


def _replace(model: nn.Module, make: Callable[[nn.Module, str], nn.Module | None], generator: torch.Generator) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            faster = make(child, name)
            if faster is None:
                continue
            weight = next(child.parameters())
            rows = _trial(weight.shape[-1], weight.dtype, generator)
            if _agree(child, faster, lambda part, rows=rows: part(rows)):  # type: ignore[misc]
                setattr(parent, name, faster)


def _faster_norm(module: nn.Module, _: str) -> nn.Module | None:
    weight = getattr(module, "weight", None)
    epsilon = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, nn.Parameter) or epsilon is None:
        return None
    # Gemma stores the factor less one.
    candidates = [CompiledRmsNorm(weight + offset, float(epsilon)) for offset in (0.0, 1.0)]
    rows = _trial(weight.shape[-1], weight.dtype, torch.Generator().manual_seed(0))
    return next((c for c in candidates if _agree(module, c, lambda part: part(rows))), None)


def _faster_mlp(module: nn.Module, _: str) -> nn.Module | None:
    linears = _linears([getattr(module, name, None) for name in _GATED_MLP])
    others = {name for name, _ in module.named_children()} - {*_GATED_MLP, "act_fn"}
    if len(linears) != len(_GATED_MLP) or others or not hasattr(module, "act_fn"):
        return None
    gate, up, down = linears
    return FusedGatedMlp(gate, up, down, module.act_fn)


def _replace_layers(model: Any, attention: PagedAttention, generator: torch.Generator) -> None:
    decoder = model.get_decoder()
    rotary, layers = getattr(decoder, "rotary_emb", None), getattr(decoder, "layers", None)
    if rotary is None or not isinstance(layers, nn.ModuleList):
        return
    for index in range(len(layers)):
        layer: Any = layers[index]
        if not looks_common(layer):
            continue
        rows = _trial(layer.self_attn.q_proj.in_features, layer.self_attn.q_proj.weight.dtype, generator)
        embeddings = rotary(rows, torch.arange(_TRIAL_ROWS)[None])
        faster = CompiledLayer(layer, attention)

        def change(part: nn.Module, rows: Any = rows, embeddings: Any = embeddings) -> torch.Tensor:
            # The layer's input goes through it unchanged, and would hide a difference.
            output: torch.Tensor = part(rows, position_embeddings=embeddings, attention_mask=None) - rows
            return output

        if _agree(layer, faster, change):
            layers[index] = faster


def _share_input(parent: nn.Module, generator: torch.Generator) -> None:
    linears = _linears([getattr(parent, name, None) for name in _SAME_INPUT])
    if len(linears) != len(_SAME_INPUT):
        return
    shared = SharedInput(linears)
    members = [SharedInputMember(shared, index, linear) for index, linear in enumerate(linears)]
    rows = _trial(linears[0].in_features, linears[0].weight.dtype, generator)
    if all(_close(linear(rows), member(rows)) for linear, member in zip(linears, members, strict=True)):
        for name, member in zip(_SAME_INPUT, members, strict=True):
            setattr(parent, name, member)


def _faster_linear(module: nn.Module, _: str) -> nn.Module | None:
    if type(module) is not nn.Linear or min(module.weight.shape) < _MIN_PACKED_FEATURES:
        return None
    return PackedLinear.of([module])


def _linears(modules: Sequence[nn.Module | None]) -> list[nn.Linear]:
    return [module for module in modules if type(module) is nn.Linear]


def _agree(old: nn.Module, new: nn.Module, output: Callable[[nn.Module], torch.Tensor]) -> bool:
    try:
        return _close(output(old), output(new))
    except Exception:
        logger.debug("%s was not replaced", type(old).__name__, exc_info=True)
        return False


def _trial(width: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    # Batched as a model's hidden states are.
    return torch.randn(1, _TRIAL_ROWS, width, generator=generator).to(dtype)


def _close(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether two outputs differ by no more than rounding: the norm of the difference, relative to the norm."""
    if old.shape != new.shape:
        return False
    difference = (old.float() - new.float()).norm() / old.float().norm()
    return bool(difference <= _TOLERANCE.get(old.dtype, 0.0))
