"""Loading a `transformers` model, and refusing, by name and reason, one that would answer wrongly."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from kvbaton.engine.errors import StartupError
from kvbaton.engine.geometry import KvGeometry
from kvbaton.model.attention import PagedAttention
from kvbaton.model.cpu.allocator import keep_freed_memory
from kvbaton.model.cpu.attention import CpuAttention
from kvbaton.model.cpu.decoder import compiled_decoder
from kvbaton.model.cpu.optimize import optimize
from kvbaton.model.reference import ReferenceAttention
from kvbaton.model.store import DTYPES

logger = logging.getLogger(__name__)

# Progress bars are no log lines.
transformers_logging.disable_progress_bar()

_TRIAL_TOKENS = 4
_DIGEST_SAMPLES = 64
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_ROPE_BY_LENGTH = frozenset({"dynamic", "longrope"})


Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Token ids and positions [1, tokens], and the rows of interest, to their logits [rows, vocab]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that passed its trial, and what is known of it."""

    forward: Forward
    attention: PagedAttention
    device: torch.device
    geometry: KvGeometry
    architecture: str
    weights_digest: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]


def load_model(path: str, dtype: str, device: str) -> LoadedModel:
    """Load a local directory or a hub name that `AutoModelForCausalLM` takes.

    `dtype` is "float32", "bfloat16" or "auto" (the checkpoint's own, where kvbaton holds KV in it). Raises StartupError
    when the model is missing or broken, or when its attention cannot be served.
    """
    target = _device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise StartupError(f"dtype {dtype!r} is not one of {sorted(DTYPES)} or 'auto'")
    attention = PagedAttention(CpuAttention() if target.type == "cpu" else ReferenceAttention())
    attention.register()
    model = _load(path, dtype, attention.name)
    model.eval().to(target)
    kv_dtype = str(model.dtype).removeprefix("torch.")
    if kv_dtype not in DTYPES:
        raise StartupError(f"model {path!r} has dtype {kv_dtype}; choose one of {sorted(DTYPES)}")
    geometry = _try_out(model, attention, kv_dtype, path)
    text_config = model.config.get_text_config()
    digest = weights_digest(model)
    forward = plain_forward(model)
    if target.type == "cpu":
        keep_freed_memory()
        optimize(model, attention)
        forward = compiled_decoder(model) or forward
    return LoadedModel(
        forward=forward,
        attention=attention,
        device=target,
        geometry=geometry,
        architecture=type(model).__name__,
        weights_digest=digest,
        vocab_size=int(text_config.vocab_size),
        max_model_len=int(text_config.max_position_embeddings),
        eos_token_ids=_eos_token_ids(model),
    )


def plain_forward(model: Any) -> Forward:
    """The model's own forward pass."""

    def forward(token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        output = model(input_ids=token_ids, position_ids=positions, use_cache=False, logits_to_keep=rows)
        logits: torch.Tensor = output.logits[0]
        return logits

    return forward


def weights_digest(model: torch.nn.Module) -> str:
    """Hex digest of every parameter's name, shape, dtype and some values spread over it.

    Two revisions of one model differ in nearly every value, so a sample tells them apart without reading gigabytes.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.reshape(-1)
        picks = torch.linspace(0, max(flat.numel() - 1, 0), _DIGEST_SAMPLES, dtype=torch.float64).long()
        if flat.numel():
            digest.update(flat[picks.to(flat.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise StartupError(f"device {name!r} is not known to torch") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StartupError(f"device {name!r} was asked for, and torch {torch.__version__} sees no CUDA device")
    return device


def _load(path: str, dtype: str, attention_name: str) -> Any:
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    source = str(Path(path).expanduser()) if looks_local else path
    if looks_local and not Path(source).is_dir():
        raise StartupError(f"model directory {path!r} does not exist")
    try:
        AutoConfig.from_pretrained(source)
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype if dtype == "auto" else DTYPES[dtype],
            attn_implementation=attention_name,
            output_loading_info=True,
        )
    except Exception as error:
        # Loading fails in as many ways as there are broken directories; all of them are the operator's to mend.
        if attention_name in str(error):
            raise StartupError(f"model {path!r} cannot be served: it does not use the attention interface") from error
        raise StartupError(f"model {path!r} cannot be loaded: {_first_line(error)}") from error
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", ()))
    if missing:
        # transformers would go on with random values here.
        raise StartupError(f"model {path!r} lacks {len(missing)} of its weights, for example {missing[0]}")
    return model


@torch.inference_mode()
def _try_out(model: Any, attention: PagedAttention, kv_dtype: str, path: str) -> KvGeometry:
    """Run a few tokens and learn the KV geometry from what the layers really passed.

    Models that bypass the attention interface, or keep state elsewhere, answer wrongly without raising anything: they
    are found out here.
    """
    text_config = model.config.get_text_config()
    name = type(model).__name__
    reason = _unserved_feature(text_config)
    if reason is not None:
        raise StartupError(f"model {path!r} ({name}) cannot be served: {reason}")
    token_ids = torch.arange(_TRIAL_TOKENS, device=model.device)[None] % text_config.vocab_size
    positions = torch.arange(_TRIAL_TOKENS, device=model.device)[None]
    last = torch.tensor([_TRIAL_TOKENS - 1], device=model.device)
    try:
        output = model(input_ids=token_ids, position_ids=positions, use_cache=False, logits_to_keep=last)
    except Exception as error:
        raise StartupError(f"model {path!r} ({name}) failed its trial run: {_first_line(error)}") from error
    expected = set(range(int(text_config.num_hidden_layers)))
    if set(attention.seen) != expected:
        raise StartupError(
            f"model {path!r} ({name}) cannot be served: {len(attention.seen)} of its {len(expected)} layers use "
            "the attention interface, and the others keep state that kvbaton does not know"
        )
    if getattr(text_config, "max_position_embeddings", None) is None:
        raise StartupError(f"model {path!r} ({name}) cannot be served: it has no max_position_embeddings")
    if output.logits.shape[1] != 1:
        raise StartupError(f"model {path!r} ({name}) cannot be served: it does not heed logits_to_keep")
    if attention.unknown_arguments:
        names = ", ".join(sorted(attention.unknown_arguments))
        raise StartupError(f"model {path!r} ({name}) cannot be served: its attention needs {names}")
    return KvGeometry(tuple(attention.seen[layer] for layer in sorted(expected)), kv_dtype)


def _unserved_feature(text_config: Any) -> str | None:
    """What a model asks for, in its configuration, that no short trial would show to be missing."""
    if getattr(text_config, "num_kv_shared_layers", 0):
        return "some of its layers take KV from other layers"
    other_layers = set(getattr(text_config, "layer_types", None) or ()) - _LAYER_TYPES
    if other_layers:
        return f"it has layers of type {', '.join(sorted(other_layers))}"
    rope = getattr(text_config, "rope_parameters", None) or {}
    rope_types = {
        part["rope_type"] for part in (rope, *rope.values()) if isinstance(part, dict) and "rope_type" in part
    }
    by_length = sorted(rope_types & _ROPE_BY_LENGTH)
    if by_length:
        # Sequences of one batch would change each other's positions, and the KV that is kept would no longer fit.
        return f"its {by_length[0]} position embeddings depend on the longest sequence of a batch"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _eos_token_ids(model: Any) -> frozenset[int]:
    value = model.generation_config.eos_token_id if model.generation_config is not None else None
    if value is None:
        value = model.config.get_text_config().eos_token_id
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)
