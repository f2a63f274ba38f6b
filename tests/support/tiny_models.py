"""Random models of a few kilobytes, one for each architecture whose answers are compared with `transformers`."""

from pathlib import Path
from typing import Any

import torch
import transformers

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

WINDOW = 24
"""Tokens that a sliding-window layer sees: shorter than the long prompts, longer than a block."""

CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=WINDOW),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SHAPE,
        sliding_window=WINDOW,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
}


def save_tiny_model(architecture: str, folder: Path, **overrides: Any) -> Path:
    """Write a seeded random model of `architecture` to `folder` and return it."""
    config = CONFIGS[architecture]()
    for name, value in overrides.items():
        setattr(config, name, value)
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Wide weights make logits differ enough that rounding cannot change the largest one.
            if parameter.dim() > 1:
                parameter.normal_(0, 0.35)
    model.generation_config.eos_token_id = config.eos_token_id
    model.save_pretrained(folder)
    return folder


def reference_greedy(folder: Path, prompts: list[list[int]], max_tokens: int, ignore_eos: bool) -> list[list[int]]:
    """What `transformers` itself generates for each prompt alone, without the prompt."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None if ignore_eos else model.generation_config.eos_token_id,
            pad_token_id=0,
        )
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs


def random_prompts(lengths: list[int], seed: int = 3) -> list[list[int]]:
    """Prompts of the given lengths, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, SHAPE["vocab_size"], (n,), generator=generator).tolist() for n in lengths]
