"""The `kvbaton` command."""

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from kvbaton.cli.deployment import UpConfig
from kvbaton.cli.options import build_config, check_environment, config_options
from kvbaton.cli.serve import CannotStart, limit_threads, run_service
from kvbaton.decode.config import DecodeConfig
from kvbaton.engine.errors import StartupError
from kvbaton.prefill.config import PrefillConfig
from kvbaton.router.config import RouterConfig
from kvbaton.unified.config import UnifiedConfig

_SUPERVISED = click.option("--supervised", is_flag=True, hidden=True)
_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=_SETTINGS)
def main() -> None:
    """Serve large language models with prefill and decode on different workers.

    Start with `kvbaton up`, then ask: `kvbaton generate "The red lamp is with Ann. Who has the red lamp?"`.

    Every option of a service can also be set in the environment, under the name shown in its --help, or in a TOML file
    given by --config. A flag wins over the environment, the environment over the file.
    """


@main.command()
@config_options("prefill", PrefillConfig)
@_SUPERVISED
def prefill(supervised: bool, **values: Any) -> None:
    """Run a prefill worker: it computes prompts and sends their KV to decode workers."""
    config = build_config(PrefillConfig, values)
    limit_threads(config.threads)
    from kvbaton.prefill.service import serve_prefill

    run_service("prefill", config, serve_prefill, supervised)


@main.command()
@config_options("decode", DecodeConfig)
@_SUPERVISED
def decode(supervised: bool, **values: Any) -> None:
    """Run a decode worker: it takes KV from prefill workers and generates the tokens.

    Prefill workers must reach its KV port: set --kv-port where a firewall or a container decides about ports, and
    --kv-endpoint where its address seen by them differs from the one that the router dials.
    """
    config = build_config(DecodeConfig, values)
    limit_threads(config.threads)
    from kvbaton.decode.service import serve_decode

    run_service("decode", config, serve_decode, supervised)


@main.command()
@config_options("worker", UnifiedConfig)
@_SUPERVISED
def worker(supervised: bool, **values: Any) -> None:
    """Run a unified worker: one engine that computes prompts and generates tokens, alone or with others.

    It can stand on either side of a hand-off, and its limits, which are its role, can be changed while it runs.
    --kv-port and --kv-endpoint are as for `kvbaton decode`.
    """
    config = build_config(UnifiedConfig, values)
    limit_threads(config.threads)
    from kvbaton.unified.service import serve_unified

    run_service("worker", config, serve_unified, supervised)


@main.command()
@config_options("router", RouterConfig)
@_SUPERVISED
def router(supervised: bool, **values: Any) -> None:
    """Run a router: clients ask it, and it asks the workers.

    It listens at once and says by its health service whether it is ready: when a prefill and a decode worker of the
    same model are connected, or a worker that serves both legs. Workers may start later, and come and go.
    """
    from kvbaton.router.service import serve_router

    run_service("router", build_config(RouterConfig, values), serve_router, supervised)


@main.command()
@config_options("up", UpConfig)
def up(**values: Any) -> None:
    """Run a whole deployment on this machine: workers, a router, one log, one Ctrl-C."""
    from kvbaton.cli.up import run_up

    config = build_config(UpConfig, values)
    try:
        check_environment("up", UpConfig, os.environ)  # noqa: TID251
        sys.exit(run_up(config))
    except StartupError as error:
        raise CannotStart(str(error)) from error


@main.command()
def demo() -> None:
    """Start a deployment with the bundled model, ask it a question, show where the time went, stop it again."""
    from kvbaton.cli.demo import run_demo

    try:
        sys.exit(run_demo())
    except StartupError as error:
        raise CannotStart(str(error)) from error


@main.command()
@click.argument("prompt", nargs=-1, required=True)
@click.option("--router", "address", default="localhost:7000", show_default=True, help="The router's host:port.")
@click.option("--raw", is_flag=True, help="Send the prompt as plain text, not as a chat message.")
@click.option("--max-tokens", type=int, help="Most tokens to generate.")
@click.option("--temperature", type=float, help="0 is greedy, the default.")
@click.option("--top-k", type=int, help="Keep the k most likely tokens.")
@click.option("--top-p", type=float, help="Keep the smallest set of tokens with this much probability.")
@click.option("--min-p", type=float, help="Keep tokens at least this likely, relative to the most likely one.")
@click.option("--repetition-penalty", type=float, help="Above 1: what was said is less likely to be said again.")
@click.option("--seed", type=int, help="Makes a sampled answer repeatable.")
@click.option("--n", type=int, help="Answers to the same prompt; more than one are printed at the end.")
@click.option("--stop", multiple=True, help="Text that ends the answer; may be given several times.")
@click.option("--regex", help="A regular expression that the whole answer matches.")
@click.option(
    "--json-schema",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with a JSON schema that describes the answer.",
)
@click.option("--logprobs", type=int, help="With --json: each token's logprob, and those of this many likely ones.")
@click.option("--timeout", type=float, help="Seconds until giving up.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
def generate(prompt: Sequence[str], address: str, raw: bool, as_json: bool, **options: Any) -> None:
    """Ask a router, and print the answer as it streams. A PROMPT of - is read from standard input."""
    from kvbaton.cli.generate import given_options, read_prompt, run_generate

    text = read_prompt(prompt, sys.stdin)
    sys.exit(asyncio.run(run_generate(address, text, raw, as_json, given_options(options, as_json))))


@main.command()
@click.argument("address")
@click.option("--timeout", type=float, default=2.0, show_default=True, help="Seconds to wait for the answer.")
def health(address: str, timeout: float) -> None:
    """Ask the service at ADDRESS (host:port) whether it serves. Exit code 0: yes, 1: no."""
    from kvbaton.cli.health import is_serving

    serving, answer = asyncio.run(is_serving(address, timeout))
    click.echo(answer)
    sys.exit(0 if serving else 1)


@main.command()
@click.argument("address")
@click.option("--max-prefill-tokens", type=click.IntRange(0, 2**32 - 1), help="Prompt tokens that a step may carry.")
@click.option("--max-decode-seqs", type=click.IntRange(0, 2**32 - 1), help="Sequences that a step may decode.")
@click.option("--target-itl-ms", type=float, help="Milliseconds a step that decodes may take; 0: no target.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def limits(address: str, as_json: bool, **values: Any) -> None:
    """Show or set what a step of the worker at ADDRESS (host:port) may carry, and so its role, while it runs."""
    from kvbaton.cli.limits import run_limits

    given = {name: value for name, value in values.items() if value is not None}
    sys.exit(asyncio.run(run_limits(address, given, as_json)))


@main.command()
@click.option("--verbose", is_flag=True, help="Also the versions of what kvbaton stands on, as JSON.")
def version(verbose: bool) -> None:
    """Print the version."""
    if not verbose:
        click.echo(metadata.version("kvbaton"))
        return
    names = ("kvbaton", "grpcio", "protobuf", "torch", "transformers", "opentelemetry-sdk", "uvloop")
    versions = {name: metadata.version(name) for name in names}
    click.echo(json.dumps({"python": sys.version.split()[0], **versions}, indent=2))


if __name__ == "__main__":
    main()
