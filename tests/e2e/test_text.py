"""Text through real services: stop strings, whole characters, logprobs, wherever the tokens were made."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvbaton.client import AsyncClient, GenerationResult, TokenLogprobs
from kvbaton.text.bundled import DEFAULT_MODEL, resolve_model
from support.cluster import Cluster, mixed_cluster

FOLDER = Path(resolve_model(DEFAULT_MODEL))
PROMPT = "Café 😀. The red lamp is with Ann."
OPTIONS: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "temperature": 1.5, "timeout": 120}
SMALL_POOL = "288KiB"
"""24 blocks of 8 tokens: room for three of the answers below, or so."""
DEPLOYMENTS: dict[str, dict[str, Any]] = {"pair": {"prefill": {}, "decode": {}}, "unified": {"unified": {}}}


@pytest.fixture(params=DEPLOYMENTS)
async def services(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    async with mixed_cluster(FOLDER, **DEPLOYMENTS[request.param]) as running:
        yield running
        await running.assert_idle()


async def ask_all(client: AsyncClient, **options: Any) -> list[GenerationResult]:
    async with asyncio.TaskGroup() as group:
        asked = [
            group.create_task(client.generate(PROMPT, seed=seed, **{**OPTIONS, **options}).result())
            for seed in range(6)
        ]
    return [task.result() for task in asked]


async def test_a_stop_string_ends_the_answer_where_it_begins_or_ends(services: Cluster) -> None:
    async with AsyncClient(services.router) as client:
        whole = await client.generate(PROMPT, seed=5, **OPTIONS).result()
        for start, length in ((0, 1), (1, 3), (len(whole.text) // 2, 5), (len(whole.text) - 4, 4)):
            stop = whole.text[start : start + length]
            begin = whole.text.index(stop)
            without = await client.generate(PROMPT, seed=5, stop=["\x00", stop], **OPTIONS).result()
            assert (without.text, without.finish_reason, without.stop) == (whole.text[:begin], "stop", stop)
            assert without.token_ids == whole.token_ids[: len(without.token_ids)]
            kept = await client.generate(PROMPT, seed=5, stop=stop, include_stop_in_output=True, **OPTIONS).result()
            assert (kept.text, kept.stop) == (whole.text[: begin + length], stop)
            assert kept.token_ids == without.token_ids


async def test_text_arrives_in_whole_characters(services: Cluster) -> None:
    async with AsyncClient(services.router) as client:
        generation = client.generate(PROMPT, seed=1, **{**OPTIONS, "temperature": 100.0})
        chunks = [chunk.text async for chunk in generation]
        result = await generation.result()
    assert "".join(chunks) == result.text
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    prompt = tokenizer(PROMPT)["input_ids"]
    whole = tokenizer.decode([*prompt, *result.token_ids], skip_special_tokens=True)
    assert whole.endswith(result.text)
    assert "\ufffd" in result.text, "random bytes are no text, and this test is about them"


async def test_resumed_answers_have_the_same_text_logprobs_and_stops() -> None:
    options: dict[str, Any] = {"max_tokens": 60, "logprobs": 2}
    async with mixed_cluster(FOLDER, unified={}) as quiet, AsyncClient(quiet.router) as client:
        free = await ask_all(client, **options)
        stops = [result.text[-12:-8] for result in free]
        expected = await ask_all(client, stop=stops, **options)
    crowded = {"prefill": {}, "decode": {"kv_memory": SMALL_POOL}}
    async with mixed_cluster(FOLDER, **crowded) as services, AsyncClient(services.router) as client:
        for wanted, more in ((free, {}), (expected, {"stop": stops})):
            results = await ask_all(client, **options, **more)
            assert sum(result.num_resumes for result in results) > 0
            for result, other in zip(results, wanted, strict=True):
                assert (result.text, result.token_ids, result.stop) == (other.text, other.token_ids, other.stop)
                assert_close(result.logprobs, other.logprobs)
        assert any(result.stop for result in expected)
        await services.assert_idle()


def assert_close(ours: tuple[TokenLogprobs, ...], theirs: tuple[TokenLogprobs, ...]) -> None:
    assert [(one.token_id, one.rank) for one in ours] == [(one.token_id, one.rank) for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [token_id for token_id, _ in one.top] == [token_id for token_id, _ in other.top]
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-3)


def reference_logprobs(token_ids: list[int], num_top: int) -> list[TokenLogprobs]:
    """What `transformers` makes of each token from the second on, after those before it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([token_ids])).logits[0].double(), dim=-1)
    found = []
    for row, token_id in zip(logprobs, token_ids[1:], strict=False):
        top = row.topk(num_top)
        best = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        rank = 1 + int((row > row[token_id]).sum())
        found.append(TokenLogprobs(token_id, float(row[token_id]), rank, best))
    return found


async def test_logprobs_of_answer_and_prompt_equal_transformers(services: Cluster) -> None:
    async with AsyncClient(services.router) as client:
        prompt = await client.tokenize(PROMPT)
        result = await client.generate(PROMPT, seed=3, logprobs=4, prompt_logprobs=3, **OPTIONS).result()
    expected = reference_logprobs([*prompt, *result.token_ids], 4)
    num_prompt = len(prompt) - 1
    assert len(result.prompt_logprobs) == num_prompt
    assert len(result.logprobs) == len(result.token_ids) == OPTIONS["max_tokens"]
    assert_close(result.logprobs, tuple(expected[num_prompt:]))
    assert_close(result.prompt_logprobs, tuple(reference_logprobs(prompt, 3)))


async def test_of_n_answers_the_first_brings_the_prompts_logprobs(services: Cluster) -> None:
    async with AsyncClient(services.router) as client:
        result = await client.generate(PROMPT, n=3, seed=3, logprobs=0, prompt_logprobs=0, **OPTIONS).result()
        prompt = await client.tokenize(PROMPT)
    assert len(result.prompt_logprobs) == len(prompt) - 1
    assert [len(sequence.logprobs) for sequence in result.sequences] == [OPTIONS["max_tokens"]] * 3
