"""Loading a `transformers` model, and refusing, by name and reason, one that would answer wrongly."""

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from kvbaton.engine.errors import StartupError
from kvbaton.engine.geometry import KvGeometry
from kvbaton.model import checkpoint
from kvbaton.model.attention import AttentionBackend, PagedAttention
from kvbaton.model.cpu.allocator import keep_freed_memory
from kvbaton.model.cpu.attention import CpuAttention
from kvbaton.model.cpu.optimize import optimized_forward
from kvbaton.model.cuda.attention import cuda_attention
from kvbaton.model.forward import Forward, plain_forward
from kvbaton.model.memory import check_fits, memory_of
from kvbaton.model.reference import ReferenceAttention
from kvbaton.model.store import DTYPES
from kvbaton.model.trial import context_length, first_line, try_out

logger = logging.getLogger(__name__)

# Progress bars are no log lines.
transformers_logging.disable_progress_bar()

_DIGEST_SAMPLES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that passed its trial, and what is known of it."""

    model: Any
    """As `transformers` has it; parts may have been replaced by faster ones."""
    forward: Forward
    attention: PagedAttention
    device: torch.device
    geometry: KvGeometry
    architecture: str
    weights_digest: str
    rounded_digest: str
    weights_bytes: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]


def load_model(
    path: str, dtype: str, device: str, trust_remote_code: bool = False, optimized: bool = True
) -> LoadedModel:
    """Load a local directory or a hub name that `AutoModelForCausalLM` takes.

    `dtype` is "float32", "bfloat16" or "auto" (the checkpoint's own, where kvbaton holds KV in it). Raises StartupError
    when the model is missing or broken, when its weights do not fit into the device's memory, when it needs code of its
    own that is not trusted, or when its attention cannot be served. `optimized` lets parts be replaced on a CPU.
    """
    target = _device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise StartupError(f"dtype {dtype!r} is not one of {sorted(DTYPES)} or 'auto'")
    attention = PagedAttention(_backend(target))
    attention.register()
    model = _load(path, dtype, target, attention.name, trust_remote_code)
    model.eval().to(target)
    kv_dtype = str(model.dtype).removeprefix("torch.")
    if kv_dtype not in DTYPES:
        raise StartupError(f"model {path!r} has dtype {kv_dtype}; choose one of {sorted(DTYPES)}")
    geometry = try_out(model, attention, kv_dtype, path)
    max_model_len = context_length(model, path)
    digests = weights_digest(model), weights_digest(model, rounded=True)
    weights_bytes = sum(parameter.nbytes for parameter in model.parameters())
    forward: Forward | None = plain_forward(model)
    if target.type == "cpu" and optimized:
        keep_freed_memory()
        forward = optimized_forward(model, attention)
    if forward is None:
        logger.warning("model %r does not bear faster parts: it is loaded again, and served as it is", path)
        del model
        return load_model(path, dtype, device, trust_remote_code, optimized=False)
    return LoadedModel(
        model=model,
        forward=forward,
        attention=attention,
        device=target,
        geometry=geometry,
        architecture=type(model).__name__,
        weights_digest=digests[0],
        rounded_digest=digests[1],
        weights_bytes=weights_bytes,
        vocab_size=int(model.config.get_text_config().vocab_size),
        max_model_len=max_model_len,
        eos_token_ids=_eos_token_ids(model),
    )


def _backend(device: torch.device) -> AttentionBackend:
    if device.type == "cpu":
        return CpuAttention()
    if device.type != "cuda":
        return ReferenceAttention()
    # Who asks for float32 does not mean TensorFloat-32, which has ten bits.
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    return cuda_attention()


def weights_digest(model: torch.nn.Module, *, rounded: bool = False) -> str:
    """Hex digest of every parameter's name, shape, dtype and some values spread over it.

    Two revisions of one model differ in nearly every value, so a sample tells them apart without reading gigabytes.
    With `rounded` values are taken as bfloat16 has them, and dtypes left out: that of a model is then the same in
    whichever dtype it was loaded.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {'' if rounded else tensor.dtype}\n".encode())
        flat = tensor.reshape(-1)
        picks = torch.linspace(0, max(flat.numel() - 1, 0), _DIGEST_SAMPLES, dtype=torch.float64).long()
        if flat.numel():
            values = flat[picks.to(flat.device)]
            values = values.bfloat16() if rounded else values
            digest.update(values.double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise StartupError(f"device {name!r} is not known to torch") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StartupError(f"device {name!r} was asked for, and torch {torch.__version__} sees no CUDA device")
    return device


def _load(path: str, dtype: str, device: torch.device, attention_name: str, trust_remote_code: bool) -> Any:
    source = checkpoint.resolve(path)
    asked = None if dtype == "auto" else DTYPES[dtype]
    try:
        config = checkpoint.read_config(source, trust_remote_code)
        needed = checkpoint.weights_bytes(source, asked or config.dtype)
        check_fits(f"model {path!r} does not fit: its weights take", needed, memory_of(device), device)
        # On a CPU, weights of the asked dtype stay where the file is mapped into memory, and workers of one machine
        # share them; others are converted one by one. There is no second copy.
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=asked or "auto",
            attn_implementation=attention_name,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except StartupError:
        raise
    except Exception as error:
        # Loading fails in as many ways as there are broken directories; all of them are the operator's to mend.
        if attention_name in str(error):
            name = f"model {path!r} ({checkpoint.model_class(config)})"
            raise StartupError(f"{name} cannot be served: it does not use the attention interface") from error
        raise StartupError(f"model {path!r} cannot be loaded: {first_line(error)}") from error
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", ()))
    if missing:
        # transformers would go on with random values here.
        raise StartupError(f"model {path!r} lacks {len(missing)} of its weights, for example {missing[0]}")
    return model


def _eos_token_ids(model: Any) -> frozenset[int]:
    value = model.generation_config.eos_token_id if model.generation_config is not None else None
    if value is None:
        value = model.config.get_text_config().eos_token_id
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)
