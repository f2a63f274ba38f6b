"""JSON schemas made at random from every keyword that is supported."""

import random
from typing import Any

Schema = dict[str, Any]

_NAMES = ["a", "b", "name", "é", 'q"', "two words", "kind"]
_PATTERNS = ["^[a-c]+$", "[a-z]", "^\\d{2,4}-[A-Z]$", "(foo|bar)*", "^é🎉?$", "^\\w{1,5}$"]
_FORMATS = ["date", "time", "date-time", "uuid", "ipv4", "duration", "hostname"]
_VALUES = [0, -3, 2.5, "", "text", "é\n\\", True, None, [], [1, "x"], {}, {"k": [None]}]


def random_schema(seed: int) -> Schema:
    """A schema of draft 2020-12; the same for the same seed."""
    maker = _Maker(random.Random(seed))
    schema = maker.schema(3)
    return {**schema, "$defs": maker.definitions} if maker.definitions else schema


class _Maker:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.definitions: dict[str, Any] = {}

    def schema(self, depth: int) -> Schema:
        leaves = [self.string, self.number, self.integer, self.values, self.simple]
        branches = [self.array, self.object, self.object, self.any_of, self.one_of, self.all_of, self.reference]
        choice = self.rng.choice(leaves + (branches * 2 if depth else []))
        made: Schema = choice(depth - 1)
        if self.rng.random() < 0.1:
            made = {"title": "a title", "description": "some words", **made}
        return made

    def string(self, depth: int) -> Schema:
        kind = self.rng.randrange(4)
        if kind == 0:
            return {"type": "string", "pattern": self.rng.choice(_PATTERNS)}
        if kind == 1:
            return {"type": "string", "format": self.rng.choice(_FORMATS)}
        made: Schema = {"type": "string"}
        if self.rng.random() < 0.6:
            made["minLength"] = self.rng.randrange(6)
        if self.rng.random() < 0.6:
            made["maxLength"] = made.get("minLength", 0) + self.rng.randrange(8)
        return made

    def integer(self, depth: int) -> Schema:
        made: Schema = {"type": "integer"}
        low = self.rng.randrange(-2000, 2000)
        if self.rng.random() < 0.5:
            made[self.rng.choice(["minimum", "exclusiveMinimum"])] = low
        if self.rng.random() < 0.5:
            made[self.rng.choice(["maximum", "exclusiveMaximum"])] = low + self.rng.randrange(2, 5000)
        elif self.rng.random() < 0.4:
            made["multipleOf"] = self.rng.choice([2, 3, 7, 10])
        return made

    def number(self, depth: int) -> Schema:
        made: Schema = {"type": "number"}
        low = round(self.rng.uniform(-50, 50), 3)
        if self.rng.random() < 0.5:
            made[self.rng.choice(["minimum", "exclusiveMinimum"])] = low
        if self.rng.random() < 0.5:
            made[self.rng.choice(["maximum", "exclusiveMaximum"])] = round(low + self.rng.uniform(0.5, 1e4), 2)
        return made

    def values(self, depth: int) -> Schema:
        if self.rng.random() < 0.5:
            return {"const": self.rng.choice(_VALUES)}
        return {"enum": self.rng.sample(_VALUES, self.rng.randrange(1, 6))}

    def simple(self, depth: int) -> Schema:
        return self.rng.choice([{"type": "boolean"}, {"type": "null"}, {"type": ["integer", "string", "null"]}, {}])

    def array(self, depth: int) -> Schema:
        made: Schema = {"type": "array"}
        if self.rng.random() < 0.3:
            made["prefixItems"] = [self.schema(depth) for _ in range(self.rng.randrange(1, 4))]
        if self.rng.random() < 0.8:
            made["items"] = self.schema(depth)
        if self.rng.random() < 0.5:
            made["minItems"] = self.rng.randrange(4)
        if self.rng.random() < 0.5:
            made["maxItems"] = made.get("minItems", 0) + self.rng.randrange(4)
        return made

    def object(self, depth: int) -> Schema:
        names = self.rng.sample(_NAMES, self.rng.randrange(5))
        made: Schema = {"type": "object", "properties": {name: self.schema(depth) for name in names}}
        if self.rng.random() < 0.7:
            made["required"] = [name for name in names if self.rng.random() < 0.6]
        if self.rng.random() < 0.6:
            made["additionalProperties"] = self.rng.choice([True, False, False, self.schema(depth)])
        if self.rng.random() < 0.15:
            made["patternProperties"] = {"^x[0-9]$": self.schema(depth)}
        if self.rng.random() < 0.15:
            made[self.rng.choice(["minProperties", "maxProperties"])] = 1
        return made

    def any_of(self, depth: int) -> Schema:
        return {"anyOf": [self.schema(depth) for _ in range(self.rng.randrange(1, 4))]}

    def one_of(self, depth: int) -> Schema:
        alternatives = [{"type": "integer"}, {"type": "null"}, self.array(depth)]
        return {"oneOf": self.rng.sample(alternatives, 2)}

    def all_of(self, depth: int) -> Schema:
        kind = self.rng.choice([self.object, self.integer, self.array])
        return {"allOf": [kind(depth), kind(depth)]}

    def reference(self, depth: int) -> Schema:
        name = f"d{self.rng.randrange(3)}"
        if name not in self.definitions:
            self.definitions[name] = True  # What refers to itself meanwhile finds it there.
            self.definitions[name] = self.schema(depth)
        return {"$ref": f"#/$defs/{name}"}
