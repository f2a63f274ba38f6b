"""One answer's place within a grammar."""

from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher

from kvbaton.engine.errors import InvalidArgumentError


class GrammarConstraint:
    """A `kvbaton.engine.constraint.Constraint`, over a matcher of its own."""

    def __init__(self, matcher: LLMatcher) -> None:
        """`matcher` is at the answer's start."""
        self._matcher = matcher

    def accept(self, token_id: int) -> None:
        """See `Constraint`. A token that does not fit leaves an answer that nothing can follow."""
        self._matcher.consume_token(token_id)

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
        for index, token_id in enumerate(output):
            if not matcher.consume_token(token_id):
                raise InvalidArgumentError("output_token_ids", f"token {index} does not fit structured_output")
        return GrammarConstraint(matcher)
