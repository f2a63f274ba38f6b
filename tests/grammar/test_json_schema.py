"""What comes out is right by its schema, and what cannot be enforced is refused by name."""

import json
import re
from typing import Any

import jsonschema
import pytest

from kvbaton.engine.errors import InvalidArgumentError
from kvbaton.engine.sampling import StructuredOutput
from kvbaton.grammar.compiler import GrammarCompiler
from kvbaton.grammar.json_schema import MAX_LEVELS, check_schema
from support.grammars import RandomModel
from support.random_schemas import random_schema

SEEDS = range(260)
FIELD = "structured_output.json_schema"


def refusal(schema: Any) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        check_schema(schema, FIELD)
    assert caught.value.field == FIELD
    return str(caught.value)


def answers(compiler: GrammarCompiler, model: RandomModel, schema: Any, count: int) -> list[str]:
    grammar = compiler.compile(StructuredOutput("json_schema", json.dumps(schema)))
    return [model.text(model.answer(grammar.constraint([]), seed)) for seed in range(count)]


def test_every_answer_is_right_by_its_schema(compiler: GrammarCompiler, model: RandomModel) -> None:
    num_schemas = 0
    for seed in SEEDS:
        schema = random_schema(seed)
        try:
            texts = answers(compiler, model, schema, 3)
        except InvalidArgumentError:
            continue
        num_schemas += 1
        for text in texts:
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    assert num_schemas >= 200


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "object", "required": ["a"]}, '{"a":1}', "{}"),
        ({"allOf": [{"type": "integer"}, {"minimum": 5}]}, "6", "4"),
        ({"type": "string", "pattern": "^a+$", "maxLength": 3}, '"aaa"', '"aaaa"'),
        ({"type": "integer", "multipleOf": 7}, "21", "22"),
        ({"type": "string", "format": "ipv4"}, '"1.2.3.4"', '"1.2.3.456"'),
        ({"type": "string", "maxLength": 1}, '"\\u0001"', '"aa"'),
        ({"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": False}, '{"a":1}', '{"b":1}'),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "const": "é"}, '"é"', '"e"'),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "null"}}}, "null", "1"),
    ],
)
def test_a_keyword_is_enforced(
    compiler: GrammarCompiler, model: RandomModel, schema: Any, right: str, wrong: str
) -> None:
    grammar = compiler.compile(StructuredOutput("json_schema", json.dumps(schema)))
    assert model.fits(grammar, right)
    assert not model.fits(grammar, wrong)


@pytest.mark.parametrize(
    "schema",
    [
        {"uniqueItems": True},
        {"contains": {"type": "integer"}},
        {"unevaluatedItems": False},
        {"additionalItems": False},
        {"propertyNames": {"pattern": "^a"}},
        {"dependentRequired": {"a": ["b"]}},
        {"dependentSchemas": {"a": {}}},
        {"unevaluatedProperties": False},
        {"not": {"type": "integer"}},
        {"if": {"type": "integer"}},
        {"$dynamicRef": "#a"},
        {"$anchor": "a"},
        {"nullable": True},
        {"x-guidance": {"lenient": True}},
        {"requird": ["a"]},
    ],
)
def test_a_keyword_that_is_not_supported_is_named_wherever_it_stands(schema: Any) -> None:
    keyword = next(iter(schema))
    assert f"#: the keyword '{keyword}' is not supported" in refusal(schema)
    for around, place in [
        ({"anyOf": [{"type": "string"}, schema]}, "#/anyOf/1"),
        ({"properties": {"a/b": {"items": schema}}}, "#/properties/a~1b/items"),
        ({"additionalProperties": schema}, "#/additionalProperties"),
        ({"patternProperties": {"^a": schema}}, "#/patternProperties/^a"),
        ({"$ref": "#/$defs/a", "$defs": {"a": schema}}, "#/$defs/a"),
    ]:
        assert f"{place}: the keyword '{keyword}' is not supported" in refusal(around)


def test_names_and_values_that_look_like_keywords_are_none() -> None:
    check_schema(
        {
            "properties": {"not": {"const": {"uniqueItems": 1}}, "if": {"enum": [{"contains": 1}]}},
            "default": {"not": 1},
            "examples": [{"if": 2}],
        },
        FIELD,
    )


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        (5, "# is neither an object nor true or false"),
        ({"items": [{}]}, "#/items is neither an object nor"),
        ({"properties": []}, "#/properties is not an object"),
        ({"anyOf": {}}, "#/anyOf is not an array"),
        ({"$ref": "https://example.org/schema"}, "does not start with '#/'"),
        ({"$ref": "#/default", "default": {"not": {}}}, "there is no schema at #/default"),
        ({"properties": {"a": {"$id": "b"}}}, "'$id' is not supported"),
        ({"$schema": "http://json-schema.org/draft-04/schema#"}, "is none of draft-06"),
        ({"exclusiveMinimum": True}, "exclusiveMinimum is not a number"),
        ({"multipleOf": 0}, "multipleOf is not a number above 0"),
        ({"multipleOf": 1e300}, "multipleOf: the least common multiple"),
        ({"allOf": [{"multipleOf": 997}, {"multipleOf": 0.03}]}, "multipleOf: the least common multiple"),
        ({"minProperties": 2, "required": ["a"]}, "minProperties above 1 is not supported"),
    ],
)
def test_what_cannot_be_done_is_said(schema: Any, problem: str) -> None:
    assert problem in refusal(schema)


def test_references_cannot_pile_up_levels() -> None:
    def chain(length: int) -> Any:
        links = {f"d{n}": {"items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(length)}
        return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {"type": "null"}}}

    check_schema(chain(MAX_LEVELS // 2 - 4), FIELD)
    assert "nested more than" in refusal(chain(MAX_LEVELS // 2))


def test_whitespace_cannot_go_on_for_ever(compiler: GrammarCompiler, model: RandomModel) -> None:
    grammar = compiler.compile(StructuredOutput("json_schema", '{"type": "array", "items": {"type": "integer"}}'))
    assert model.fits(grammar, "[1, 2]")
    assert model.fits(grammar, "[\n  1,\n  2\n]")
    assert not any(
        model.fits(grammar, text) for text in ("[  1]", "[\n\n1]", "[\t1]", " [1]", "[1]\n", f"[\n{' ' * 17}1]")
    )


def test_any_object_is_an_object(compiler: GrammarCompiler, model: RandomModel) -> None:
    grammar = compiler.compile(StructuredOutput("json_object", ""))
    for seed in range(20):
        assert isinstance(json.loads(model.text(model.answer(grammar.constraint([]), seed))), dict)
    assert not model.fits(grammar, "[]")


def test_a_pattern_is_that_of_the_value_and_not_of_its_spelling(compiler: GrammarCompiler, model: RandomModel) -> None:
    schema = {"type": "string", "pattern": '^["\\\\\n]{3}$'}
    for text in answers(compiler, model, schema, 10):
        assert re.fullmatch('["\\\\\n]{3}', json.loads(text))
