"""Text of a growing token sequence, without ever showing half a character.

A token's text depends on its left neighbours (spaces, bytes of one character), so what is decoded is always a short run
of tokens, and what is new is what goes beyond the characters of that run which were shown already. What is shown
depends on the sequence alone, not on where the prompt ends in it, so that a resumed request continues where it was: a
character that the prompt leaves half done is shown whole once it is complete.
"""

from collections.abc import Sequence

from kvbaton.text.tokenizer import REPLACEMENT, Tokenizer

_MAX_HELD = 3
"""Replacement characters at the end that may still become one character: some decoders show one a byte."""
_CHARACTER_BYTES = 4
_CONTEXT_TOKENS = 16
"""Prompt tokens that prime the decoder: enough to tell the bytes of one character from a run of broken ones."""


class IncrementalDetokenizer:
    """Turns output tokens into text as they come; a pure function of the prompt's tail and the tokens so far."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int]) -> None:
        """Without a tokenizer all text is empty."""
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-_CONTEXT_TOKENS:])
        # Where the text was last complete: what lies before may be forgotten when it is so again.
        self._settled = len(self._tokens)
        # Characters of the tokens' text that were shown.
        self._shown = 0
        if tokenizer is not None:
            text = tokenizer.decode(self._tokens)
            self._shown = len(text)
            if text.endswith(REPLACEMENT):
                self._replay(prompt[-_CONTEXT_TOKENS - _CHARACTER_BYTES + 1 :], tokenizer)

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; return the text that has become certain."""
        if self._tokenizer is None:
            return ""
        self._tokens.extend(token_ids)
        text = self._tokenizer.decode(self._tokens)
        held = min(len(text) - len(text.rstrip(REPLACEMENT)), _MAX_HELD)
        certain = len(text) - held
        new = text[self._shown : certain]
        self._shown = max(self._shown, certain)
        if new and not held:
            del self._tokens[: self._settled]
            self._settled = len(self._tokens)
            self._shown = len(self._tokenizer.decode(self._tokens))
        return new

    def flush(self) -> str:
        """What was held back, as the decoder shows it; to be asked once, after the last token."""
        if self._tokenizer is None:
            return ""
        text = self._tokenizer.decode(self._tokens)
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new

    def _replay(self, tail: Sequence[int], tokenizer: Tokenizer) -> None:
        """Take a prompt whose end is not certain as if its tail had been pushed, from the start of a character on."""
        starts = range(min(_CHARACTER_BYTES, len(tail)))
        start = next((at for at in starts if _starts_character(tail[at : at + _CHARACTER_BYTES], tokenizer)), 0)
        self._tokens, self._settled, self._shown = [], 0, 0
        for token_id in tail[start:]:
            self.push([token_id])


def _starts_character(token_ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    return any(REPLACEMENT not in tokenizer.decode(token_ids[:stop]) for stop in range(1, len(token_ids) + 1))
