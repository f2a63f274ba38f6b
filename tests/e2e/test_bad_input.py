"""Bad input is refused with the name of the field, and no worker ever hears of it."""

import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvbaton.client import AsyncClient, InvalidArgumentError, OverloadedError
from kvbaton.text.bundled import DEFAULT_MODEL, resolve_model
from kvbaton.v1 import inference_pb2 as pb
from support import tiny_models
from support.cluster import Cluster, cluster, worker_status

CONTEXT = tiny_models.SHAPE["max_position_embeddings"]
VOCABULARY = tiny_models.SHAPE["vocab_size"]

CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("prompt", [], {}),
    ("prompt.text", "", {}),
    ("prompt.text", "a model without a tokenizer", {}),
    ("prompt.chat.messages[0].role", [{"role": "robot", "content": "hello"}], {}),
    ("prompt.chat", [{"role": "user", "content": "hello"}], {}),
    ("prompt.tokens", [VOCABULARY], {}),
    ("prompt.tokens", [2**32 - 1], {}),
    ("prompt", [5] * CONTEXT, {}),
    ("model", [5], {"model": "another"}),
    ("max_tokens", [5], {"max_tokens": 0}),
    ("max_tokens", [5], {"max_tokens": CONTEXT}),
    ("temperature", [5], {"temperature": -1.0}),
    ("temperature", [5], {"temperature": math.nan}),
    ("temperature", [5], {"temperature": math.inf}),
    ("top_p", [5], {"top_p": 0.0}),
    ("top_p", [5], {"top_p": 1.5}),
    ("top_p", [5], {"top_p": math.nan}),
    ("top_k", [5], {"top_k": 0}),
    ("stop_token_ids", [5], {"stop_token_ids": [VOCABULARY]}),
    ("request_id", [5], {"request_id": "x" * 129}),
    ("cache_salt", [5], {"cache_salt": "x" * 129}),
    ("cache_salt", [5], {"cache_salt": "new\nline"}),
    ("n", [5], {"n": 0}),
    ("n", [5], {"n": 129}),
    ("min_p", [5], {"min_p": -0.1}),
    ("min_p", [5], {"min_p": 1.1}),
    ("min_p", [5], {"min_p": math.nan}),
    ("presence_penalty", [5], {"presence_penalty": 2.1}),
    ("presence_penalty", [5], {"presence_penalty": math.nan}),
    ("frequency_penalty", [5], {"frequency_penalty": -2.1}),
    ("frequency_penalty", [5], {"frequency_penalty": math.inf}),
    ("repetition_penalty", [5], {"repetition_penalty": 0.0}),
    ("repetition_penalty", [5], {"repetition_penalty": 10.1}),
    ("logit_bias[7]", [5], {"logit_bias": {7: 100.5}}),
    (f"logit_bias[{VOCABULARY}]", [5], {"logit_bias": {VOCABULARY: 1.0}}),
    ("logit_bias", [5], {"logit_bias": dict.fromkeys(range(1025), 0.0)}),
    ("min_tokens", [5], {"min_tokens": 9, "max_tokens": 8}),
    ("allowed_token_ids", [5], {"allowed_token_ids": [VOCABULARY]}),
    ("allowed_token_ids", [5], {"allowed_token_ids": [7], "banned_token_ids": [7]}),
    ("banned_token_ids", [5], {"banned_token_ids": [2**32 - 1]}),
    ("stop_token_ids", [5], {"stop_token_ids": [5] * 10_000}),
    ("logprobs", [5], {"logprobs": 21}),
    ("prompt_logprobs", [5], {"prompt_logprobs": 2**32 - 1}),
    ("stop", [5], {"stop": ["a model without a tokenizer"]}),
    ("structured_output", [5], {"json_object": True}),
    ("structured_output", [5], {"regex": "a+"}),
]

# What a model with a tokenizer is asked.
TEXT_CASES: list[tuple[str, dict[str, Any]]] = [
    ("stop", {"stop": ["x"] * 10_000}),
    ("stop[1]", {"stop": ["x", "y" * 257]}),
    ("stop[0]", {"stop": [""]}),
    ("structured_output.json_schema", {"json_schema": " " * 2**20}),
    ("structured_output.json_schema", {"json_schema": ""}),
    ("structured_output.regex", {"regex": ""}),
    ("structured_output.choice.texts", {"choice": []}),
    ("structured_output.choice.texts[1]", {"choice": ["x", ""]}),
    ("structured_output.grammar", {"grammar": "x" * (2**16 + 1)}),
    ("min_tokens", {"json_object": True, "min_tokens": 1}),
    ("ignore_eos", {"json_object": True, "ignore_eos": True}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
async def running(folder: Path) -> AsyncIterator[Cluster]:
    async with cluster(folder) as services:
        yield services


async def test_each_field_is_named_and_no_worker_is_asked(running: Cluster) -> None:
    async with AsyncClient(running.router) as client:
        for field, prompt, options in CASES:
            with pytest.raises(InvalidArgumentError) as caught:
                await client.generate(prompt, timeout=10, **options).result()
            assert caught.value.field == field, caught.value
    for address in (running.prefill, running.decode):
        counters = (await worker_status(address)).counters
        assert (counters.requests_finished, counters.requests_cancelled, counters.num_steps) == (0, 0, 0)


async def test_each_field_of_text_is_named() -> None:
    async with cluster(Path(resolve_model(DEFAULT_MODEL))) as services, AsyncClient(services.router) as client:
        for field, options in TEXT_CASES:
            with pytest.raises(InvalidArgumentError) as caught:
                await client.generate("hello", timeout=10, **options).result()
            assert caught.value.field == field, caught.value
        assert (await worker_status(services.decode)).counters.num_steps == 0


async def test_a_prompt_that_is_missing_or_torn(running: Cluster) -> None:
    async with grpc.aio.insecure_channel(running.router) as channel:
        method = channel.unary_stream(
            "/kvbaton.v1.InferenceService/Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        for prompt, field in (
            (pb.Prompt(), "prompt: "),
            (pb.Prompt(tokens=pb.TokenPrompt(token_ids=b"12345")), "prompt.tokens: "),
            (pb.Prompt(chat=pb.ChatPrompt()), "prompt.chat.messages: "),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in method(pb.GenerateRequest(prompt=prompt), timeout=10):
                    pass
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert (caught.value.details() or "").startswith(field)


@pytest.mark.parametrize(("small", "field"), [("prefill", "prompt"), ("decode", "prompt and max_tokens")])
async def test_what_no_pool_can_hold_is_refused_at_once(folder: Path, small: str, field: str) -> None:
    # Eight blocks of 8 tokens.
    options: dict[str, Any] = {small: {"kv_memory": "24KiB"}}
    async with cluster(folder, **options) as services, AsyncClient(services.router) as client:
        with pytest.raises(OverloadedError, match=rf"{field}: \d+ tokens need \d+ KV blocks, the whole pool has 8"):
            await client.generate([5] * 70, max_tokens=20, timeout=10).result()
        await services.assert_idle()
