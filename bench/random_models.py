"""Seeded random-weight models for benchmarks: the shape of a model people run, and none of its gigabytes to download.

    python bench/random_models.py 0.6b build/models/0.6b --seed 1

What a step costs depends on shapes and not on what the weights say. There is no tokenizer; prompts are token ids.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging as transformers_logging

_QWEN3: dict[str, Any] = {
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

SHAPES: dict[str, transformers.PretrainedConfig] = {
    "30m": transformers.Qwen3Config(
        **_QWEN3,
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    ),
    "0.6b": transformers.Qwen3Config(
        **_QWEN3,
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "8b": transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
}
"""The benchmark models by name: Qwen3's two, and Llama 3's for GPUs."""


def save_random_model(name: str, folder: Path, seed: int, device: str = "cpu") -> Path:
    """Write the model `name` of `SHAPES` in bfloat16 safetensors to `folder`, and return it.

    The weights are a function of name, seed and kind of device. Memory: the weights once.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(SHAPES[name], dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def main() -> None:
    """Write the model that the command line asks for, and say what it is."""
    parser = argparse.ArgumentParser(description="Write a seeded random-weight model for benchmarks.")
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="where to draw the weights: cpu or cuda")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    folder = save_random_model(arguments.name, arguments.folder, arguments.seed, arguments.device)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    sys.stdout.write(f"{folder}: {arguments.name}, seed {arguments.seed}, {size / 1e6:,.0f} MB of weights\n")


if __name__ == "__main__":
    main()
