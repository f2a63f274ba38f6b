"""Bad and hostile grammars are refused, by field and in bounded work; good ones are kept."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kvbaton.engine.errors import InvalidArgumentError
from kvbaton.engine.sampling import StructuredOutput
from kvbaton.grammar.compiler import MAX_CACHED, GrammarCompiler
from kvbaton.text.tokenizer import Tokenizer
from support.grammars import EOS, MODEL_VOCAB, allowed


def schema(value: Any) -> StructuredOutput:
    return StructuredOutput("json_schema", value if isinstance(value, str) else json.dumps(value))


def regex(text: str) -> StructuredOutput:
    return StructuredOutput("regex", text)


def lark(text: str) -> StructuredOutput:
    return StructuredOutput("grammar", text)


def links(count: int, link: Any) -> StructuredOutput:
    """A chain of definitions, each `link` of the next."""
    definitions = {f"d{n}": link({"$ref": f"#/$defs/d{n + 1}"}) for n in range(count)}
    return schema({"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{count}": {"type": "null"}}})


WRONG = [
    (schema('{"type": '), "is not JSON"),
    (schema("[" * 30_000), "is not JSON"),
    (schema('{"const": ' + "[" * 900 + "]" * 900 + "}"), ""),
    (schema('{"const": "\\ud800"}'), "hex escape"),
    (schema("false"), "no answer satisfies it"),
    (schema({"type": "foo"}), "Invalid type: foo"),
    (schema({"type": "string", "format": "idn-email"}), "Unknown format: idn-email"),
    (schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "use anyOf"),
    (schema({"allOf": [{"type": "string"}, {"type": "integer"}]}), "incompatible types"),
    (schema({"$ref": "#"}), "no answer satisfies it"),
    (schema({"pattern": "("}), "unclosed group"),
    (regex("("), "unclosed group"),
    (regex("(?=a)b"), "look-ahead"),
    (regex(r"(a)\1"), "backreferences are not supported"),
    (regex("a\\"), "lone backslash"),
    (regex("a" * 5_000), "5000 characters are more than 4096"),
    (lark('start: "' + "a" * 17_000 + '"'), "characters are more than 16384"),
    (lark("// nothing"), "no start rule"),
    (lark("start: foo"), 'at 1(8): unknown name: "foo"'),
    (lark('start: "a'), "'\"' is not supported"),
    (lark('start: %json {"type": "object"}'), "'%json' is not supported"),
    (lark('start: a <eos>\na: "x"'), "'<' is not supported"),
    (lark("start: a\na[lazy]: /x*/"), "'[' is not supported"),
    (lark('start: A\nA: /x\n/ %json {"type": "object"} /y/'), "'/' is not supported"),
    (lark('start: "x\n" %json {"type": "object"} "y"'), "is not supported"),
    (lark('{"grammars": []}'), "'[' is not supported"),
    (lark("start: a\na: start"), "no answer satisfies it"),
]


@pytest.mark.parametrize(("spec", "problem"), WRONG)
def test_what_is_wrong_is_said_by_field(compiler: GrammarCompiler, spec: StructuredOutput, problem: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        compiler.compile(spec)
    assert caught.value.field == f"structured_output.{spec.kind}"
    assert problem in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


EXPLODING = [
    regex("(a{1,1000}){1,1000}"),
    regex("((((a?){50}){50}){50}){50}"),
    regex("(" * 1000 + "a" + "?)" * 1000),
    regex("(a?b*)" * 600),
    schema({"type": "integer", "multipleOf": 7907}),
    schema({"type": "string", "allOf": [{"pattern": f"^(a|b)*a(a|b){{{n}}}$"} for n in range(5, 17)]}),
    schema({"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(2_000)}}),
    schema({"allOf": [{"anyOf": [{"required": [f"{n}{m}"]} for n in range(8)]} for m in range(8)]}),
    schema({"patternProperties": {f"(a|b)*a(a|b){{{n}}}$": {} for n in range(10, 16)}}),
    schema('{"items":' * 900 + "{}" + "}" * 900),
    links(900, lambda reference: {"properties": {"a": reference}}),
    links(900, lambda reference: {"anyOf": [reference, {"type": "string"}]}),
    links(900, lambda reference: {"allOf": [reference, {}]}),
    lark('start: a\na: a a a | a a | "x" | \n'),
    lark("start: a{1,1000}\na: b{1,1000}\nb: c{1,1000}\nc: /x/"),
    lark("start: " + "(" * 400 + '"a"' + ")" * 400),
    lark("start: R0\n" + "\n".join(f"R{n}: R{n + 1} R{n + 1}" for n in range(40)) + '\nR40: "x"'),
    lark("start: r0\n" + "\n".join(f"r{n}: r{n + 1}" for n in range(900)) + '\nr900: "x"'),
]


@pytest.mark.parametrize("spec", EXPLODING, ids=lambda spec: f"{spec.kind}-{spec.text[:20]}")
def test_what_explodes_is_refused(compiler: GrammarCompiler, spec: StructuredOutput) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        compiler.compile(spec)
    assert caught.value.field == f"structured_output.{spec.kind}"


HARMLESS = [
    regex("(x+x+)+y"),
    regex("[ab]*a[ab]{500}"),
    regex("(ab|cd|ef){0,65535}"),
    schema({"type": "string", "maxLength": 10**9}),
    schema({"type": "array", "minItems": 10**9}),
    schema({"enum": [f"choice {n}" for n in range(3_000)]}),
    schema({"$ref": "#/$defs/d0", "$defs": {"d0": {"properties": {"a": {"$ref": "#/$defs/d0"}}}}}),
    StructuredOutput("choice", "", tuple(f"choice {n}" for n in range(1_024))),
    StructuredOutput("choice", "", ("x" * 65_000,)),
    links(100, lambda reference: {"items": reference}),
]


@pytest.mark.parametrize("spec", HARMLESS, ids=lambda spec: f"{spec.kind}-{spec.text[:20]}")
def test_what_only_looks_dangerous_is_compiled(compiler: GrammarCompiler, spec: StructuredOutput) -> None:
    assert allowed(compiler.compile(spec).constraint([]))


def test_a_grammar_that_gives_out_later_allows_nothing(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """Not even EOS, which would pass half an answer off as a whole one."""
    constraint = compiler.compile(regex("[a-z]{300}!(a{1,1000}){1,1000}")).constraint([])
    for token_id in tokenizer.encode("a" * 300 + "!"):
        assert token_id in allowed(constraint)
        constraint.accept(token_id)

    def go_on() -> None:
        for token_id in tokenizer.encode("a" * 100):
            constraint.accept(token_id)

    with pytest.raises(InvalidArgumentError, match="structured_output: the answer cannot go on: lexer error"):
        go_on()
    assert allowed(constraint) == []


def test_the_most_recently_used_are_kept(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, MODEL_VOCAB, frozenset({EOS}))
    first = compiler.compile(regex("a"))
    second = compiler.compile(regex("b"))
    for number in range(MAX_CACHED - 1):
        compiler.compile(regex(str(number)))
        assert compiler.compile(regex("a")) is first
    assert compiler.compile(regex("b")) is not second
    assert compiler.compile(StructuredOutput("choice", "", ("a",))) is not first


def test_threads_may_compile_at_once(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, MODEL_VOCAB, frozenset({EOS}))
    together = threading.Barrier(4)

    def compile_one(number: int) -> list[int]:
        together.wait()
        return allowed(compiler.compile(regex("ab"[number % 2])).constraint([]))

    with ThreadPoolExecutor(4) as pool:
        masks = list(pool.map(compile_one, range(4)))
    assert masks == [tokenizer.encode("a"), tokenizer.encode("b")] * 2


def test_a_model_that_can_follow_no_grammar_says_why(tokenizer: Tokenizer) -> None:
    for lacking, problem in [
        (GrammarCompiler(None, MODEL_VOCAB, frozenset({EOS})), "no tokenizer"),
        (GrammarCompiler(tokenizer, MODEL_VOCAB, frozenset()), "no end-of-sequence token"),
        (GrammarCompiler(tokenizer, 100, frozenset({EOS})), "vocab size too small"),
    ]:
        with pytest.raises(InvalidArgumentError, match=problem) as caught:
            lacking.compile(regex("a"))
        assert caught.value.field == "structured_output"
