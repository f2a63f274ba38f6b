"""What is asked of a JSON schema before it is compiled: every keyword is enforced, and none can exhaust the compiler.

The library that compiles schemas ignores keywords that it has never heard of, recurses once for each level of nesting
and of references (and its stack ends with the process), and builds an automaton as large as a `multipleOf` is.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any
from urllib.parse import unquote

from kvbaton.engine.errors import InvalidArgumentError

MAX_LEVELS = 256
"""Most levels of schemas within schemas, summed over the schema and everything that it refers to."""

MAX_MULTIPLE = 1000
"""Most that the least common multiple of all `multipleOf` may be, decimal points left out."""

_ONE_SCHEMA = {"items", "additionalProperties"}
_LIST_OF_SCHEMAS = {"anyOf", "oneOf", "allOf", "prefixItems"}
_MAP_OF_SCHEMAS = {"properties", "patternProperties", "$defs", "definitions"}
_ASSERTIONS = {
    *("type", "enum", "const", "$ref", "required", "minProperties", "maxProperties", "minItems", "maxItems"),
    *("minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
# They say nothing about which answers are right. "discriminator" is OpenAPI's hint beside a oneOf.
_ANNOTATIONS = {
    *("$comment", "$schema", "title", "description", "default", "deprecated", "readOnly", "writeOnly"),
    *("example", "examples", "contentMediaType", "contentEncoding", "discriminator"),
}
SUPPORTED = _ONE_SCHEMA | _LIST_OF_SCHEMAS | _MAP_OF_SCHEMAS | _ASSERTIONS | _ANNOTATIONS

_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}

_DIALECTS = ("draft-06", "draft-07", "2019-09", "2020-12")

Path = tuple[str, ...]


def check_schema(schema: object, field: str) -> None:
    """Raises InvalidArgumentError naming `field` and the keyword, or the place, that cannot be done."""
    # Each schema by its place, with the place of the one that it is part of; parents come first.
    parents: dict[Path, Path | None] = {}
    references: set[Path] = set()
    multiples: list[Fraction] = []
    todo: list[tuple[Path, Path | None, object]] = [((), None, schema)]
    while todo:
        path, parent, node = todo.pop()
        parents[path] = parent
        if isinstance(node, bool):
            continue
        if not isinstance(node, dict):
            raise InvalidArgumentError(field, f"{_pointer(path)} is neither an object nor true or false")
        if len(path) > MAX_LEVELS:
            raise InvalidArgumentError(field, f"is nested more than {MAX_LEVELS} levels deep")
        _check_keywords(node, path, field)
        if "$ref" in node:
            references.add(_target(node["$ref"], field))
        if "multipleOf" in node:
            multiples.append(_multiple(node["multipleOf"], path, field))
        for keyword, value in node.items():
            todo += [((*path, *place), path, part) for place, part in _parts(keyword, value, path, field)]
    _check_references(parents, references, field)
    # Multiples that meet in one number act together.
    if math.lcm(*(multiple.numerator for multiple in multiples)) > MAX_MULTIPLE:
        raise InvalidArgumentError(
            field, f"multipleOf: the least common multiple, 1 for 0.01, may not exceed {MAX_MULTIPLE}"
        )


def _check_keywords(node: dict[str, Any], path: Path, field: str) -> None:
    for keyword in node:
        # A root may have a name; names further down would change what references mean.
        if keyword not in SUPPORTED and not (keyword == "$id" and not path):
            raise InvalidArgumentError(field, f"{_pointer(path)}: the keyword {keyword[:100]!r} is not supported")
        if keyword in _BOUNDS and isinstance(node[keyword], bool):
            raise InvalidArgumentError(field, f"{_pointer(path)}: {keyword} is not a number")
    dialect = node.get("$schema", _DIALECTS[-1])
    if not isinstance(dialect, str) or not any(known in dialect for known in _DIALECTS):
        raise InvalidArgumentError(field, f"$schema: {str(dialect)[:100]!r} is none of {', '.join(_DIALECTS)}")
    minimum = node.get("minProperties", 0)
    required = node.get("required", [])
    # A grammar cannot see that a name comes a second time, and then counts for nothing.
    if not isinstance(minimum, int) or minimum > max(1, len(required) if isinstance(required, list) else 0):
        raise InvalidArgumentError(
            field, f"{_pointer(path)}: minProperties above 1 is not supported, unless that many are required by name"
        )


def _parts(keyword: str, value: object, path: Path, field: str) -> Iterator[tuple[Path, object]]:
    """Schemas within the value of a keyword, and their places below it."""
    if keyword in _ONE_SCHEMA:
        yield (keyword,), value
    elif keyword in _LIST_OF_SCHEMAS:
        if not isinstance(value, list):
            raise InvalidArgumentError(field, f"{_pointer((*path, keyword))} is not an array")
        for index, part in enumerate(value):
            yield (keyword, str(index)), part
    elif keyword in _MAP_OF_SCHEMAS:
        if not isinstance(value, dict):
            raise InvalidArgumentError(field, f"{_pointer((*path, keyword))} is not an object")
        for name, part in value.items():
            yield (keyword, name), part


def _target(reference: object, field: str) -> Path:
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        raise InvalidArgumentError(field, f"$ref: {str(reference)[:100]!r} does not start with '#/'")
    names = unquote(reference).split("/")[1:]
    return tuple(name.replace("~1", "/").replace("~0", "~") for name in names)


def _multiple(value: object, path: Path, field: str) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InvalidArgumentError(field, f"{_pointer(path)}: multipleOf is not a number above 0")
    # As it is written: the float itself has a denominator of many digits.
    return Fraction(str(value))


def _check_references(parents: dict[Path, Path | None], references: set[Path], field: str) -> None:
    for target in references:
        if target not in parents:
            raise InvalidArgumentError(field, f"$ref: there is no schema at {_pointer(target)}")
    heights = dict.fromkeys(parents, 1)
    for path, parent in reversed(parents.items()):
        if parent is not None:
            heights[parent] = max(heights[parent], heights[path] + 1)
    # No path without a circle is longer.
    if heights[()] + sum(heights[target] for target in references) > MAX_LEVELS:
        raise InvalidArgumentError(field, f"it and what it refers to are nested more than {MAX_LEVELS} levels in all")


def _pointer(path: Path) -> str:
    return "#" + "".join("/" + name.replace("~", "~0").replace("/", "~1") for name in path)[:100]
