"""Every kind of structured output as one notation, that of llguidance's variety of Lark grammars.

Nothing is forced: where the text is determined, any tokens that spell it are allowed. The library would else take the
tokenizer's own choice, which for text such as "<eos>" may be a special token.
"""

import json
import re

from llguidance import regex_to_lark

from kvbaton.engine.errors import InvalidArgumentError
from kvbaton.engine.sampling import StructuredOutput, check_count
from kvbaton.grammar.json_schema import check_schema

MAX_REGEX_CHARS = 4_096
MAX_GRAMMAR_CHARS = 16_384

MAX_RULES = 500
"""Most rules, terminals and parentheses of a grammar: the library recurses into them, on a stack of limited size."""

JSON_WHITESPACE = r"\x20|\n\x20{0,16}"
"""Wherever JSON allows whitespace: none, one space, or a new line and its indentation. A model that is lost cannot
go on with whitespace for ever."""

_ASCII = "dws"
"""Classes of regular expressions that are ASCII: \\d, \\w and \\s. A model at a loss would take from all of Unicode."""

_ANY_OBJECT = '{"type": "object"}'

_NO_FORCING = '\n%llguidance {"no_forcing": true}\n'

_OPAQUE = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|//.*|#.*')
"""Strings, regular expressions and comments of a Lark grammar."""

_NOT_LARK = re.compile(r'%(?!ignore\b|import\b)\w*|[<@\["/]')
"""What may not stand outside of them. A quote or slash that is left begins one that ends on another line; what the
library takes for its inside might be anything here."""

_RULE = re.compile(r"[\w)]\s*:|\(")


def field_of(spec: StructuredOutput) -> str:
    """The request's field that an error is about."""
    return f"structured_output.{spec.kind}"


def lark_of(spec: StructuredOutput) -> str:
    """The grammar's text, for `LLMatcher`.

    Raises InvalidArgumentError that names the field when it is too large, or uses what is not supported.
    """
    field = field_of(spec)
    match spec.kind:
        case "json_schema":
            rules = f"start: %json {_schema(spec.text, field)}"
        case "json_object":
            rules = f"start: %json {_schema(_ANY_OBJECT, field)}"
        case "regex":
            rules = f"start: /{_regex(spec.text, field)}/"
        case "choice":
            rules = f"start: /{'|'.join(_literal(choice) for choice in spec.choices)}/"
        case "grammar":
            rules = _lark(spec.text, field)
    return json.dumps({"grammars": [{"lark_grammar": rules + _NO_FORCING}]})


def _schema(text: str, field: str) -> str:
    try:
        schema = json.loads(text)
        check_schema(schema, field)
        if schema is False:
            raise InvalidArgumentError(field, "no answer satisfies it")
        options = {"x-guidance": {"whitespace_pattern": JSON_WHITESPACE}}
        return json.dumps(options if schema is True else {**schema, **options})
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(field, f"is not JSON, or nested too deep: {error}") from error


def _regex(text: str, field: str) -> str:
    check_count(field, len(text), MAX_REGEX_CHARS, "characters")
    if (len(text) - len(text.rstrip("\\"))) % 2:
        raise InvalidArgumentError(field, "ends with a lone backslash")
    return regex_to_lark(text, _ASCII)


def _literal(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _lark(text: str, field: str) -> str:
    check_count(field, len(text), MAX_GRAMMAR_CHARS, "characters")
    rules = _OPAQUE.sub(" ", text)
    other = _NOT_LARK.search(rules)
    if other is not None:
        raise InvalidArgumentError(field, f"{other.group()!r} is not supported")
    check_count(field, len(_RULE.findall(rules)), MAX_RULES, "rules, terminals and parentheses")
    return text
