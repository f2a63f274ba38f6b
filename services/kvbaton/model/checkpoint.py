"""What a checkpoint says of itself before any of its weights is read."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
from transformers.utils import cached_file

from kvbaton.engine.errors import StartupError

_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8": 8, "F6": 6, "F4": 4, "I64": 64, "I32": 32, "I16": 16}
_WHOLE_FLOATS = ("F64", "F32", "F16", "BF16")


def resolve(path: str) -> str:
    """The directory, or the hub name, that `path` means. Raises StartupError for a directory that does not exist."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if not looks_local:
        return path
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise StartupError(f"model directory {path!r} does not exist")
    return str(folder)


def read_config(source: str, trust_remote_code: bool) -> Any:
    """The model's configuration. Raises StartupError for one that no causal language model can have.

    Raises also what `transformers` raises for a file that is missing or broken. No code of the checkpoint is run unless
    it is trusted.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise _needs_remote_code(source) from error
        raise
    if config.is_encoder_decoder:
        raise StartupError(f"model {source!r} ({model_class(config)}) cannot be served: it is an encoder-decoder")
    is_ours = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        if not is_ours and not trust_remote_code:
            raise _needs_remote_code(source)
    elif not is_ours:
        raise StartupError(f"model {source!r} ({model_class(config)}) cannot be served: it is no causal language model")
    return config


def weights_bytes(source: str, dtype: torch.dtype | None) -> int:
    """Bytes of the weights once they are loaded as `dtype` (None: as they are), from the headers of safetensors files.

    A checkpoint of another format counts as 0: it has no header that could be read alone.
    """
    total = 0
    for file in _safetensors_files(source):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                part = tensors.get_slice(name)
                kind = str(part.get_dtype())
                total += math.prod(part.get_shape()) * _element_bits(kind, dtype) // 8
    return total


def model_class(config: Any) -> str:
    """The model's class, as far as its configuration tells."""
    architectures = getattr(config, "architectures", None)
    return str(architectures[0]) if architectures else type(config).__name__


def _safetensors_files(source: str) -> list[str]:
    """A hub's files are downloaded for this; they are needed anyhow."""
    whole = cached_file(source, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if whole is not None:
        return [str(whole)]
    index = cached_file(source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is None:
        return []
    names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    return [str(cached_file(source, name)) for name in names]


def _element_bits(kind: str, dtype: torch.dtype | None) -> int:
    # Whatever is narrower than 16 bits is quantised, and stays as it is.
    if dtype is not None and kind in _WHOLE_FLOATS:
        return dtype.itemsize * 8
    return _BITS.get(kind.split("_")[0], 8)


def _needs_remote_code(source: str) -> StartupError:
    return StartupError(
        f"model {source!r} needs code that comes with it (auto_map in its config.json); --trust-remote-code runs that "
        "code, with all of this process's rights"
    )
