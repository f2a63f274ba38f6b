"""Training batches for the bundled model: copying, then stories with questions.

Both kinds are token ids with a mask of the positions that are learnt. Batches are of equal budget in tokens and of
nearly equal lengths, so that little of them is padding.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from tiny_stories import TOKENS_PER_FACT, Fact, story_text, training_facts
from tiny_tokenizer import ASSISTANT, BEGIN, END, PAD, SPECIAL_TOKENS, SYSTEM_TEXTS, render_chat

TOKENS_PER_TURN = 16
"""Mean length of a question with its answer and the chat template around them."""
PLAIN_SHARE = 0.1
"""Share of stories that are plain text rather than a chat."""
SYSTEM_SHARE = 0.15
"""Share of chats that open with a system message."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded token ids (rows, length), and which of them the loss counts, shifted to their predictors."""

    ids: torch.Tensor
    learnt: torch.Tensor
    """True where the *next* token is to be predicted (rows, length)."""


def pad_rows(rows: list[list[int]], masks: list[list[bool]], pad: int) -> Batch:
    """Rows of different lengths as one batch; a mask says which tokens of its row are learnt."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    mask = torch.tensor([row + [False] * (length - len(row)) for row in masks])
    learnt = torch.zeros_like(mask)
    learnt[:, :-1] = mask[:, 1:]
    return Batch(ids, learnt)


class Batches:
    """A seeded source of batches of about ``budget`` tokens."""

    def __init__(self, tokenizer: Any, seed: int, budget: int) -> None:
        self._rng = random.Random(seed)
        self._tokenizer = tokenizer
        self._budget = budget
        self._pad, self._begin, self._end, self._assistant = (
            tokenizer.convert_tokens_to_ids(token) for token in (PAD, BEGIN, END, ASSISTANT)
        )
        self._first_plain, self._vocab = len(SPECIAL_TOKENS), len(tokenizer)

    def _rows(self, length: int) -> int:
        return max(6, min(64, self._budget // length))

    def copying(self, most: int) -> Batch:
        """Up to ``most`` random tokens and then the same tokens again; the second time they are learnt.

        Copying needs no language, only a look back at what followed the same token before: attention heads that do
        so are what recall is made of, and stories alone do not form them at this size.
        """
        rows, masks = [], []
        for _ in range(min(32, self._rows(2 * most))):
            length = self._rng.randint(8, most)
            part = [self._rng.randrange(self._first_plain, self._vocab) for _ in range(length)]
            rows.append([self._begin, *part, *part])
            # The first token of the second copy cannot be foreseen.
            masks.append([False] * (length + 2) + [True] * (length - 1))
        return pad_rows(rows, masks, self._pad)

    def stories(self, least: int, most: int, questions: int) -> Batch:
        """Stories of ``least`` to ``most`` facts, each with up to so many questions as the turns of one chat."""
        facts = self._rng.randint(least, most)
        tokens = round(facts * TOKENS_PER_FACT) + TOKENS_PER_TURN * questions
        texts = [self._text(facts, questions) for _ in range(self._rows(tokens))]
        rows = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return pad_rows(rows, [self._answers(row) for row in rows], self._pad)

    def _text(self, count: int, questions: int) -> str:
        facts = training_facts(self._rng, count)
        asked = self._rng.sample(facts, min(questions, count))
        if self._rng.random() < PLAIN_SHARE:
            fact = asked[0]
            return f"{BEGIN}{story_text(facts)} {fact.question} {fact.sentence}{END}"
        return render_chat(self._turns(facts, asked))

    def _turns(self, facts: list[Fact], asked: list[Fact]) -> list[tuple[str, str]]:
        system = self._rng.random() < SYSTEM_SHARE
        turns = [("system", self._rng.choice(SYSTEM_TEXTS))] if system else []
        told = story_text(facts) + " "
        for fact in asked:
            turns += [("user", told + fact.question), ("assistant", fact.sentence)]
            told = ""
        return turns

    def _answers(self, row: list[int]) -> list[bool]:
        """The assistant's tokens with their end; in plain text, what follows the question."""
        if self._assistant not in row:
            # Plain text ends with one answer, of as many tokens as lie after the question mark.
            start = len(row) - row[::-1].index(self._question_mark)
            return [index >= start for index in range(len(row))]
        mask, answering = [], False
        for token in row:
            mask.append(answering)
            answering = token == self._assistant or (answering and token != self._end)
        return mask

    @property
    def _question_mark(self) -> int:
        return int(self._tokenizer.convert_tokens_to_ids("?"))
