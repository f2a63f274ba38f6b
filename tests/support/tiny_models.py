"""Random models of a few kilobytes, one for each architecture whose answers are compared with `transformers`."""

from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Architecture:
    """A tiny configuration, and what docs/models.md says of its kind."""

    config: Callable[[], Any]
    needs: str = ""
    """What its layers need beyond plain causal attention."""
    note: str = ""
    """What an operator should know."""


def _without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in SHAPE.items() if name not in names}


_LOCAL_GLOBAL_LOCAL = ["sliding_attention", "full_attention", "sliding_attention"]

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(lambda: transformers.LlamaConfig(**SHAPE)),
    "qwen2": Architecture(
        lambda: transformers.Qwen2Config(
            **_without("head_dim"), use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
        ),
        "biases on Q, K and V; sliding window from a layer on, where the checkpoint asks for it",
    ),
    "qwen3": Architecture(lambda: transformers.Qwen3Config(**SHAPE), "normalised Q and K"),
    "qwen3_moe": Architecture(
        lambda: transformers.Qwen3MoeConfig(**SHAPE, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
        "normalised Q and K; experts",
    ),
    "mistral": Architecture(
        lambda: transformers.MistralConfig(**SHAPE, sliding_window=WINDOW), "sliding window in every layer"
    ),
    "mixtral": Architecture(
        lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2), "experts"
    ),
    "gemma2": Architecture(
        lambda: transformers.Gemma2Config(
            **SHAPE, sliding_window=WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=5.0
        ),
        "sliding and global layers in turn; soft cap on scores",
    ),
    "gemma3": Architecture(
        lambda: transformers.Gemma3TextConfig(
            **SHAPE, sliding_window=WINDOW, query_pre_attn_scalar=8, layer_types=_LOCAL_GLOBAL_LOCAL
        ),
        "sliding and global layers with position embeddings of their own",
    ),
    "gemma3_vision": Architecture(
        lambda: transformers.Gemma3Config(
            text_config={
                **SHAPE,
                "sliding_window": WINDOW,
                "query_pre_attn_scalar": 8,
                "layer_types": _LOCAL_GLOBAL_LOCAL,
            },
            vision_config={
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "image_size": 8,
                "patch_size": 4,
            },
            mm_tokens_per_image=4,
            eos_token_id=2,
        ),
        "sliding and global layers with position embeddings of their own",
        "the text part is served; the vision tower is loaded and never run",
    ),
    "phi3": Architecture(lambda: transformers.Phi3Config(**_without("head_dim")), "fused QKV"),
    "phi3_long": Architecture(
        lambda: transformers.Phi3Config(
            **_without("head_dim"),
            original_max_position_embeddings=128,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.3, 1.6],
                "long_factor": [4.0] * 4,
            },
        ),
        "`longrope` position embeddings",
        "the context is capped at `original_max_position_embeddings`",
    ),
    "llama_dynamic": Architecture(
        lambda: transformers.LlamaConfig(
            **SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        ),
        "`dynamic` position embeddings",
        "the context is capped at `max_position_embeddings`",
    ),
    "olmo2": Architecture(lambda: transformers.Olmo2Config(**_without("head_dim")), "normalised Q and K"),
    "granite": Architecture(
        lambda: transformers.GraniteConfig(
            **_without("head_dim"),
            embedding_multiplier=2.0,
            residual_multiplier=0.7,
            attention_multiplier=0.2,
            logits_scaling=1.5,
        ),
        "a scale of its own on scores",
    ),
    "gpt_neox": Architecture(
        lambda: transformers.GPTNeoXConfig(**_without("head_dim", "num_key_value_heads"), rotary_pct=0.5),
        "as many KV heads as query heads; partly rotated heads",
    ),
    "smollm3": Architecture(
        lambda: transformers.SmolLM3Config(**_without("head_dim"), no_rope_layer_interval=2),
        "layers without position embeddings",
    ),
    "gpt_oss": Architecture(
        lambda: transformers.GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW),
        "sinks; sliding and global layers in turn; experts",
    ),
    "deepseek_v3": Architecture(
        lambda: transformers.DeepseekV3Config(
            **_without("head_dim", "num_key_value_heads"),
            num_key_value_heads=4,
            moe_intermediate_size=16,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=6,
        ),
        "K and V of different widths; experts",
        "K and V are kept expanded, not as the latent they are computed from",
    ),
    "cohere": Architecture(lambda: transformers.CohereConfig(**_without("head_dim"), logit_scale=1.0)),
    "cohere2": Architecture(
        lambda: transformers.Cohere2Config(
            **SHAPE, logit_scale=1.0, sliding_window=WINDOW, layer_types=_LOCAL_GLOBAL_LOCAL
        ),
        "sliding layers, and global layers without position embeddings",
    ),
    "glm4": Architecture(lambda: transformers.Glm4Config(**SHAPE, partial_rotary_factor=0.5), "partly rotated heads"),
    "stablelm": Architecture(
        lambda: transformers.StableLmConfig(**_without("head_dim"), partial_rotary_factor=0.5), "partly rotated heads"
    ),
    "gpt2": Architecture(
        lambda: transformers.GPT2Config(
            vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
        ),
        "learnt positions; as many KV heads as query heads",
    ),
    "opt": Architecture(
        lambda: transformers.OPTConfig(
            vocab_size=97,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=256,
        ),
        "learnt positions; as many KV heads as query heads",
    ),
}
"""The architectures whose answers are compared with those of `transformers`."""


def save_tiny_model(architecture: str, folder: Path, **overrides: Any) -> Path:
    """Write a seeded random model of `architecture` to `folder` and return it."""
    config = ARCHITECTURES[architecture].config()
    for name, value in overrides.items():
        setattr(config, name, value)
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Wide weights make logits differ enough that rounding cannot change the largest one.
            if parameter.dim() > 1:
                parameter.normal_(0, 0.35)
            elif "sinks" in name:
                parameter.normal_(0, 2)
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
