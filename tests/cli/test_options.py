"""Where a service's options come from: flag, environment, file, default, in this order; what is none is an error."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from kvbaton.cli.deployment import UpConfig
from kvbaton.cli.main import main
from kvbaton.cli.options import build_config, check_environment, config_options, environment_name
from kvbaton.cli.serve import CannotStart, run_service
from kvbaton.decode.config import DecodeConfig
from kvbaton.engine.errors import StartupError
from kvbaton.prefill.config import PrefillConfig
from kvbaton.router.config import RouterConfig
from kvbaton.unified.config import UnifiedConfig

CONFIGS: dict[str, type[Any]] = {
    "prefill": PrefillConfig,
    "decode": DecodeConfig,
    "worker": UnifiedConfig,
    "router": RouterConfig,
    "up": UpConfig,
}


class Command:
    """A service's command that starts nothing and keeps its config."""

    def __init__(self, service: str, config: type[Any]) -> None:
        self.seen: Any = None

        @click.command()
        @config_options(service, config)
        def command(**values: Any) -> None:
            self.seen = build_config(config, values)

        self._command = command

    def __call__(self, *arguments: str, **environment: str) -> Result:
        return CliRunner().invoke(self._command, arguments, env=environment)

    def config(self, *arguments: str, **environment: str) -> Any:
        result = self(*arguments, **environment)
        assert result.exit_code == 0, result.output
        return self.seen


@pytest.fixture
def prefill() -> Command:
    return Command("prefill", PrefillConfig)


@pytest.fixture
def router() -> Command:
    return Command("router", RouterConfig)


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "kvbaton.toml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("service", CONFIGS)
def test_without_any_setting_a_config_has_its_defaults(service: str) -> None:
    assert Command(service, CONFIGS[service]).config() == CONFIGS[service]()


def test_a_flag_wins_over_the_environment_that_over_the_file_that_over_the_default(
    prefill: Command, toml: Callable[[str], str]
) -> None:
    path = toml('port = 3\nthreads = 3\nblock_size = 3\nkv_memory = "3GiB"')
    config = prefill.config("--config", path, "--port", "1", KVBATON_PREFILL_PORT="2", KVBATON_PREFILL_THREADS="2")
    assert (config.port, config.threads, config.block_size, config.max_waiting) == (1, 2, 3, 1024)
    assert config.kv_memory == "3GiB"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_option_can_be_set_in_every_way(config: type[Any], toml: Callable[[str], str]) -> None:
    command = Command("x", config)
    for field in dataclasses.fields(config):
        value = _another(field)
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        expected = dataclasses.replace(config(), **{field.name: value})
        flag = "--" + field.name.replace("_", "-")
        assert command.config(*([flag] if value is True else [flag, text])) == expected
        assert command.config(**{environment_name("x", field.name): text}) == expected
        written = list(value) if isinstance(value, tuple) else value
        quoted = f'"{written}"' if isinstance(written, str) else str(written).replace("'", '"')
        quoted = "true" if value is True else quoted
        assert command.config("--config", toml(f"{field.name} = {quoted}")) == expected


def _another(field: "dataclasses.Field[Any]") -> Any:
    choices = field.metadata["choices"]
    if choices:
        return choices[-1]
    if isinstance(field.default, tuple):
        return ("a:1", "b:2")
    default: Any = field.default
    if isinstance(default, bool):
        return not default
    if default == field.metadata["maximum"]:
        return default / 2
    return "other" if isinstance(default, str) else default + 1


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("a:1", ("a:1",)),
        ("a:1,b:2", ("a:1", "b:2")),
        (" a:1 , b:2, ", ("a:1", "b:2")),
        ("", ()),
        (",", ()),
    ],
)
def test_lists_are_separated_by_commas(
    router: Command, toml: Callable[[str], str], text: str, addresses: tuple[str, ...]
) -> None:
    assert router.config("--prefill", text).prefill == addresses
    assert router.config("--config", toml(f'prefill = "{text}"')).prefill == addresses
    assert router.config(KVBATON_ROUTER_PREFILL=text).prefill == addresses


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--prot", "1"], "No such option"),
        (["--port"], "requires an argument"),
        (["--port", "many"], "'many' is not a valid integer"),
        (["--grace-seconds", "soon"], "'soon' is not a valid float"),
        (["--dtype", "float16"], "'float16' is not one of 'auto', 'float32', 'bfloat16'"),
        (["extra"], "unexpected extra argument"),
        (["--config", "/no/such/file.toml"], "does not exist"),
    ],
)
def test_wrong_flags_are_errors(prefill: Command, arguments: list[str], problem: str) -> None:
    result = prefill(*arguments)
    assert result.exit_code == 2
    assert problem in result.output
    assert prefill.seen is None


@pytest.mark.parametrize(
    ("service", "flag", "bad", "good"),
    [
        ("prefill", "--grace-seconds", ["nan", "inf", "-1"], "0"),
        ("router", "--grace-seconds", ["nan"], "2.5"),
        ("up", "--grace-seconds", ["nan"], "0"),
        ("decode", "--max-waiting", ["0"], "1"),
        ("router", "--max-in-flight", ["0"], "1"),
        ("router", "--default-max-tokens", ["0", "2147483648"], "2147483647"),
        ("prefill", "--threads", ["0", "99999999999"], "1"),
        ("decode", "--block-size", ["-1", "4097"], "4096"),
        ("prefill", "--max-prefill-tokens", ["0"], "1"),
        ("decode", "--max-decode-seqs", ["0"], "1"),
        ("prefill", "--port", ["-1", "65536"], "65535"),
        ("decode", "--kv-port", ["-1", "65536"], "0"),
        ("router", "--port", ["65536"], "0"),
        ("up", "--port", ["65536"], "0"),
        ("worker", "--max-prefill-tokens", ["0"], "1"),
        ("worker", "--max-decode-seqs", ["0"], "1"),
        ("worker", "--target-itl-ms", ["-1", "nan", "60001"], "60000"),
        ("up", "--prefill", ["-1"], "0"),
        ("up", "--decode", ["-1"], "0"),
        ("up", "--unified", ["-1"], "2"),
        ("up", "--max-decode-seqs", ["0"], "1"),
        ("up", "--max-prefill-tokens", ["-1"], "0"),
        ("up", "--threads", ["0"], "1"),
        ("up", "--block-size", ["4097"], "1"),
        ("prefill", "--memory-share", ["0", "1.5", "nan"], "0.25"),
    ],
)
def test_a_number_out_of_its_range_is_an_error(service: str, flag: str, bad: list[str], good: str) -> None:
    command = Command(service, CONFIGS[service])
    for value in bad:
        result = command(f"{flag}={value}")
        assert result.exit_code == 2, value
        assert result.output.splitlines()[-1].startswith(f"Error: Invalid value for '{flag}'"), result.output
        assert value in result.output
    assert command.seen is None
    assert command(f"{flag}={good}").exit_code == 0


def test_ranges_hold_for_files_and_the_environment_and_are_in_the_help(
    prefill: Command, toml: Callable[[str], str]
) -> None:
    assert "'--threads'" in prefill("--config", toml("threads = 0")).output
    assert "'--grace-seconds'" in prefill("--config", toml("grace_seconds = nan")).output
    assert "'--block-size'" in prefill(KVBATON_PREFILL_BLOCK_SIZE="-1").output
    assert "0<=x<=4096" in prefill("--help").output
    assert prefill.seen is None


def test_a_wrong_value_in_the_environment_is_an_error(prefill: Command) -> None:
    result = prefill(KVBATON_PREFILL_PORT="many")
    assert result.exit_code == 2
    assert "'many' is not a valid integer" in result.output


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("prot = 1", "unknown option prot"),
        ("port = 1\nb = 1\na = 2", "unknown option a, b"),
        ("[prefill]\nport = 1", "unknown option prefill"),
        ("max-waiting = 1", "unknown option max-waiting"),
        ('port = "many"', "'many' is not a valid integer"),
        ('dtype = "float16"', "is not one of"),
        ("port = [1]", "port = [1] is of the wrong type"),
        ("port = 1.5", "port = 1.5 is of the wrong type"),
        ('trust_remote_code = "perhaps"', "'perhaps' is not a valid boolean"),
        ("port = true", "port = True is of the wrong type"),
        ("port = 2024-01-01", "is of the wrong type"),
        ('model = ["a"]', "is of the wrong type"),
        ("model = 1.5", "is of the wrong type"),
        ("[port]\na = 1", "is of the wrong type"),
        ("port = ", "is not TOML"),
        ("port = 1\nport = 2", "is not TOML"),
    ],
)
def test_a_wrong_file_is_an_error(prefill: Command, toml: Callable[[str], str], text: str, problem: str) -> None:
    result = prefill("--config", toml(text))
    assert result.exit_code == 2, prefill.seen
    assert problem in result.output
    assert prefill.seen is None


def test_a_file_that_is_no_text_is_an_error(prefill: Command, tmp_path: Path) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    result = prefill("--config", str(path))
    assert result.exit_code == 2
    assert "is not TOML" in result.output


def test_a_variable_that_is_no_option_is_an_error() -> None:
    environment = {"KVBATON_PREFILL_FOO": "1", "KVBATON_PREFILL_PORT": "1", "KVBATON_ROUTER_BAR": "1", "PATH": "/"}
    with pytest.raises(StartupError, match="^KVBATON_PREFILL_FOO in the environment: no such option"):
        check_environment("prefill", PrefillConfig, environment)
    del environment["KVBATON_PREFILL_FOO"]
    check_environment("prefill", PrefillConfig, environment)


def test_a_service_does_not_start_with_such_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def serve(*_: Any) -> None:
        pytest.fail("it started")

    monkeypatch.setenv("KVBATON_ROUTER_FOO", "1")
    with pytest.raises(CannotStart, match="KVBATON_ROUTER_FOO") as caught:
        run_service("router", RouterConfig(), serve, supervised=False)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("service", CONFIGS)
def test_help_names_every_option_its_variable_and_its_default(service: str) -> None:
    result = CliRunner().invoke(main, [service, "--help"])
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    for field in dataclasses.fields(CONFIGS[service]):
        assert f"--{field.name.replace('_', '-')} " in text
        assert environment_name(service, field.name) in text
        # Lines break at spaces and within words with hyphens.
        assert field.metadata["help"].replace(" ", "") in text.replace(" ", "")
        # A switch that is off says nothing of it.
        if field.default is not False and (isinstance(field.default, int | float) or field.default):
            shown = ",".join(field.default) if isinstance(field.default, tuple) else field.default
            assert f"default: {shown}" in text, field.name
    assert "--config" in text
    assert "--supervised" not in text


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["prefill", "decode", "router", "up", "demo", "generate", "health", "version"]),
        (
            ["generate"],
            ["--router", "--raw", "--max-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--json"],
        ),
        (["health"], ["ADDRESS", "--timeout"]),
        (["version"], ["--verbose"]),
        (["demo"], ["bundled model"]),
    ],
)
def test_the_other_commands_explain_themselves(command: list[str], words: list[str]) -> None:
    for flag in ("--help", "-h"):
        result = CliRunner().invoke(main, [*command, flag])
        assert result.exit_code == 0
        assert [word for word in words if word not in result.output] == []


def test_an_unknown_command_is_an_error() -> None:
    result = CliRunner().invoke(main, ["serve-everything"])
    assert result.exit_code == 2
    assert "No such command" in result.output
