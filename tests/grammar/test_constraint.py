"""State within a grammar: made of the tokens alone, at an end only where the grammar is."""

import json

import pytest

from kvbaton.engine.errors import InvalidArgumentError
from kvbaton.engine.sampling import StructuredOutput
from kvbaton.grammar.compiler import GrammarCompiler
from kvbaton.text.tokenizer import Tokenizer
from support.grammars import EOS, MODEL_VOCAB, VOCAB, RandomModel, allowed
from support.random_schemas import random_schema
from support.tokenizers import byte_fallback

SPECS = [
    StructuredOutput("json_object", ""),
    StructuredOutput("regex", r"(ab|a|bc){3,}é?"),
    StructuredOutput("choice", "", ("the baton", "the bat", "接力")),
    StructuredOutput("grammar", 'start: "(" start ")" | /[0-9]+/'),
    *(StructuredOutput("json_schema", json.dumps(random_schema(seed))) for seed in (3, 12, 21, 30, 41)),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_a_state_is_that_of_its_tokens_at_every_cut(
    compiler: GrammarCompiler, model: RandomModel, spec: StructuredOutput
) -> None:
    grammar = compiler.compile(spec)
    output = model.answer(grammar.constraint([]), seed=5)
    masks, unbroken = [], grammar.constraint([])
    for token_id in [*output, EOS]:
        masks.append(allowed(unbroken))
        unbroken.accept(token_id)
    for cut in range(len(output) + 1):
        resumed = grammar.constraint(output[:cut])
        for expected, token_id in zip(masks[cut:], [*output[cut:], EOS], strict=True):
            assert allowed(resumed) == expected
            resumed.accept(token_id)


def test_nothing_but_eos_follows_a_whole_answer(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    constraint = compiler.compile(StructuredOutput("choice", "", ("the",))).constraint([])
    for token_id in tokenizer.encode("the"):
        assert EOS not in allowed(constraint)
        constraint.accept(token_id)
    for _ in range(3):
        assert allowed(constraint) == [EOS]
        constraint.accept(EOS)


def test_eos_is_allowed_where_the_answer_may_end_or_go_on(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    constraint = compiler.compile(StructuredOutput("regex", "(the)+")).constraint(tokenizer.encode("the"))
    assert {EOS, tokenizer.encode("the")[0]} <= set(allowed(constraint))


def test_every_eos_of_the_model_ends_an_answer(tokenizer: Tokenizer) -> None:
    grammar = GrammarCompiler(tokenizer, MODEL_VOCAB, frozenset({0, EOS})).compile(StructuredOutput("regex", "a?"))
    assert allowed(grammar.constraint(tokenizer.encode("a"))) == [0, EOS]


def test_ids_that_the_tokenizer_lacks_and_special_ones_are_never_allowed(compiler: GrammarCompiler) -> None:
    ids = allowed(compiler.compile(StructuredOutput("regex", "(?s:.)*")).constraint([]))
    assert max(ids) < VOCAB
    assert 0 not in ids
    assert EOS in ids


def test_output_that_does_not_fit_is_told(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = compiler.compile(StructuredOutput("regex", "[ab]+"))
    with pytest.raises(InvalidArgumentError, match="output_token_ids: token 1 does not fit structured_output"):
        grammar.constraint([tokenizer.encode("a")[0], tokenizer.encode("z")[0]])


def test_nothing_follows_a_token_that_does_not_fit(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    constraint = compiler.compile(StructuredOutput("regex", "[ab]+")).constraint([])
    with pytest.raises(InvalidArgumentError, match="structured_output: the answer cannot go on"):
        constraint.accept(tokenizer.encode("z")[0])
    assert allowed(constraint) == []


def test_answers_to_one_grammar_know_nothing_of_each_other(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = compiler.compile(StructuredOutput("choice", "", ("a", "b")))
    first, second = grammar.constraint([]), grammar.constraint([])
    first.accept(tokenizer.encode("a")[0])
    assert allowed(first) == [EOS]
    assert allowed(second) == sorted(tokenizer.encode("ab"))


def test_tokens_of_one_byte_each_spell_what_is_asked_for() -> None:
    tokenizer = Tokenizer(byte_fallback())
    model = RandomModel(tokenizer, 300)
    grammar = GrammarCompiler(tokenizer, 300, frozenset({EOS})).compile(StructuredOutput("choice", "", ("é 🎉", "z")))
    texts = {model.text(model.answer(grammar.constraint([]), seed)) for seed in range(20)}
    assert texts == {"é 🎉", "z"}
