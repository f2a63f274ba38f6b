"""Garbage in every field, the same each time: it is answered, or refused by the name of a field, and soon. When it is
over nothing is left behind, and the service goes on.
"""

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings

from kvbaton.client import AsyncClient
from kvbaton.text.bundled import DEFAULT_MODEL, resolve_model
from kvbaton.v1 import inference_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from support import garbage
from support.cluster import Cluster, mixed_cluster

SECONDS = 10.0
"""In which each request must have its answer, whatever it asks."""
MAX_EVENTS = 20
"""Read of an answer before its client leaves."""
FIELDS = {*pb.GenerateRequest.DESCRIPTOR.fields_by_name, *types.SamplingParams.DESCRIPTOR.fields_by_name}
STORY = "The red lamp is with Ann. The blue key is in the kitchen. Where is the blue key?"
DEPLOYMENTS: dict[str, dict[str, Any]] = {"pair": {"prefill": {}, "decode": {}}, "unified": {"unified": {}}}

fuzzed = settings(
    max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

Send = Callable[[bytes], Any]
"""Starts a call."""


@fuzzed
@given(request=garbage.requests())
def send_garbage(send: Send, request: pb.GenerateRequest) -> None:
    expect_an_answer_or_a_refusal(send(request.SerializeToString()))


@fuzzed
@given(request=garbage.torn_requests())
def send_torn_bytes(send: Send, request: bytes) -> None:
    expect_an_answer_or_a_refusal(send(request))


def expect_an_answer_or_a_refusal(call: Any) -> None:
    refusal: grpc.RpcError | None = None
    try:
        for _ in itertools.islice(call, MAX_EVENTS):
            pass
    except grpc.RpcError as error:
        refusal = error
    call.cancel()
    if refusal is not None:
        assert refusal.code() is grpc.StatusCode.INVALID_ARGUMENT, refusal
        assert re.split(r"\W", refusal.details() or "")[0] in FIELDS | {"request"}, refusal


@pytest.fixture(params=DEPLOYMENTS)
async def services(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    async with mixed_cluster(Path(resolve_model(DEFAULT_MODEL)), **DEPLOYMENTS[request.param]) as running:
        yield running


@pytest.mark.parametrize("send_all", [send_garbage, send_torn_bytes])
async def test_garbage_is_answered_or_refused_and_leaves_nothing(
    services: Cluster, send_all: Callable[[Send], None]
) -> None:
    def from_a_thread() -> None:
        # Neither hypothesis nor the synchronous client knows of the loop that the services run in.
        with grpc.insecure_channel(services.router) as channel:
            method: Any = channel.unary_stream(
                "/kvbaton.v1.InferenceService/Generate", response_deserializer=pb.GenerateResponse.FromString
            )
            send_all(lambda request: method(request, timeout=SECONDS))

    await asyncio.to_thread(from_a_thread)
    await services.assert_idle()
    async with AsyncClient(services.router) as client:
        result = await client.generate([{"role": "user", "content": STORY}], timeout=60).result()
    assert result.text == "The blue key is in the kitchen."


def test_every_field_has_its_garbage() -> None:
    assert {*garbage.SAMPLING, *garbage.REQUEST, "sampling"} == FIELDS
