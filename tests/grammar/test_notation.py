"""Regular expressions, choices and grammars: every answer is one of theirs."""

import re

import pytest

from kvbaton.engine.sampling import StructuredOutput
from kvbaton.grammar.compiler import GrammarCompiler
from support.grammars import RandomModel

EXPRESSIONS = [
    "[a-c]{2,5}",
    "(foo|bar)+x?",
    r"\d{4}-\d{2}-\d{2}",
    r"^\w+@\w+\.(org|com)$",
    "é🎉*接",
    "(?:)",
    r"a/b\\c\n",
    "(?i)top|no",
    r"[^\s]{3}",
    r"a*?b",
    ".{0,10}",
    "<eos>",
    r"\{\"a\": [01]\}",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_whole_answer_matches_the_expression(compiler: GrammarCompiler, model: RandomModel, expression: str) -> None:
    grammar = compiler.compile(StructuredOutput("regex", expression))
    for seed in range(15):
        text = model.text(model.answer(grammar.constraint([]), seed))
        assert re.fullmatch(expression, text, re.ASCII), text


CHOICES = ("yes", "no", "no way", 'q"uo\\te', "new\nline\x7f", "/slash/ (a|b)* [x] {3}", "é🎉接", "<eos>", " a ")


def test_an_answer_is_one_of_the_choices(compiler: GrammarCompiler, model: RandomModel) -> None:
    grammar = compiler.compile(StructuredOutput("choice", "", CHOICES))
    answers = {model.text(model.answer(grammar.constraint([]), seed)) for seed in range(60)}
    assert len(answers) > 3
    assert answers <= set(CHOICES)
    for choice in CHOICES:
        assert model.fits(grammar, choice)
        assert not model.fits(grammar, choice + "x")


ARITHMETIC = """
// Sums of products
start: sum
sum: product (("+" | "-") product)*
product: atom | product "*" atom
atom: NUMBER | "(" sum ")" | LETTERS{2}
NUMBER: /[0-9]{1,3}/   # not too long
LETTERS: "x".."z"
%ignore / /
"""


def test_an_answer_is_a_sentence_of_the_grammar(compiler: GrammarCompiler, model: RandomModel) -> None:
    grammar = compiler.compile(StructuredOutput("grammar", ARITHMETIC))
    for text in ("1", "12 + 3*(4-xy)", "((1))"):
        assert model.fits(grammar, text)
    for text in ("", "1+", "1234", "x", "(1", "a"):
        assert not model.fits(grammar, text)


def test_every_kind_of_text_may_stand_in_a_grammar_s_strings(compiler: GrammarCompiler, model: RandomModel) -> None:
    grammar = compiler.compile(StructuredOutput("grammar", 'start: "%json <eos> @a[0]" /[%<@]/ // %json [lazy]\n'))
    assert model.fits(grammar, "%json <eos> @a[0]%")
