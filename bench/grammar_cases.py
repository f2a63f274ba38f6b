"""What `grammar.py` compiles: ordinary schemas, one for each keyword, and inputs made to explode."""

import json
from typing import Any

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
_TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
}
_ORDER = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "format": "uuid"},
        "placed": {"type": "string", "format": "date-time"},
        "status": {"enum": ["open", "paid", "sent", "closed"]},
        "lines": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
                    "count": {"type": "integer", "minimum": 1},
                    "price": {"type": "number", "minimum": 0},
                },
                "required": ["sku", "count", "price"],
                "additionalProperties": False,
            },
        },
        "note": {"anyOf": [{"type": "string", "maxLength": 200}, {"type": "null"}]},
    },
    "required": ["id", "placed", "status", "lines", "note"],
    "additionalProperties": False,
}
_LINE = {"sku": "ABC-1234", "count": 2, "price": 9.5}

SCHEMAS: dict[str, tuple[Any, Any]] = {
    "person": (_PERSON, {"name": "Zoë Brûlée", "age": 41, "email": "zoe@example.org", "tags": ["a", "runner"]}),
    "tree": (_TREE, {"value": 1, "children": [{"value": 2, "children": []}, {"value": -30, "children": []}]}),
    "order": (
        _ORDER,
        {
            "id": "123e4567-e89b-12d3-a456-426614174000",
            "placed": "2025-11-03T10:11:12Z",
            "status": "paid",
            "lines": [_LINE, _LINE],
            "note": "Leave it at the door, please; the dog is harmless.",
        },
    ),
    "any object": ({"type": "object"}, {"a": [1, 2.5, None, {"b": "text of some length"}], "c": False}),
    "free text": ({"type": "string"}, "The relay passes the baton, the baton passes the line. " * 4),
    "enum of 100": ({"enum": [f"choice number {n}" for n in range(100)]}, "choice number 57"),
    "const": ({"const": {"a": [1, "b"]}}, {"a": [1, "b"]}),
    "numbers": (
        {"type": "array", "items": {"type": "number", "exclusiveMinimum": -1.5, "maximum": 1000.25}},
        [0, -1.25, 999.75, 12],
    ),
    "tuple": (
        {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False, "minItems": 2},
        ["a", 7],
    ),
    "union": (
        {
            "anyOf": [
                {"type": "object", "properties": {"kind": {"const": k}, k: {"type": t}}, "required": ["kind", k]}
                for k, t in (("text", "string"), ("count", "integer"), ("flag", "boolean"))
            ]
        },
        {"kind": "count", "count": 3},
    ),
    "map": ({"type": "object", "additionalProperties": {"type": "integer"}}, {"a": 1, "b c": 22, "d": -3}),
    "all of": (
        {
            "allOf": [
                {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]},
            ]
        },
        {"a": 1, "b": "x"},
    ),
    "bounded string": (
        {"type": "string", "minLength": 10, "maxLength": 400},
        "A sentence that is neither short nor very long, and ends.",
    ),
    "fifty optional": (
        {"type": "object", "properties": {f"field_{n}": {"type": "integer"} for n in range(50)}},
        {"field_3": 1, "field_10": 2, "field_49": 3},
    ),
}

_TWO = {"a": 1, "b": 2}
KEYWORDS: dict[str, tuple[Any, Any, Any]] = {
    "type": ({"type": "integer"}, 1, "a"),
    "enum": ({"enum": [1, "a"]}, "a", "b"),
    "const": ({"const": "a"}, "a", "b"),
    "minimum": ({"type": "integer", "minimum": 10}, 12, 9),
    "maximum (number)": ({"type": "number", "maximum": 1.5}, 1.25, 1.75),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 10}, 11, 10),
    "exclusiveMaximum": ({"type": "number", "exclusiveMaximum": 2}, 1.5, 2),
    "multipleOf": ({"type": "integer", "multipleOf": 7}, 21, 22),
    "minLength": ({"type": "string", "minLength": 3}, "abc", "ab"),
    "maxLength": ({"type": "string", "maxLength": 3}, "abc", "abcd"),
    "pattern": ({"type": "string", "pattern": "^[a-c]+$"}, "abc", "abd"),
    "pattern, not anchored": ({"type": "string", "pattern": "b"}, "abc", "acc"),
    "pattern with maxLength": ({"type": "string", "pattern": "^a+$", "maxLength": 3}, "aaa", "aaaa"),
    "format: date": ({"type": "string", "format": "date"}, "2025-02-03", "2025-2-3"),
    "format: date-time": ({"type": "string", "format": "date-time"}, "2025-02-03T01:02:03Z", "2025-02-03"),
    "format: uuid": ({"type": "string", "format": "uuid"}, "123e4567-e89b-12d3-a456-426614174000", "123"),
    "format: email": ({"type": "string", "format": "email"}, "a@b.org", "a"),
    "format: ipv4": ({"type": "string", "format": "ipv4"}, "1.2.3.4", "1.2.3.456"),
    "format: uri": ({"type": "string", "format": "uri"}, "http://a.org/b", "a b"),
    "format: idn-email": ({"type": "string", "format": "idn-email"}, "a@b.org", "a"),
    "format: regex": ({"type": "string", "format": "regex"}, "a+", "a("),
    "items": ({"type": "array", "items": {"type": "integer"}}, [1], ["a"]),
    "prefixItems": ({"type": "array", "prefixItems": [{"type": "integer"}], "minItems": 1}, [1], ["a"]),
    "minItems": ({"type": "array", "minItems": 2}, [1, 2], [1]),
    "maxItems": ({"type": "array", "maxItems": 1}, [1], [1, 2]),
    "uniqueItems": ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, [1, 2], [1, 1]),
    "contains": ({"type": "array", "contains": {"type": "integer"}}, ["a", 1], ["a"]),
    "unevaluatedItems": (
        {"type": "array", "prefixItems": [{"type": "integer"}], "unevaluatedItems": False},
        [1],
        [1, 2],
    ),
    "properties": ({"type": "object", "properties": {"a": {"type": "integer"}}}, {"a": 1}, {"a": "b"}),
    "required": ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, {"a": 1}, {}),
    "required, not in properties": ({"type": "object", "required": ["a"]}, {"a": 1}, {}),
    "additionalProperties": (
        {"type": "object", "properties": {"a": {}}, "additionalProperties": False},
        {"a": 1},
        _TWO,
    ),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^a": {"type": "integer"}}},
        {"ab": 1},
        {"ab": "c"},
    ),
    "propertyNames": ({"type": "object", "propertyNames": {"pattern": "^a$"}}, {"a": 1}, {"b": 1}),
    "minProperties": ({"type": "object", "minProperties": 2}, _TWO, {"a": 1}),
    "maxProperties": ({"type": "object", "maxProperties": 1}, {"a": 1}, _TWO),
    "dependentRequired": ({"type": "object", "dependentRequired": {"a": ["b"]}}, _TWO, {"a": 1}),
    "dependentSchemas": ({"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}}, _TWO, {"a": 1}),
    "unevaluatedProperties": (
        {"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False},
        {"a": 1},
        _TWO,
    ),
    "anyOf": ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, None, "a"),
    "oneOf, disjoint": ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, 1, None),
    "oneOf, overlapping": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, 1.5, 1),
    "allOf": ({"allOf": [{"type": "integer"}, {"minimum": 5}]}, 6, 4),
    "not": ({"not": {"type": "integer"}}, "a", 1),
    "if/then": ({"if": {"type": "integer"}, "then": {"minimum": 5}}, 6, 4),
    "$ref with siblings": ({"$ref": "#/$defs/a", "minimum": 5, "$defs": {"a": {"type": "integer"}}}, 6, 4),
    "$dynamicRef": ({"$dynamicRef": "#a", "$defs": {"a": {"$dynamicAnchor": "a", "type": "integer"}}}, 1, "a"),
    "a keyword that nobody knows": ({"type": "integer", "madeUp": 1}, 1, 2),
}


def _deep(depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def _wide(names: int) -> Any:
    return {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(names)}}


_REF_BOMB = {
    "$ref": "#/$defs/d0",
    "$defs": {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"$ref": f"#/$defs/d{n + 1}"}]} for n in range(30)}
    | {"d30": {"type": "integer"}},
}

_LONG_CHAIN = {
    "$ref": "#/$defs/d0",
    "$defs": {f"d{n}": {"properties": {"a": {"$ref": f"#/$defs/d{n + 1}"}}} for n in range(1_100)}
    | {"d1100": {"type": "integer"}},
}

NASTY: dict[str, tuple[str, str]] = {
    "regex (a{1,1000}){1,1000}": ("regex", "(a{1,1000}){1,1000}"),
    "regex ((a{1,100}){1,100}){1,100}": ("regex", "((a{1,100}){1,100}){1,100}"),
    "regex (x+x+)+y": ("regex", "(x+x+)+y"),
    "regex (x?){5000}x{5000}": ("regex", "(x?){5000}x{5000}"),
    "regex [ab]*a[ab]{500}": ("regex", "[ab]*a[ab]{500}"),
    "regex of 100 (a.*b|...)": ("regex", "|".join(f"({chr(97 + n % 26)}.*{n}.*x)" for n in range(100))),
    "choice of 10,000": ("json_schema", json.dumps({"enum": [f"choice {n}" for n in range(10_000)]})),
    "maxLength 10^9": ("json_schema", json.dumps({"type": "string", "maxLength": 10**9})),
    "minLength 10^9": ("json_schema", json.dumps({"type": "string", "minLength": 10**9})),
    "maxItems 10^9": ("json_schema", json.dumps({"type": "array", "maxItems": 10**9})),
    "minItems 10^9": ("json_schema", json.dumps({"type": "array", "minItems": 10**9})),
    "minItems 10^5": ("json_schema", json.dumps({"type": "array", "minItems": 10**5})),
    "400 arrays deep": ("json_schema", json.dumps(_deep(400))),
    "100,000 arrays deep": ("json_schema", '{"items":' * 100_000 + "{}" + "}" * 100_000),
    "2,000 optional properties": ("json_schema", json.dumps(_wide(2_000))),
    "1 MB of properties": ("json_schema", json.dumps(_wide(30_000))),
    "$ref to itself": ("json_schema", json.dumps({"$ref": "#"})),
    "2^30 $refs": ("json_schema", json.dumps(_REF_BOMB)),
    "1,100 $refs in a chain": ("json_schema", json.dumps(_LONG_CHAIN)),
    "multipleOf 7919 and 7907": (
        "json_schema",
        json.dumps({"allOf": [{"type": "integer", "multipleOf": 7919}, {"multipleOf": 7907}]}),
    ),
    "not JSON": ("json_schema", '{"type": '),
}
