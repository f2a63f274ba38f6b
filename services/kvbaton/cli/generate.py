"""`kvbaton generate`: one question from the terminal."""

import json
from typing import Any

import click

from kvbaton.client import AsyncClient, GenerationResult, KvbatonError, PromptLike


async def run_generate(address: str, text: str, raw: bool, as_json: bool, options: dict[str, Any]) -> int:
    """Ask, stream, and return the exit code: 0, or 1 when the service refused or failed."""
    prompt: PromptLike = text if raw else [{"role": "user", "content": text}]
    async with AsyncClient(address) as client:
        try:
            generation = client.generate(prompt, **options)
            async for chunk in generation:
                if not as_json:
                    click.echo(chunk.text, nl=False)
            result = await generation.result()
        except (KvbatonError, ValueError, TypeError) as error:
            click.echo(f"Error: {error}", err=True)
            return 1
    if as_json:
        click.echo(json.dumps(_as_dict(result), ensure_ascii=False))
    else:
        click.echo()
        click.echo(summary(result), err=True)
    return 0


def summary(result: GenerationResult) -> str:
    """One line about a finished answer."""
    timings, usage = result.timings, result.usage
    return (
        f"[{usage.prompt_tokens} prompt + {usage.completion_tokens} generated tokens, {result.finish_reason}; "
        f"first token {timings.time_to_first_token_seconds * 1e3:.0f} ms, "
        f"total {timings.total_seconds * 1e3:.0f} ms; "
        f"KV {timings.transfer.payload_bytes / 2**20:.2f} MiB {result.prefill_worker} -> {result.decode_worker}]"
    )


def _as_dict(result: GenerationResult) -> dict[str, Any]:
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "usage": {
            "prompt_tokens": result.usage.prompt_tokens,
            "completion_tokens": result.usage.completion_tokens,
            "cached_tokens": result.usage.cached_tokens,
        },
        "request_id": result.request_id,
        "model": result.model,
        "seed": result.seed,
        "time_to_first_token_seconds": result.timings.time_to_first_token_seconds,
        "total_seconds": result.timings.total_seconds,
    }
