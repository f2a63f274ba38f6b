"""`kvbaton generate`: one question from the terminal."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import click

from kvbaton.client import AsyncClient, GeneratedSequence, GenerationResult, KvbatonError, PromptLike


def given_options(options: Mapping[str, Any], as_json: bool) -> dict[str, Any]:
    """What was given on the command line, as the SDK takes it. Raises click.UsageError."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if "logprobs" in given and not as_json:
        raise click.UsageError("--logprobs needs --json")
    if "json_schema" in given:
        try:
            given["json_schema"] = given["json_schema"].read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise click.UsageError(f"--json-schema: {error}") from error
    return given


def read_prompt(words: Sequence[str], stdin: TextIO) -> str:
    """The prompt in words; where it is "-", standard input less the end of its last line. Raises click.UsageError."""
    if tuple(words) != ("-",):
        return " ".join(words)
    try:
        return stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"standard input is no text: {error}") from error


async def run_generate(address: str, text: str, raw: bool, as_json: bool, options: dict[str, Any]) -> int:
    """Ask, stream, and return the exit code: 0, or 1 when the service refused or failed."""
    prompt: PromptLike = text if raw else [{"role": "user", "content": text}]
    # The texts of several answers come in turns, which nobody could read.
    streams = not as_json and options.get("n", 1) == 1
    async with AsyncClient(address) as client:
        try:
            generation = client.generate(prompt, **options)
            async for chunk in generation:
                if streams:
                    click.echo(chunk.text, nl=False)
            result = await generation.result()
        except (KvbatonError, ValueError, TypeError) as error:
            click.echo(f"Error: {error}", err=True)
            return 1
    if as_json:
        click.echo(json.dumps(_as_dict(result), ensure_ascii=False))
        return 0
    click.echo("" if streams else "\n\n".join(sequence.text for sequence in result.sequences))
    click.echo(summary(result), err=True)
    return 0


def summary(result: GenerationResult) -> str:
    """One line about a finished answer."""
    timings, usage = result.timings, result.usage
    served = f"KV {timings.transfer.payload_bytes / 2**20:.2f} MiB {result.prefill_worker} -> {result.decode_worker}"
    if result.prefill_worker == result.decode_worker:
        served = f"all by {result.decode_worker}"
    return (
        f"[{usage.prompt_tokens} prompt + {usage.completion_tokens} generated tokens, {result.finish_reason}; "
        f"first token {timings.time_to_first_token_seconds * 1e3:.0f} ms, "
        f"total {timings.total_seconds * 1e3:.0f} ms; {served}]"
    )


def _as_dict(result: GenerationResult) -> dict[str, Any]:
    fields = {
        **_sequence_as_dict(result.sequences[0]),
        "usage": dataclasses.asdict(result.usage),
        "request_id": result.request_id,
        "model": result.model,
        "seed": result.seed,
        "time_to_first_token_seconds": result.timings.time_to_first_token_seconds,
        "total_seconds": result.timings.total_seconds,
    }
    if len(result.sequences) > 1:
        fields["sequences"] = [_sequence_as_dict(sequence) for sequence in result.sequences]
    return fields


def _sequence_as_dict(sequence: GeneratedSequence) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(sequence).items() if value not in (None, ())}
