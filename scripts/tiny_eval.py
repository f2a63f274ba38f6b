"""How often the bundled model answers exactly right, by length of prompt and by kind of question.

An answer counts when every token of it, its end included, is the model's first choice given the tokens before. That is
the same as greedy decoding giving the answer word for word, and takes one forward pass instead of ten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from tiny_batches import Batch, pad_rows
from tiny_stories import KINDS, Example, Kind, facts_for_tokens, held_out_example
from tiny_tokenizer import ASSISTANT, BEGIN, END, PAD, render_chat

BUCKETS: tuple[tuple[int, int], ...] = (
    (1, 128),
    (129, 256),
    (257, 512),
    (513, 768),
    (769, 1024),
    (1025, 1536),
)
"""First and last prompt length of each line of the table, in tokens, chat template included."""
EVAL_BATCH = 20
EVAL_SEED = 1_000_000
"""Evaluation seeds start here, so that tests which use small seeds ask other questions."""


@dataclass(frozen=True, slots=True)
class Score:
    """Exact matches among the questions of one bucket and kind."""

    bucket: tuple[int, int]
    kind: Kind
    right: int
    asked: int


def answers_right(logits: torch.Tensor, targets: torch.Tensor, end: int) -> torch.Tensor:
    """One boolean per answer from the predictions of all answers' tokens, laid end to end.

    ``logits`` is (tokens, vocabulary), ``targets`` is (tokens), and every answer closes with the token ``end``.
    """
    wrong = logits.argmax(-1) != targets
    closes = (targets == end).nonzero().flatten()
    mistakes = torch.cat([torch.zeros(1, dtype=torch.long), wrong.cumsum(0)[closes]])
    return mistakes.diff() == 0


def predict(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (tokens, vocabulary) and targets (tokens) of the batch's learnt positions, row after row.

    The vocabulary is multiplied out for those positions alone: most of a story is not learnt. Rows are padded on the
    right, where a causal model cannot see, so no attention mask is needed.
    """
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
    return model.lm_head(hidden[batch.learnt]), batch.ids.roll(-1, 1)[batch.learnt]


def grade(model: Any, tokenizer: Any, examples: Sequence[Example], chat: bool = True) -> list[bool]:
    """Which of the examples the model answers exactly right, asked in a chat or as plain text."""
    pad, end = (tokenizer.convert_tokens_to_ids(token) for token in (PAD, END))
    right: list[bool] = []
    for first in range(0, len(examples), EVAL_BATCH):
        rows, masks = [], []
        for example in examples[first : first + EVAL_BATCH]:
            told, answered = (_prompt(example), "") if chat else (BEGIN + example.prompt, " ")
            prompt = tokenizer(told, add_special_tokens=False)["input_ids"]
            answer = tokenizer(answered + example.answer + END, add_special_tokens=False)["input_ids"]
            rows.append(prompt + answer)
            masks.append([False] * len(prompt) + [True] * len(answer))
        with torch.inference_mode():
            logits, targets = predict(model, pad_rows(rows, masks, pad))
        right += answers_right(logits, targets, end).tolist()
    return right


def _prompt(example: Example) -> str:
    return render_chat([("user", example.prompt)]) + ASSISTANT


def examples_of_length(tokenizer: Any, bucket: tuple[int, int], kind: Kind, number: int) -> list[Example]:
    """Held-out examples of one kind whose prompts are of the bucket's lengths, which they fill evenly."""
    least, most = facts_for_tokens(bucket[0]), facts_for_tokens(bucket[1])
    found: list[Example] = []
    for seed in count(EVAL_SEED):
        example = held_out_example(seed, least + seed % (most - least + 1), kind)
        tokens = len(tokenizer(_prompt(example), add_special_tokens=False)["input_ids"])
        if bucket[0] <= tokens <= bucket[1]:
            found.append(example)
        if len(found) == number:
            break
    return found


def evaluate(model: Any, tokenizer: Any, per_cell: int) -> list[Score]:
    """Scores for every bucket and kind, from ``per_cell`` questions each."""
    scores = []
    for bucket in BUCKETS:
        for kind in KINDS:
            right = grade(model, tokenizer, examples_of_length(tokenizer, bucket, kind, per_cell))
            scores.append(Score(bucket, kind, sum(right), len(right)))
    return scores


def evaluate_plain(model: Any, tokenizer: Any, per_cell: int) -> float:
    """The share right when prompts of up to 512 tokens are plain text to complete, with no chat template."""
    right: list[bool] = []
    for bucket in BUCKETS[:3]:
        for kind in KINDS:
            examples = examples_of_length(tokenizer, bucket, kind, per_cell)
            right += grade(model, tokenizer, examples, chat=False)
    return sum(right) / len(right)


def share(scores: Sequence[Score], shortest: int = 0, longest: int = BUCKETS[-1][1]) -> float:
    """The share of right answers among buckets between these lengths in tokens."""
    chosen = [s for s in scores if shortest <= s.bucket[0] and s.bucket[1] <= longest]
    return sum(s.right for s in chosen) / sum(s.asked for s in chosen)


def table(scores: Sequence[Score]) -> str:
    """The scores as a Markdown table, one line for each bucket and one column for each kind."""
    lines = ["| prompt tokens | " + " | ".join(KINDS) + " | all |", "|---" + "|---:" * (len(KINDS) + 1) + "|"]
    for bucket in BUCKETS:
        row = [s for s in scores if s.bucket == bucket]
        cells = [f"{100 * s.right / s.asked:.1f} %" for s in row]
        cells.append(f"{100 * sum(s.right for s in row) / sum(s.asked for s in row):.1f} %")
        lines.append(f"| {bucket[0]} to {bucket[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
