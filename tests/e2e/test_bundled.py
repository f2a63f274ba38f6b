"""The bundled model answers questions about stories that it was never trained on, through the whole path.

A KV entry that is lost, shifted or swapped on the way shows here as a wrong answer in words.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from tiny_stories import Example, facts_for_tokens, held_out_example

from kvbaton.client import AsyncClient, Client
from kvbaton.text.bundled import DEFAULT_MODEL, resolve_model
from support.cluster import Cluster, cluster

LENGTHS = (32, 128, 256, 448)
"""Story lengths in tokens, about."""
PER_LENGTH = 8


async def answers(services: Cluster, examples: Sequence[Example]) -> list[str]:
    async with AsyncClient(services.router) as client:

        async def ask(example: Example) -> str:
            generation = client.generate([{"role": "user", "content": example.prompt}], timeout=60)
            return (await generation.result()).text

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(example)) for example in examples]
    return [task.result() for task in tasks]


async def test_it_recalls_unseen_stories() -> None:
    examples = [held_out_example(seed, facts_for_tokens(length)) for length in LENGTHS for seed in range(PER_LENGTH)]
    folder = Path(resolve_model(DEFAULT_MODEL))
    async with cluster(folder, prefill={"max_prefill_tokens": 100}) as services:
        given = await answers(services, examples)
    right = sum(answer.strip() == example.answer for answer, example in zip(given, examples, strict=True))
    assert right >= 0.95 * len(examples), f"{right} of {len(examples)}"


async def test_text_streams_whole_and_in_order() -> None:
    """What chunks add up to is what the tokenizer makes of the tokens, in both clients."""
    example = held_out_example(1, 6)
    async with cluster(Path(resolve_model(DEFAULT_MODEL))) as services:

        def ask() -> tuple[list[str], str]:
            with Client(services.router) as client:
                generation = client.generate([{"role": "user", "content": example.prompt}], timeout=60)
                chunks = [chunk.text for chunk in generation]
                return chunks, generation.result().text

        chunks, text = await asyncio.to_thread(ask)
        assert len(chunks) > 3
        assert "".join(chunks) == text
        assert text.strip() == example.answer
        async with AsyncClient(services.router) as client:
            plain = client.generate(
                "Caf\u00e9 \U0001f600 and more.", max_tokens=20, ignore_eos=True, temperature=2.0, seed=5
            )
            result = await plain.result()
            tokens = await client.tokenize("Caf\u00e9 \U0001f600 and more.")
        assert result.usage.prompt_tokens == len(tokens)
        assert len(result.token_ids) == 20
