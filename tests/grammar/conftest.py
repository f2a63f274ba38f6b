"""A vocabulary with tokens that JSON takes, and a model that is larger than it."""

import pytest

from kvbaton.grammar.compiler import GrammarCompiler
from kvbaton.text.tokenizer import Tokenizer
from support.grammars import EOS, MODEL_VOCAB, VOCAB, RandomModel
from support.tokenizers import LINES, train

JSON_LINES = [
    '{"name": "Zoë", "kind": "runner", "age": 31, "tags": ["a", "b"], "two words": null}',
    '[{"a":1,"b":[2.5,-3,true]},{"a":{},"é":false}]',
    '{\n  "a": [\n    1,\n    2\n  ],\n  "b": ""\n}',
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level BPE."""
    return Tokenizer(train(None, LINES + JSON_LINES * 3, VOCAB))


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> RandomModel:
    """Answers at random."""
    return RandomModel(tokenizer)


@pytest.fixture(scope="session")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    """For that model."""
    return GrammarCompiler(tokenizer, MODEL_VOCAB, frozenset({EOS}))
