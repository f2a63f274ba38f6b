"""Text of a growing token sequence, without ever showing half a character.

A token's text depends on its left neighbours (spaces, bytes of one character), so what is decoded is always a short run
of tokens, and what is new is what goes beyond the characters of that run which were shown already. What is shown
depends on the sequence alone, not on where the prompt ends in it, so that a resumed request continues where it was: a
character that the prompt leaves half done is shown whole once it is complete.
"""

import itertools
from collections.abc import Sequence

from kvbaton.text.tokenizer import REPLACEMENT, Tokenizer

_CHARACTER_BYTES = 4
_MAX_HELD = 2 * _CHARACTER_BYTES - 1
"""Replacement characters at the end that may still become text. Some decoders show one for each byte, and for the bytes
of the character before, too, until the last character is complete."""
_CONTEXT_TOKENS = 32
"""Tokens that tell a character's bytes from a longer run of broken ones: of the prompt they prime the decoder, and of
such a run they are kept."""


class IncrementalDetokenizer:
    """Turns output tokens into text as they come; a pure function of the prompt's tail and the tokens so far."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int]) -> None:
        """Without a tokenizer all text is empty."""
        self._tokenizer = tokenizer
        # The run that is decoded.
        self._tokens: list[int] = []
        # Where in it the text was last complete: what lies before may be forgotten when it is so again.
        self._settled = 0
        # Characters of the run's text that were shown.
        self._shown = 0
        if tokenizer is not None:
            self._prime(prompt, tokenizer)

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; return the text that has become certain."""
        if self._tokenizer is None:
            return ""
        return "".join([self._push(token_id, self._tokenizer) for token_id in token_ids])

    def flush(self) -> str:
        """What was held back, as the decoder shows it; to be asked once, after the last token."""
        if self._tokenizer is None:
            return ""
        text = self._tokenizer.decode(self._tokens)
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new

    def _push(self, token_id: int, tokenizer: Tokenizer) -> str:
        if token_id in tokenizer.special_token_ids:
            # As the decoder does; an answer may go on after its end, and have thousands of them.
            return ""
        self._tokens.append(token_id)
        text = tokenizer.decode(self._tokens)
        held = min(len(text) - len(text.rstrip(REPLACEMENT)), _MAX_HELD)
        certain = len(text) - held
        new = text[self._shown : certain]
        self._shown = max(self._shown, certain)
        if new and not held:
            del self._tokens[: self._settled]
            self._settled = len(self._tokens)
            self._shown = len(tokenizer.decode(self._tokens))
        elif len(self._tokens) == 2 * _CONTEXT_TOKENS:
            # Broken bytes without end: what lies far back has no say in what comes.
            del self._tokens[:_CONTEXT_TOKENS]
            self._settled = 0
            self._shown -= len(text) - len(tokenizer.decode(self._tokens))
        return new

    def _prime(self, prompt: Sequence[int], tokenizer: Tokenizer) -> None:
        backwards = (token_id for token_id in reversed(prompt) if token_id not in tokenizer.special_token_ids)
        tail = list(itertools.islice(backwards, _CONTEXT_TOKENS + _CHARACTER_BYTES - 1))[::-1]
        for count in range(1, 1 + min(2 * _CHARACTER_BYTES, len(tail))):
            text = tokenizer.decode(tail[-count:])
            if text and REPLACEMENT not in text:
                self._tokens, self._settled, self._shown = tail[-count:], count, len(text)
                return
        # The prompt's end is not certain: take its tail as if it had been pushed, from the start of a character on.
        starts = range(min(_CHARACTER_BYTES, len(tail)))
        start = next((at for at in starts if _starts_character(tail[at : at + _CHARACTER_BYTES], tokenizer)), 0)
        for token_id in tail[start:]:
            self._push(token_id, tokenizer)


def _starts_character(token_ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    return any(REPLACEMENT not in tokenizer.decode(token_ids[:stop]) for stop in range(1, len(token_ids) + 1))
