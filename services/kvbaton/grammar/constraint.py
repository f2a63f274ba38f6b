"""One answer's place within a grammar."""

from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher

from kvbaton.engine.errors import InvalidArgumentError

_MAX_REASON = 300


class GrammarConstraint:
    """A `kvbaton.engine.constraint.Constraint`, over a matcher of its own."""

    def __init__(self, matcher: LLMatcher) -> None:
        """`matcher` is at the answer's start."""
        self._matcher = matcher

    def accept(self, token_id: int) -> None:
        """See `Constraint`.

        Raises InvalidArgumentError when the token does not fit, or the grammar is more than the library can go on with.
        """
        if not self._matcher.consume_token(token_id):
            reason = self._matcher.get_error().partition("\n")[0][:_MAX_REASON]
            raise InvalidArgumentError("structured_output", f"the answer cannot go on: {reason}")

    def fill(self, bitmask: Any, row: int) -> None:
        """See `Constraint`. After the last token only EOS is allowed.

        No token is when the library has given up on the grammar: it would take too long, or too much memory.
        """
        words = bitmask[row]
        self._matcher.unsafe_compute_mask_ptr(words.data_ptr(), words.numel() * words.element_size())
        if self._matcher.is_error():
            words.zero_()


class CompiledGrammar:
    """A grammar that can be followed; made by `GrammarCompiler`."""

    def __init__(self, matcher: LLMatcher) -> None:
        """`matcher` stays at the start, and is copied for each answer."""
        self._matcher = matcher

    def constraint(self, output: Sequence[int]) -> GrammarConstraint:
        """For an answer that has the tokens `output` already.

        Raises InvalidArgumentError when they do not fit the grammar.
        """
        matcher = self._matcher.deep_copy()
        num_fitting = matcher.try_consume_tokens(list(output))
        if num_fitting < len(output):
            raise InvalidArgumentError("output_token_ids", f"token {num_fitting} does not fit structured_output")
        return GrammarConstraint(matcher)
