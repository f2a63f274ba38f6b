"""How a service declares its options: a frozen dataclass whose fields carry their own help.

A value comes, in this order, from a flag, from the environment, from a TOML file, from the default.
`kvbaton.cli.options` turns a config class into flags; nothing else in the project reads the environment.
"""

import dataclasses
import re
from typing import Any

from kvbaton.engine.errors import StartupError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def option(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    """A config field with its help text and, for a closed set, its choices."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


def parse_size(text: str, name: str) -> int:
    """Bytes of "512MiB", "2GB" or a plain number. Raises StartupError that names the option."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", text, re.IGNORECASE)
    if match is None:
        raise StartupError(f"--{name}: {text!r} is no size; write it like 512MiB or 2GB")
    number, unit = match.groups()
    return int(float(number) * _UNITS[(unit or "").lower()])
