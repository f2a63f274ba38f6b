"""Finding out whether a model can be served: what its configuration asks for, and what a few tokens show."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from kvbaton.engine.errors import StartupError
from kvbaton.engine.geometry import KvGeometry
from kvbaton.model.attention import PagedAttention

logger = logging.getLogger(__name__)

_TRIAL_TOKENS = 4
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_ROPE_BY_LENGTH = frozenset({"dynamic", "longrope"})


@torch.inference_mode()
def try_out(model: Any, attention: PagedAttention, kv_dtype: str, path: str) -> KvGeometry:
    """Run a few tokens and learn the KV geometry from what the layers really passed.

    Models that bypass the attention interface, or keep state elsewhere, answer wrongly without raising anything: they
    are found out here. Raises StartupError, with the model's name and the reason.
    """
    text_config = model.config.get_text_config()
    name = f"model {path!r} ({type(model).__name__})"
    reason = _unserved_feature(text_config)
    if reason is not None:
        raise StartupError(f"{name} cannot be served: {reason}")
    token_ids = torch.arange(_TRIAL_TOKENS, device=model.device)[None] % text_config.vocab_size
    positions = torch.arange(_TRIAL_TOKENS, device=model.device)[None]
    last = torch.tensor([_TRIAL_TOKENS - 1], device=model.device)
    try:
        output = model(input_ids=token_ids, position_ids=positions, use_cache=False, logits_to_keep=last)
    except Exception as error:
        raise StartupError(f"{name} cannot be served: its trial run failed: {first_line(error)}") from error
    expected = set(range(int(text_config.num_hidden_layers)))
    if set(attention.seen) != expected:
        raise StartupError(
            f"{name} cannot be served: {len(attention.seen)} of its {len(expected)} layers use "
            "the attention interface, and the others keep state that kvbaton does not know"
        )
    if output.logits.shape[1] != 1:
        raise StartupError(f"{name} cannot be served: it does not heed logits_to_keep")
    if attention.unknown_arguments:
        names = ", ".join(sorted(attention.unknown_arguments))
        raise StartupError(f"{name} cannot be served: its attention needs {names}")
    return KvGeometry(tuple(attention.seen[layer] for layer in sorted(expected)), kv_dtype)


def context_length(model: Any, path: str) -> int:
    """Most tokens that a sequence may have.

    `dynamic` and `longrope` position embeddings change their frequencies for the whole batch with its longest sequence
    once that exceeds the length of the first training; up to there they are constant (`transformers`'
    modeling_rope_utils). The context ends there, and the frequencies are kept from changing. Raises StartupError when
    there is no such length.
    """
    config = model.config.get_text_config()
    name = f"model {path!r} ({type(model).__name__})"
    length = getattr(config, "max_position_embeddings", None)
    if length is None:
        raise StartupError(f"{name} cannot be served: it has no max_position_embeddings")
    length = int(length)
    by_length = {kind: rope for kind, rope in _rope_parameters(config) if kind in _ROPE_BY_LENGTH}
    if not by_length:
        return length
    if not _freeze_rope(model):
        raise StartupError(
            f"{name} cannot be served: it has {', '.join(sorted(by_length))} position embeddings of its own"
        )
    cap = min(length, *(int(rope.get("original_max_position_embeddings", length)) for rope in by_length.values()))
    logger.warning(
        "%s has %s position embeddings, which beyond %d tokens depend on the longest sequence of a batch: its context "
        "is capped there",
        name,
        ", ".join(sorted(by_length)),
        cap,
    )
    return cap


def first_line(error: Exception) -> str:
    """What an operator is told of another library's error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _unserved_feature(text_config: Any) -> str | None:
    """What a model asks for, in its configuration, that no short trial would show to be missing."""
    if getattr(text_config, "num_kv_shared_layers", 0):
        return "some of its layers take KV from other layers"
    other_layers = set(getattr(text_config, "layer_types", None) or ()) - _LAYER_TYPES
    if other_layers:
        return f"it has layers of type {', '.join(sorted(other_layers))}"
    return None


def _rope_parameters(text_config: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Kind and parameters of the model's position embeddings; some models have one for each type of layer."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):
        if isinstance(part, dict) and "rope_type" in part:
            yield part["rope_type"], part


def _freeze_rope(model: torch.nn.Module) -> bool:
    """Keep the position embeddings' frequencies as they were initialised; whether any was found to be kept."""
    found = False
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and kinds in _ROPE_BY_LENGTH:
            setattr(module, "rope_type", "default")  # noqa: B010 - torch's stubs allow modules alone
            found = True
        elif isinstance(kinds, dict) and _ROPE_BY_LENGTH & set(kinds.values()):
            kinds.update({layer: "default" for layer, kind in kinds.items() if kind in _ROPE_BY_LENGTH})
            found = True
    return found
