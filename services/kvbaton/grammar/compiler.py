"""Grammars for one model's vocabulary, compiled in bounded time and memory.

llguidance reads a grammar lazily: much of the work is done, and its limits are met, when masks are computed. So each
grammar is rehearsed with made-up answers, and one that exhausts the library is refused and not begun.
"""

import re
import threading
from collections import OrderedDict

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from kvbaton.engine.errors import InvalidArgumentError
from kvbaton.engine.sampling import StructuredOutput
from kvbaton.grammar.constraint import CompiledGrammar
from kvbaton.grammar.notation import field_of, lark_of
from kvbaton.text.tokenizer import Tokenizer

MAX_CACHED = 32
"""Compiled grammars that are kept, the least recently used goes first."""

_REHEARSALS, _REHEARSED_TOKENS = 2, 64
_MAX_REASON = 300
_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")


def _limits(kind: str) -> LLParserLimits:
    # A grammar's rules may be ambiguous without end, and each token then takes longer than the last; schemas are not.
    ambiguous = kind == "grammar"
    return LLParserLimits(
        # Work on regular expressions, to compile and for one mask: 14,000 to 50,000 are a millisecond.
        initial_lexer_fuel=300_000,
        step_lexer_fuel=50_000,
        # States of their automata, of 1 to 2 kB, for one answer.
        max_lexer_states=20_000,
        max_grammar_size=50_000,
        # Ways to read the text so far that the Earley parser keeps: for one mask, and at one place.
        step_max_items=20_000 if ambiguous else 50_000,
        max_items_in_row=250 if ambiguous else 2_000,
        verbose_errors=False,
    )


class GrammarCompiler:
    """Compiles grammars, from any thread, and keeps those used last."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        """`vocab_size` is the model's: it may be larger than the tokenizer's, and the rest is never allowed."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._vocabulary: LLTokenizer | None = None
        self._cached: OrderedDict[StructuredOutput, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, spec: StructuredOutput) -> CompiledGrammar:
        """May take a second, a few at the first call: not for an event loop.

        Raises InvalidArgumentError that names the field when the grammar is wrong, not supported or too complex, or
        when the model cannot follow any.
        """
        with self._lock:
            vocabulary = self._vocabulary = self._vocabulary or self._read_vocabulary()
            if spec in self._cached:
                self._cached.move_to_end(spec)
                return self._cached[spec]
        compiled = CompiledGrammar(self._build(spec, vocabulary))
        with self._lock:
            self._cached[spec] = compiled
            if len(self._cached) > MAX_CACHED:
                self._cached.popitem(last=False)
        return compiled

    def _build(self, spec: StructuredOutput, vocabulary: LLTokenizer) -> LLMatcher:
        matcher = LLMatcher(vocabulary, lark_of(spec), log_level=0, limits=_limits(spec.kind))
        if matcher.is_error():
            raise InvalidArgumentError(field_of(spec), _refusal(matcher.get_error(), spec.kind))
        for seed in range(_REHEARSALS):
            problem = self._rehearse(matcher.deep_copy(), seed)
            if problem is not None:
                raise InvalidArgumentError(field_of(spec), problem)
        return matcher

    def _rehearse(self, matcher: LLMatcher, seed: int) -> str | None:
        """Follow an answer of arbitrary tokens, the same for the same seed; return what came in its way."""
        words = np.zeros((self._vocab_size + 31) // 32, np.uint32)
        random = np.random.default_rng(seed)
        for _ in range(_REHEARSED_TOKENS):
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            for eos in self._eos_token_ids:
                words[eos // 32] &= ~np.uint32(1 << eos % 32)
            token_id = _arbitrary(words, random)
            if matcher.is_error() or (token_id is not None and not matcher.consume_token(token_id)):
                return _exhaustion(matcher.get_error())
            if token_id is None:
                break
        return None

    def _read_vocabulary(self) -> LLTokenizer:
        definition = None if self._tokenizer is None else self._tokenizer.definition()
        if definition is None or not self._eos_token_ids:
            lack = "no end-of-sequence token" if definition is not None else "no tokenizer that could follow it"
            raise InvalidArgumentError("structured_output", f"the model has {lack}")
        try:
            return LLTokenizer(definition, n_vocab=self._vocab_size, eos_token=sorted(self._eos_token_ids))
        except ValueError as error:
            raise InvalidArgumentError(
                "structured_output", f"the model's tokenizer cannot follow it: {str(error)[:_MAX_REASON]}"
            ) from error


def _arbitrary(words: NDArray[np.uint32], random: np.random.Generator) -> int | None:
    """One of the bits that are set; not each with the same probability."""
    places = np.flatnonzero(words)
    if not len(places):
        return None
    place = int(random.choice(places))
    return 32 * place + int(random.choice([bit for bit in range(32) if int(words[place]) >> bit & 1]))


def _refusal(message: str, kind: str) -> str:
    """What is wrong with a grammar, from the library's message."""
    if "coerce_one_of" in message:
        return "oneOf is supported only where no two alternatives can be right at once; use anyOf"
    reason = message.partition("\n")[0]
    # The regular expressions' parser draws a picture before it says what is wrong.
    error = message.partition("\nerror: ")[2].partition("\n")[0]
    if error:
        reason = f"{reason} {error}"
    # Places are places in the caller's text for a grammar only.
    return (reason if kind == "grammar" else _PLACE.sub("", reason))[:_MAX_REASON]


def _exhaustion(message: str) -> str:
    """Why a rehearsal failed."""
    if message.startswith("NoExtension"):
        return "no answer satisfies it"
    return f"is too complex: {message.splitlines()[0] if message else 'no answer can be found'}"[:_MAX_REASON]
