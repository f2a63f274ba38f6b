"""Config classes as options: flag, then environment, then TOML file, then default; unknown ones are errors."""

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from kvbaton.engine.errors import StartupError

C = TypeVar("C")


def environment_name(service: str, field: str) -> str:
    """The variable that sets a service's option, for example KVBATON_ROUTER_PORT."""
    return f"KVBATON_{service}_{field}".upper()


def config_options(service: str, config: type[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command with an option for each field of `config`, and `--config FILE`.

    The command receives the values by field name; give them to `build_config`.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(_click_options(service, config)):
            command = option(command)
        return click.option(
            "--config",
            "config_file",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            is_eager=True,
            expose_value=False,
            callback=_read_config_file(config),
            help="TOML file with any of these options, names written with underscores.",
        )(command)

    return decorate


def build_config(config: type[C], values: Mapping[str, Any]) -> C:
    """The config object from a command's values."""
    fields = {field.name for field in dataclasses.fields(typing.cast("Any", config))}
    converted = {name: _from_click(value) for name, value in values.items() if name in fields}
    return config(**converted)


def check_environment(service: str, config: type[Any], environment: Mapping[str, str]) -> None:
    """Raise StartupError when a variable looks like one of the service's options and is none."""
    known = {environment_name(service, field.name) for field in dataclasses.fields(config)}
    prefix = environment_name(service, "")
    unknown = sorted(name for name in environment if name.startswith(prefix) and name not in known)
    if unknown:
        raise StartupError(f"{', '.join(unknown)} in the environment: no such option; see kvbaton {service} --help")


def _click_options(service: str, config: type[Any]) -> list[Callable[..., Any]]:
    hints = typing.get_type_hints(config)
    options = []
    for field in dataclasses.fields(config):
        default: Any = field.default
        choices = field.metadata["choices"]
        kind: Any = click.Choice(choices) if choices else _click_type(hints[field.name], field.metadata)
        is_tuple = isinstance(default, tuple)
        options.append(
            click.option(
                "--" + field.name.replace("_", "-"),
                field.name,
                type=kind,
                is_flag=hints[field.name] is bool,
                default=",".join(default) if is_tuple else default,
                show_default=bool(default) or default == 0,
                envvar=environment_name(service, field.name),
                show_envvar=True,
                help=field.metadata["help"],
            )
        )
    return options


def _click_type(hint: Any, metadata: Mapping[str, Any]) -> Any:
    if isinstance(hint, types.GenericAlias):
        return _CommaSeparated()
    if hint is bool:
        return click.BOOL
    if hint is str:
        return click.STRING
    kind = click.IntRange if hint is int else _FiniteRange
    return kind(metadata["minimum"], metadata["maximum"])


class _FiniteRange(click.FloatRange):
    """A number in a range. Nan compares with nothing, so that click alone finds it in every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class _CommaSeparated(click.ParamType[tuple[str, ...]]):
    """Values separated by commas, as a tuple."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return tuple(value)


def _fits(value: Any, hint: Any) -> bool:
    """Whether click may convert a TOML value: it would take the last of a list, and cut 1.5 down to 1."""
    if isinstance(value, list):
        return isinstance(hint, types.GenericAlias) and all(isinstance(item, str) for item in value)
    if isinstance(value, float):
        return hint is float
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, str | int)


def _from_click(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _read_config_file(config: type[Any]) -> Callable[[click.Context, click.Parameter, Path | None], None]:
    def callback(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
        if path is None:
            return
        try:
            values = tomllib.loads(path.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise click.BadParameter(f"{path} is not TOML: {error}", context, parameter) from error
        known = {field.name for field in dataclasses.fields(config)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise click.BadParameter(f"{path}: unknown option {', '.join(unknown)}", context, parameter)
        hints = typing.get_type_hints(config)
        for name, value in values.items():
            if not _fits(value, hints[name]):
                raise click.BadParameter(f"{path}: {name} = {value!r} is of the wrong type", context, parameter)
        context.default_map = {**(context.default_map or {}), **values}

    return callback
