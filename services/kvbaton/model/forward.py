"""A model's forward pass as a runner calls it."""

from collections.abc import Callable
from typing import Any

import torch

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Token ids and positions [1, tokens], and the rows of interest, to their logits [rows, vocab]."""


def plain_forward(model: Any) -> Forward:
    """The model's own forward pass."""

    def forward(token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        output = model(input_ids=token_ids, position_ids=positions, use_cache=False, logits_to_keep=rows)
        logits: torch.Tensor = output.logits[0]
        return logits

    return forward


def trial_of(model: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments of a `Forward`: a few tokens that stand all over the model's context, of each the logits.

    What a model does far into its context only, as some scale their queries, does not show at its beginning.
    """
    config = model.config.get_text_config()
    last = int(config.max_position_embeddings) - 1
    positions = torch.tensor(sorted({0, min(1, last), min(2, last), last // 2, last}))
    token_ids = torch.arange(1, len(positions) + 1) % config.vocab_size
    return token_ids[None], positions[None], torch.arange(len(positions))
