"""How a service declares its options: a frozen dataclass whose fields carry their own help.

A value comes, in this order, from a flag, from the environment, from a TOML file, from the default.
`kvbaton.cli.options` turns a config class into flags; nothing else in the project reads the environment.
"""

import dataclasses
import re
from typing import Any

from kvbaton.engine.errors import StartupError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def option(
    default: Any,
    text: str,
    choices: tuple[str, ...] = (),
    *,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A config field with its help text and, for a closed set, its choices; for a number, its range."""
    metadata = {"help": text, "choices": choices, "minimum": minimum, "maximum": maximum}
    return dataclasses.field(default=default, metadata=metadata)


def port_option(default: int, text: str) -> Any:
    """A config field that is a port to listen on."""
    return option(default, text, minimum=0, maximum=65535)


def grace_option(text: str) -> Any:
    """A config field that says how long a service drains."""
    return option(10.0, text, minimum=0)


def parse_size(text: str, name: str) -> int:
    """Bytes of "512MiB", "2GB" or a plain number. Raises StartupError that names the option."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmg]i?)?b?\s*", text, re.IGNORECASE)
    if match is None:
        raise StartupError(f"--{name}: {text!r} is no size; write it like 512MiB or 2GB")
    number, unit = match.groups()
    return int(float(number) * _UNITS[(unit or "").lower()])
