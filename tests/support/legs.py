"""Requests to workers as a router makes them, one leg or both, without a router."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from kvbaton.engine.tokens import pack_token_ids
from kvbaton.rpc.serving import channel, format_address, parse_address
from kvbaton.v1 import decode_pb2, prefill_pb2
from kvbaton.v1 import types_pb2 as types
from kvbaton.v1.decode_pb2_grpc import DecodeServiceStub
from kvbaton.v1.prefill_pb2_grpc import PrefillServiceStub

PATIENCE = 60.0


@dataclass
class Answer:
    """What the legs of one request brought."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: types.FinishReason = types.FINISH_REASON_UNSPECIFIED
    stop: str = ""
    logprobs: list[types.TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[types.TokenLogprobs] = field(default_factory=list)
    admitted: decode_pb2.DecodeAdmitted = field(default_factory=decode_pb2.DecodeAdmitted)
    decoded: decode_pb2.DecodeFinished | None = None
    prefilled: prefill_pb2.PrefillFinished | None = None
    preempted: str = ""
    """Why, if it was."""

    def add(self, event: types.TokenEvent, first_index: int) -> None:
        """Take in an event, which must continue where the answer is; `first_index` is that of a new answer."""
        assert event.first_index == first_index + len(self.token_ids)
        assert not self.finish_reason, "a token after the last"
        self.token_ids += event.token_ids
        self.text += event.text
        self.finish_reason = event.finish_reason
        self.stop = event.stop
        self.logprobs += event.logprobs


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request."""

    prompt: Sequence[int]
    output: Sequence[int] = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    priority: int = 0
    cache_salt: str = ""

    def fields(self) -> dict[str, Any]:
        """What both legs' requests share."""
        return {
            "request_id": "r",
            "prompt_token_ids": pack_token_ids(self.prompt),
            "output_token_ids": pack_token_ids(self.output),
            "sampling": types.SamplingParams(**{"max_tokens": 8, "seed": 0, "ignore_eos": True, **self.sampling}),
            "priority": self.priority,
            "cache_salt": self.cache_salt,
        }


async def answer_locally(worker: str, ask: Ask) -> Answer:
    """A request that one worker computes and decodes."""
    answer = Answer()
    async with channel(worker) as opened:
        request = decode_pb2.DecodeRequest(prefill_locally=True, **ask.fields())
        async for response in DecodeServiceStub(opened).Decode(request, timeout=PATIENCE):
            _take_in(answer, response, len(ask.output))
    return answer


async def hand_over(prefill: str, decode: str, ask: Ask) -> Answer:
    """A request over two workers: the KV goes from one to the other."""
    answer = Answer()
    admitted, first = asyncio.Event(), asyncio.Event()

    async def decode_leg() -> None:
        async with channel(decode) as opened:
            call = DecodeServiceStub(opened).Decode(decode_pb2.DecodeRequest(**ask.fields()), timeout=PATIENCE)
            async for response in call:
                if response.HasField("tokens"):
                    await first.wait()
                _take_in(answer, response, len(ask.output))
                admitted.set()

    async def prefill_leg(decoding: "asyncio.Task[None]") -> None:
        await admitted.wait()
        target = prefill_pb2.TransferTarget(
            endpoint=format_address(parse_address(decode)[0], answer.admitted.kv_port),
            ticket=answer.admitted.ticket,
            attempt=1,
            num_cached_tokens=answer.admitted.num_cached_tokens,
        )
        async with channel(prefill) as opened:
            request = prefill_pb2.PrefillRequest(target=target, **ask.fields())
            async for response in PrefillServiceStub(opened).Prefill(request, timeout=PATIENCE):
                if response.HasField("first_token"):
                    answer.add(response.first_token, len(ask.output))
                    first.set()
                    if answer.finish_reason:
                        decoding.cancel()
                elif response.HasField("prompt_logprobs"):
                    answer.prompt_logprobs += response.prompt_logprobs.tokens
                else:
                    answer.prefilled = response.finished

    async with asyncio.TaskGroup() as group:
        decoding = group.create_task(decode_leg())
        group.create_task(prefill_leg(decoding))
    return answer


def _take_in(answer: Answer, response: decode_pb2.DecodeResponse, first_index: int) -> None:
    match response.WhichOneof("event"):
        case "admitted":
            answer.admitted = response.admitted
        case "prompt_logprobs":
            assert not answer.token_ids, "prompt logprobs come before the first token"
            answer.prompt_logprobs += response.prompt_logprobs.tokens
        case "tokens":
            answer.add(response.tokens, first_index)
        case "finished":
            answer.decoded = response.finished
        case "preempted":
            answer.preempted = response.preempted.reason


async def refusal_of(worker: str, ask: Ask) -> grpc.aio.AioRpcError:
    """The error that a local request ends with."""
    try:
        await answer_locally(worker, ask)
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("it was answered")
