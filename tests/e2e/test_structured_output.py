"""Structured output through real services: every answer has its form, n of them and resumed ones, too."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from kvbaton.client import AsyncClient, GenerationResult, InvalidArgumentError
from kvbaton.text.bundled import DEFAULT_MODEL, resolve_model
from support.cluster import Cluster, mixed_cluster, worker_status

FOLDER = Path(resolve_model(DEFAULT_MODEL))
PROMPT = "Who has the red lamp?"
EOS = 2
OPTIONS: dict[str, Any] = {"max_tokens": 200, "temperature": 1.0, "timeout": 120}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 4},
        "kind": {"enum": ["lamp", "café"]},
    },
    "required": ["name", "ages", "kind"],
    "additionalProperties": False,
}
LONG_SCHEMA: dict[str, Any] = {"type": "array", "items": {"type": "boolean"}, "minItems": 20, "maxItems": 25}
DEPLOYMENTS: dict[str, dict[str, Any]] = {"pair": {"prefill": {}, "decode": {}}, "unified": {"unified": {}}}


@pytest.fixture(params=DEPLOYMENTS)
async def services(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    async with mixed_cluster(FOLDER, **DEPLOYMENTS[request.param]) as running:
        yield running
        await running.assert_idle()


async def ask_all(client: AsyncClient, number: int, **options: Any) -> list[GenerationResult]:
    async with asyncio.TaskGroup() as group:
        asked = [
            group.create_task(client.generate(PROMPT, seed=seed, **{**OPTIONS, **options}).result())
            for seed in range(number)
        ]
    return [task.result() for task in asked]


async def test_every_answer_has_its_form(services: Cluster) -> None:
    async with AsyncClient(services.router) as client:
        for result in await ask_all(client, 4, json_schema=SCHEMA):
            assert result.finish_reason == "stop"
            jsonschema.validate(json.loads(result.text), SCHEMA)
        for result in await ask_all(client, 2, choice=["yes", "no", "perhaps"]):
            assert result.text in ("yes", "no", "perhaps")
        for result in await ask_all(client, 2, regex=r"[ab]{3}-\d{2}"):
            assert re.fullmatch(r"[ab]{3}-\d{2}", result.text)
        for result in await ask_all(client, 2, json_object=True):
            assert result.finish_reason == "length" or isinstance(json.loads(result.text), dict)
        for result in await ask_all(client, 2, grammar='start: "a" ("," "b")~2'):
            assert result.text == "a,b,b"


async def test_a_form_that_the_allowed_tokens_cannot_spell_is_refused_when_that_shows(services: Cluster) -> None:
    async with AsyncClient(services.router) as client:
        *_, letter = await client.tokenize("xb")
        for regex, fits in (("b{2,4}", True), ("b{3}c", False), ("[0-9]", False)):
            generation = client.generate(PROMPT, regex=regex, allowed_token_ids=[letter, EOS], **OPTIONS)
            if fits:
                assert re.fullmatch(regex, (await generation.result()).text)
                continue
            with pytest.raises(InvalidArgumentError, match="structured_output: nothing is left"):
                await generation.result()
    workers = [address for address in (services.prefill, services.decode, services.unified) if address]
    assert not any([(await worker_status(address)).counters.requests_not_a_number for address in workers])


async def test_n_answers_have_it_and_differ(services: Cluster) -> None:
    async with AsyncClient(services.router) as client:
        result = await client.generate(PROMPT, n=4, seed=1, json_schema=SCHEMA, **OPTIONS).result()
    for sequence in result.sequences:
        jsonschema.validate(json.loads(sequence.text), SCHEMA)
    assert len({sequence.text for sequence in result.sequences}) > 1


async def test_resumed_answers_go_on_where_they_were() -> None:
    async with mixed_cluster(FOLDER, unified={}) as quiet, AsyncClient(quiet.router) as client:
        expected = await ask_all(client, 6, json_schema=LONG_SCHEMA)
    # 32 blocks of 8 tokens: room for one of them at full length.
    crowded = {"prefill": {}, "decode": {"kv_memory": "384KiB"}}
    async with mixed_cluster(FOLDER, **crowded) as services, AsyncClient(services.router) as client:
        results = await ask_all(client, 6, json_schema=LONG_SCHEMA)
        assert sum(result.num_resumes for result in results) > 0
        assert [result.text for result in results] == [result.text for result in expected]
        for result in results:
            jsonschema.validate(json.loads(result.text), LONG_SCHEMA)
        await services.assert_idle()


BAD_FORMS: list[tuple[str, dict[str, Any]]] = [
    ("structured_output.json_schema", {"json_schema": "{"}),
    ("structured_output.json_schema", {"json_schema": {"type": "no type"}}),
    ("structured_output.regex", {"regex": "("}),
    ("structured_output.regex", {"regex": "(a{1,2000}){1,2000}"}),
    ("structured_output.grammar", {"grammar": "start: nothing"}),
]


async def test_a_form_that_is_none_is_refused_by_its_field(services: Cluster) -> None:
    async with AsyncClient(services.router) as client:
        for field, options in BAD_FORMS:
            with pytest.raises(InvalidArgumentError) as caught:
                await client.generate(PROMPT, **{**OPTIONS, **options, "timeout": 30}).result()
            assert caught.value.field == field, caught.value
    counters = (await worker_status(services.decode or services.unified)).counters
    assert counters.num_steps == 0
