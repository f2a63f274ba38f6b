"""Text of a growing token sequence, without ever showing half a character.

A token's text depends on its left neighbours (spaces, bytes of one character), so what is decoded is always a short run
of tokens, and what is new is its difference to the same run without the new tokens.
"""

from collections.abc import Sequence

from kvbaton.text.tokenizer import REPLACEMENT, Tokenizer

_CONTEXT_TOKENS = 6
"""Prompt tokens that prime the decoder: enough for any character's bytes and the space before a word."""


class IncrementalDetokenizer:
    """Turns output tokens into text as they come; a pure function of the prompt's tail and the tokens so far."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int]) -> None:
        """Without a tokenizer all text is empty."""
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-_CONTEXT_TOKENS:])
        # [0, _shown_from) settled, [_shown_from, _shown_to) shown and still context, [_shown_to, ...) not shown yet
        self._shown_from = 0
        self._shown_to = len(self._tokens)

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; return the text that has become certain."""
        if self._tokenizer is None:
            return ""
        self._tokens.extend(token_ids)
        shown = self._tokenizer.decode(self._tokens[self._shown_from : self._shown_to])
        text = self._tokenizer.decode(self._tokens[self._shown_from :])
        if text.endswith(REPLACEMENT) or len(text) <= len(shown):
            return ""
        self._shown_from, self._shown_to = self._shown_to, len(self._tokens)
        return text[len(shown) :]

    def flush(self) -> str:
        """What was held back, as the decoder shows it; to be asked once, after the last token."""
        if self._tokenizer is None:
            return ""
        shown = self._tokenizer.decode(self._tokens[self._shown_from : self._shown_to])
        text = self._tokenizer.decode(self._tokens[self._shown_from :])
        self._shown_from = self._shown_to = len(self._tokens)
        return text[len(shown) :]
