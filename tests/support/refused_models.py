"""Tiny configurations of models that cannot be served, each with the reason that its operator is told."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers

from support import tiny_models

SHAPE: dict[str, Any] = {**tiny_models.SHAPE, "num_hidden_layers": 2}
SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True, slots=True)
class Refused:
    """A model's configuration, and what is said of it."""

    config: Callable[[], Any]
    reason: str


REFUSED: dict[str, Refused] = {
    "FalconForCausalLM": Refused(
        lambda: transformers.FalconConfig(**SIZES, **ENDS), "it does not use the attention interface"
    ),
    "BloomForCausalLM": Refused(
        lambda: transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, **ENDS),
        "0 of its 2 layers use the attention interface, and the others keep state that kvbaton does not know",
    ),
    "Qwen3NextForCausalLM": Refused(
        lambda: transformers.Qwen3NextConfig(
            **SHAPE,
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            layer_types=["linear_attention", "full_attention"],
        ),
        "it has layers of type linear_attention",
    ),
    "MambaForCausalLM": Refused(
        lambda: transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4),
        "it has layers of type linear_attention",
    ),
    "JambaForCausalLM": Refused(
        lambda: transformers.JambaConfig(
            **{name: value for name, value in SHAPE.items() if name != "head_dim"},
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=2,
            mamba_d_state=4,
            use_mamba_kernels=False,
        ),
        "it has layers of type linear_attention",
    ),
    "RecurrentGemmaForCausalLM": Refused(
        lambda: transformers.RecurrentGemmaConfig(
            **{name: value for name, value in SHAPE.items() if name not in ("head_dim", "max_position_embeddings")},
            lru_width=32,
        ),
        "it has layers of type linear_attention",
    ),
    "RwkvForCausalLM": Refused(
        lambda: transformers.RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
        "0 of its 2 layers use the attention interface, and the others keep state that kvbaton does not know",
    ),
    "Gemma3nForCausalLM": Refused(
        lambda: transformers.Gemma3nTextConfig(
            **{**SHAPE, "num_hidden_layers": 4},
            vocab_size_per_layer_input=97,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=2,
            laurel_rank=4,
            altup_num_inputs=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
            activation_sparsity_pattern=[0.0] * 4,
        ),
        "some of its layers take KV from other layers",
    ),
    "Llama4ForCausalLM": Refused(
        lambda: transformers.Llama4TextConfig(**SHAPE, intermediate_size_mlp=48, num_local_experts=2),
        "it has layers of type chunked_attention",
    ),
    "BertLMHeadModel": Refused(
        lambda: transformers.BertConfig(**SIZES, intermediate_size=48),
        "its attention needs a view of later tokens",
    ),
}
"""By the class of model that `transformers` makes of the configuration."""

NOT_CAUSAL: dict[str, Refused] = {
    "T5ForConditionalGeneration": Refused(
        lambda: transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        "it is an encoder-decoder",
    ),
    "WhisperForConditionalGeneration": Refused(lambda: transformers.WhisperConfig(), "it is an encoder-decoder"),
    "LlavaForConditionalGeneration": Refused(lambda: transformers.LlavaConfig(), "it is no causal language model"),
    "ViTForImageClassification": Refused(lambda: transformers.ViTConfig(), "it is no causal language model"),
    "CLIPModel": Refused(lambda: transformers.CLIPConfig(), "it is no causal language model"),
}
"""Models that `transformers` makes no causal language model of: their configuration is enough to refuse them."""
