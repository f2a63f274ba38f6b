"""A model that answers at random within a grammar, and comes to an end."""

import numpy as np
import torch

from kvbaton.engine.constraint import Constraint
from kvbaton.grammar.constraint import CompiledGrammar
from kvbaton.text.tokenizer import Tokenizer

EOS = 1
VOCAB, MODEL_VOCAB = 420, 450
"""Tokens of the tokenizer, and of the model, which has more."""

PATIENCE = 40
"""Tokens after which the model prefers those that close something."""


def allowed(constraint: Constraint, vocab_size: int = MODEL_VOCAB) -> list[int]:
    """Ids that the mask allows; no other row is touched."""
    bitmask = torch.full((3, (vocab_size + 31) // 32), -1, dtype=torch.int32)
    constraint.fill(bitmask, 1)
    assert bitmask[0].eq(-1).all()
    assert bitmask[2].eq(-1).all()
    bits = np.unpackbits(bitmask[1].numpy().view(np.uint8), bitorder="little")
    return [int(token_id) for token_id in np.flatnonzero(bits)]


class RandomModel:
    """Logits are noise, with a liking for EOS, and after a while for tokens that close."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int = MODEL_VOCAB) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        texts = [tokenizer.decode([token_id]) for token_id in range(vocab_size)]
        self._closing = np.array([float(text != "" and not set(text) - set('"]}')) for text in texts])

    def answer(self, constraint: Constraint, seed: int, max_tokens: int = 600) -> list[int]:
        """The tokens of an answer, EOS not included; it must end within `max_tokens`."""
        random = np.random.default_rng(seed)
        output: list[int] = []
        while len(output) < max_tokens:
            ids = np.array(allowed(constraint, self._vocab_size))
            assert len(ids), f"nothing can follow {self.text(output)!r}"
            logits = random.gumbel(size=len(ids)) + np.where(ids == EOS, 4.0, 0.0)
            if len(output) > PATIENCE:
                # Not each time: what is open may need something else first.
                logits += 20 * self._closing[ids] * (len(output) % 2) + np.where(ids == EOS, 100.0, 0.0)
            token_id = int(ids[logits.argmax()])
            constraint.accept(token_id)
            if token_id == EOS:
                return output
            output.append(token_id)
        raise AssertionError(f"no end after {max_tokens} tokens: {self.text(output)!r}")

    def text(self, output: list[int]) -> str:
        """As a client would see it."""
        return self._tokenizer.decode(output)

    def fits(self, grammar: CompiledGrammar, text: str) -> bool:
        """Whether `text` is a whole answer."""
        constraint = grammar.constraint([])
        # By characters: a text that spells a special token would else be that token.
        for token_id in [*(token_id for character in text for token_id in self._tokenizer.encode(character)), EOS]:
            if token_id not in allowed(constraint, self._vocab_size):
                return False
            constraint.accept(token_id)
        return True
