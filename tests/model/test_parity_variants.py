"""Greedy output is `transformers`' own for attention that the common architectures do not have: soft caps, sinks, K and
V of different widths, learned positions, partly rotated heads. One step's prompts are chunked and mixed with decodes.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvbaton.engine.core import Engine
from kvbaton.engine.pool import BlockPool
from kvbaton.engine.request import Phase
from kvbaton.engine.sampling import SamplingParams
from kvbaton.engine.scheduler import Limits, Scheduler
from kvbaton.model.loader import load_model
from kvbaton.model.runner import ModelRunner
from kvbaton.model.store import TorchKvStore
from support import tiny_models
from support.requests import new_request

SHAPE = tiny_models.SHAPE
MAX_TOKENS = 8


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in SHAPE.items() if name not in names}


CONFIGS: dict[str, Any] = {
    "gemma2": lambda: transformers.Gemma2Config(
        **SHAPE, sliding_window=tiny_models.WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=5.0
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=tiny_models.WINDOW
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **without("head_dim", "num_key_value_heads"),
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
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=97,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=256,
    ),
    "stablelm": lambda: transformers.StableLmConfig(**without("head_dim"), partial_rotary_factor=0.5),
    "cohere": lambda: transformers.CohereConfig(**without("head_dim")),
}


def save(architecture: str, folder: Path) -> Path:
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture](), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.35)
            elif "sinks" in name:
                parameter.normal_(0, 2)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_greedy_output(architecture: str, tmp_path: Path) -> None:
    folder = save(architecture, tmp_path)
    loaded = load_model(str(folder), "float32", "cpu")
    store = TorchKvStore(loaded.geometry, 64, 8, torch.device("cpu"))
    limits = Limits(max_prefill_tokens=13, max_decode_seqs=3, max_waiting=8)
    scheduler = Scheduler(BlockPool(64, 8), limits, loaded.eos_token_ids, loaded.max_model_len)
    engine = Engine(scheduler, ModelRunner(loaded, store))
    prompts = tiny_models.random_prompts([1, 9, 40, 17])
    sampling = SamplingParams(max_tokens=MAX_TOKENS, seed=0, ignore_eos=True)
    requests = [scheduler.add(new_request(str(n), prompt, sampling), 0.0) for n, prompt in enumerate(prompts)]
    while any(request.phase is not Phase.FINISHED for request in requests):
        result = engine.step(lambda: 0.0)
        for _, error in result.failed:
            raise error
    outputs = [request.output for request in requests]
    assert outputs == tiny_models.reference_greedy(folder, prompts, MAX_TOKENS, True)
    assert len({token for output in outputs for token in output}) > 3
