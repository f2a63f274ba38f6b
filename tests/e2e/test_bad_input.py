"""Bad input is refused with the name of the field, and no worker ever hears of it."""

import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvbaton.client import AsyncClient, InvalidArgumentError
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
