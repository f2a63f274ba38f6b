"""Replaces parts of a loaded model by faster ones for a CPU, each only when it gives what the part itself gave.

Nothing here knows an architecture. A module is recognised by what it is made of, and its replacement is tried out
against it before it takes its place; what differs stays as it was. At the end the whole model is.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from kvbaton.model.attention import PagedAttention
from kvbaton.model.cpu.decoder import compiled_decoder
from kvbaton.model.cpu.layer import CompiledLayer, looks_common
from kvbaton.model.cpu.linear import PackedLinear, SharedInput, SharedInputMember, can_pack, is_packable
from kvbaton.model.cpu.modules import CompiledRmsNorm, FusedGatedMlp
from kvbaton.model.forward import Forward, plain_forward, trial_of

logger = logging.getLogger(__name__)

_SAME_INPUT = ("q_proj", "k_proj", "v_proj")
_GATED_MLP = ("gate_proj", "up_proj", "down_proj")
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
_WHOLE_TOLERANCE = 0.5
"""Roundings, and experts chosen otherwise for them, add up over layers; a wrong model is further off than its norm."""
_TRIAL_SCALES = (1.0, 30.0, 1e-3)
"""Sizes of a trial's rows: a clamp shows in large ones, an epsilon in small ones."""
_MIN_PACKED_FEATURES = 64
"""A layer smaller than this is bound by the call, not by its weights."""

Make = Callable[[nn.Module], nn.Module | None]
"""Makes a faster module of one that it recognises."""


@torch.inference_mode()
def optimized_forward(model: Any, attention: PagedAttention) -> Forward | None:
    """`optimize` the model, and return its forward pass.

    None when it does not answer as it did before: some models use their parts in ways that no part's trial shows.
    """
    trial = trial_of(model)
    before = plain_forward(model)(*trial).float()
    try:
        optimize(model, attention)
        forward = compiled_decoder(model) or plain_forward(model)
        after = forward(*trial).float()
    except Exception:
        logger.debug("%s fails with its parts replaced", type(model).__name__, exc_info=True)
        return None
    return forward if bool((after - before).norm() <= _WHOLE_TOLERANCE * before.norm()) else None


@torch.inference_mode()
def optimize(model: Any, attention: PagedAttention) -> None:
    """Replace what can be replaced in `model`, whose parameters are all on the CPU and whose layers use `attention`.

    It can no longer be saved.
    """
    dtype = next(model.parameters()).dtype
    for offset in (0.0, 1.0):
        # Gemma stores a norm's factor less one.
        _replace(model, partial(_faster_norm, dtype=dtype, offset=offset))
    if can_pack(dtype):
        _replace(model, _faster_mlp)
        _replace_layers(model, attention)
        _share_inputs(model)
        _replace(model, _faster_linear)


def _replace(parent: nn.Module, make: Make) -> None:
    # Nothing may hold what was replaced: the weights would be in memory twice, which nobody has asked for.
    for name in [name for name, _ in parent.named_children()]:
        child = parent.get_submodule(name)
        faster = _verified(child, make, lambda part, child=child: part(_trial(child)))  # type: ignore[misc]
        if faster is None:
            _replace(child, make)
        else:
            setattr(parent, name, faster)


def _faster_norm(module: nn.Module, dtype: torch.dtype, offset: float) -> nn.Module | None:
    weight = getattr(module, "weight", None)
    epsilon = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, nn.Parameter) or epsilon is None:
        return None
    if weight.dtype is not dtype:
        # What it makes of the model's hidden states has the weight's dtype, and somebody relies on it.
        return None
    return CompiledRmsNorm(weight + offset, float(epsilon))


def _faster_mlp(module: nn.Module) -> nn.Module | None:
    linears = _linears(module, _GATED_MLP)
    others = {name for name, _ in module.named_children()} - {*_GATED_MLP, "act_fn"}
    if linears is None or others:
        return None
    return FusedGatedMlp(linears, module.act_fn)


def _replace_layers(model: Any, attention: PagedAttention) -> None:
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return
    for index, (hidden, named) in enumerate(_calls(model, layers)):
        faster = _verified(
            layers[index],
            partial(_faster_layer, attention=attention),
            lambda part, hidden=hidden, named=named: part(hidden, **named),  # type: ignore[misc]
            unchanged=hidden,
        )
        if faster is not None:
            layers[index] = faster


def _calls(model: Any, layers: nn.ModuleList) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """How the model calls its layers: hidden states, and all that layers are told of tokens and where these stand.

    Empty for a model that calls them otherwise than each once, in their order.
    """
    called: list[nn.Module] = []
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def note(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if len(arguments) == 1:
            called.append(layer)
            calls.append((arguments[0], named))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        plain_forward(model)(*trial_of(model))
    finally:
        for hook in hooks:
            hook.remove()
    return calls if called == list(layers) else []


def _faster_layer(layer: nn.Module, attention: PagedAttention) -> nn.Module | None:
    return CompiledLayer(layer, attention) if looks_common(layer) else None


def _share_inputs(parent: nn.Module) -> None:
    for child in parent.children():
        _share_inputs(child)
    linears = _linears(parent, _SAME_INPUT)
    if linears is None:
        return
    rows = _trial(linears[0])
    members = _verified(
        nn.ModuleList(linears), _members, lambda parts: torch.cat([part(rows) for part in parts.children()], -1)
    )
    if members is not None:
        for name, member in zip(_SAME_INPUT, members.children(), strict=True):
            setattr(parent, name, member)


def _members(linears: nn.Module) -> nn.Module:
    own: list[Any] = list(linears.children())
    shared = SharedInput(own)
    return nn.ModuleList(SharedInputMember(shared, index, linear) for index, linear in enumerate(own))


def _faster_linear(module: nn.Module) -> nn.Module | None:
    if not is_packable(module) or min(module.weight.shape) < _MIN_PACKED_FEATURES:
        return None
    return PackedLinear.of([module])


def _linears(parent: nn.Module, names: Sequence[str]) -> list[nn.Linear] | None:
    """The linear layers of these names, when all of them can be packed."""
    modules = [getattr(parent, name, None) for name in names]
    found = [module for module in modules if is_packable(module)]
    return found if len(found) == len(names) else None


def _verified(
    old: nn.Module,
    make: Make,
    output: Callable[[nn.Module], torch.Tensor],
    unchanged: torch.Tensor | None = None,
) -> nn.Module | None:
    """What `make` makes of a module, when it gives what the module gives; None when it does not, or fails.

    `unchanged` goes through both as it is.
    """
    try:
        new = make(old)
        return new if new is not None and _close(output(old), output(new), unchanged) else None
    except Exception:
        logger.debug("%s was not replaced", type(old).__name__, exc_info=True)
        return None


def _trial(module: nn.Module) -> torch.Tensor:
    """Random rows as wide as the module's first weight, batched as a model's hidden states are."""
    weight = next(module.parameters())
    rows = torch.randn(1, len(_TRIAL_SCALES), weight.shape[-1], generator=torch.Generator().manual_seed(0))
    return (rows * torch.tensor(_TRIAL_SCALES)[:, None]).to(weight.dtype)


def _close(old: torch.Tensor, new: torch.Tensor, unchanged: torch.Tensor | None) -> bool:
    """Whether two outputs differ, in each row, by no more than rounding: the difference's norm, relative to the row's.

    What is `unchanged` would hide a difference; but what comes on top of it cannot be finer than its rounding.
    """
    if old.shape != new.shape or old.dtype is not new.dtype:
        return False
    before, relative = old.float(), _TOLERANCE.get(old.dtype, 0.0)
    allowed = relative * before.norm(dim=-1)
    if unchanged is not None:
        rounding = torch.finfo(old.dtype).eps / 2 * before.norm(dim=-1)
        allowed = rounding + relative * (before - unchanged.float()).norm(dim=-1)
    return bool(((before - new.float()).norm(dim=-1) <= allowed).all())
