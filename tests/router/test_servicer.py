"""The router's RPCs over fake workers: answers are relayed and described, bad input reaches no worker, the number of
requests in flight is bounded, and no failure leaves a client without a status.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest

from kvbaton.engine.errors import StartupError, UnavailableError
from kvbaton.engine.tokens import pack_token_ids
from kvbaton.router.config import RouterConfig
from kvbaton.router.registry import DECODE, PREFILL, Registry, Worker
from kvbaton.router.service import serve_router
from kvbaton.router.servicer import AdminServicer, InferenceServicer
from kvbaton.rpc.serving import channel, serving
from kvbaton.v1 import admin_pb2, decode_pb2, prefill_pb2, worker_pb2
from kvbaton.v1 import inference_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from kvbaton.v1.admin_pb2_grpc import AdminServiceStub
from kvbaton.v1.inference_pb2_grpc import InferenceServiceStub
from support.fakes import PATIENCE, FakeDecode, FakePrefill, forever, model_info, served, token_event

LENGTH = types.FINISH_REASON_LENGTH


async def prefill_one(request: Any, context: Any) -> None:
    await context.write(prefill_pb2.PrefillResponse(first_token=token_event(0, 10, text="a")))
    await context.write(prefill_pb2.PrefillResponse(finished=prefill_pb2.PrefillFinished(cached_tokens=1)))


async def decode_two(request: Any, context: Any) -> None:
    await context.write(decode_pb2.DecodeResponse(admitted=decode_pb2.DecodeAdmitted(ticket=bytes(16), kv_port=1)))
    await context.write(decode_pb2.DecodeResponse(tokens=token_event(1, 11, 12, finish=LENGTH, text="bc")))
    await context.write(decode_pb2.DecodeResponse(finished=decode_pb2.DecodeFinished()))


class Router:
    def __init__(self) -> None:
        self.prefill, self.decode = FakePrefill(prefill_one), FakeDecode(decode_two)
        self.workers: list[Worker] = []
        self.registry = Registry(self.workers, lambda ready: None)
        self.stub: Any = None
        self.admin: Any = None

    def connect(self) -> None:
        for worker in self.workers:
            limits = worker_pb2.EngineLimits(max_prefill_tokens=8, max_decode_seqs=8)
            status = worker_pb2.WorkerStatus(role=worker.role, incarnation="1", model=model_info(), limits=limits)
            self.registry.update(worker, status)

    def generate(self, prompt: bytes = pack_token_ids([5, 6, 7]), **fields: Any) -> Any:
        request = pb.GenerateRequest(prompt=pb.Prompt(tokens=pb.TokenPrompt(token_ids=prompt)), **fields)
        return self.stub.Generate(request, timeout=PATIENCE)

    @property
    def num_asked(self) -> int:
        return len(self.prefill.requests) + len(self.decode.requests)


@asynccontextmanager
async def routing(**config: Any) -> AsyncIterator[Router]:
    router = Router()
    async with asyncio.timeout(PATIENCE), AsyncExitStack() as stack:
        for role, fake in ((PREFILL, router.prefill), (DECODE, router.decode)):
            address = await stack.enter_async_context(served(fake))
            router.workers.append(Worker(address, role, await stack.enter_async_context(channel(address))))
        router.connect()
        inference = InferenceServicer(RouterConfig(**config), router.registry, None)
        services = [inference.registration, AdminServicer(router.registry).registration]
        server = await stack.enter_async_context(serving(services, "127.0.0.1", 0, grace_seconds=0))
        opened = await stack.enter_async_context(channel(server.address))
        router.stub, router.admin = InferenceServiceStub(opened), AdminServiceStub(opened)
        yield router


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_all(call)
    return caught.value


async def read_all(call: Any) -> list[pb.GenerateResponse]:
    responses: list[pb.GenerateResponse] = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


async def test_an_answer_is_relayed_and_described() -> None:
    async with routing() as router:
        *events, last = await read_all(router.generate(request_id="mine", sampling=types.SamplingParams(seed=9)))
        assert [(e.tokens.first_index, list(e.tokens.token_ids), e.tokens.text) for e in events] == [
            (0, [10], "a"),
            (1, [11, 12], "bc"),
        ]
        finished = last.finished
        assert (finished.request_id, finished.model, finished.seed) == ("mine", "fake", 9)
        assert finished.finish_reason == LENGTH
        assert finished.usage == types.Usage(prompt_tokens=3, completion_tokens=3, cached_tokens=1)
        assert [finished.prefill_worker, finished.decode_worker] == [worker.address for worker in router.workers]
        timings = finished.timings
        assert 0 < timings.time_to_first_token_seconds <= timings.total_seconds
        assert timings.second_token_gap_seconds > 0


async def test_a_seed_is_drawn_told_to_both_workers_and_reported() -> None:
    async with routing() as router:
        seeds = {(await read_all(router.generate()))[-1].finished.seed for _ in range(3)}
        assert len(seeds) == 3
        for requests in (router.prefill.requests, router.decode.requests):
            assert {request.sampling.seed for request in requests} == seeds
            assert {request.sampling.max_tokens for request in requests} == {61}


@pytest.mark.parametrize(
    ("prompt", "fields", "problem"),
    [
        (b"", {}, "prompt: is empty"),
        (b"abc", {}, "prompt.tokens: 3 bytes"),
        (pack_token_ids([100]), {}, "prompt.tokens: token id 100"),
        (pack_token_ids([5] * 64), {}, "prompt: 64 tokens"),
        (pack_token_ids([5]), {"model": "other"}, "model: 'other' is not served here"),
        (pack_token_ids([5]), {"request_id": "x" * 129}, "request_id: must be"),
        (pack_token_ids([5]), {"sampling": types.SamplingParams(max_tokens=0)}, "max_tokens: 0"),
        (pack_token_ids([5]), {"sampling": types.SamplingParams(temperature=-1)}, "temperature: -1"),
    ],
)
async def test_bad_input_is_refused_and_reaches_no_worker(prompt: bytes, fields: dict[str, Any], problem: str) -> None:
    async with routing() as router:
        error = await refusal(router.generate(prompt, **fields))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (error.details() or "").startswith(problem)
        assert router.num_asked == 0


async def test_text_is_refused_where_there_is_no_tokenizer() -> None:
    async with routing() as router:
        request = pb.GenerateRequest(prompt=pb.Prompt(text="hello"))
        error = await refusal(router.stub.Generate(request, timeout=PATIENCE))
        assert error.details() == "prompt.text: the model has no tokenizer; send token ids"
        error = await refusal(router.stub.Generate(pb.GenerateRequest(), timeout=PATIENCE))
        assert error.details() == "prompt: is missing: set text, tokens or chat"
        assert router.num_asked == 0


async def test_more_requests_than_allowed_are_refused_until_one_has_ended() -> None:
    async with routing(max_in_flight=2) as router:
        router.decode.script = forever
        calls = [router.generate(), router.generate()]
        while len(router.decode.requests) < 2:
            await asyncio.sleep(0)
        error = await refusal(router.generate())
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == "2 requests are in flight already"
        assert len(router.decode.requests) == 2
        # What waits for the tokenizer is held in memory as well.
        with pytest.raises(grpc.aio.AioRpcError, match="2 requests are in flight already"):
            await router.stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="hello")))
        router.decode.script = decode_two
        calls[0].cancel()
        await router.decode.cancelled.wait()
        while router.workers[1].num_in_flight > 1:
            await asyncio.sleep(0)
        assert (await read_all(router.generate()))[-1].HasField("finished")
        calls[1].cancel()


async def test_answers_to_one_prompt_share_one_stream() -> None:
    async with routing() as router:
        *events, last = await read_all(router.generate(sampling=types.SamplingParams(n=9)))
        for sequence in range(9):
            ours = [event.tokens for event in events if event.tokens.sequence == sequence]
            assert [(e.first_index, list(e.token_ids), e.text) for e in ours] == [(0, [10], "a"), (1, [11, 12], "bc")]
            assert [e.finish_reason for e in ours] == [0, LENGTH]
        assert last.finished.usage == types.Usage(prompt_tokens=3, completion_tokens=27, cached_tokens=1)
        assert (last.finished.finish_reason, last.finished.num_resumes) == (LENGTH, 0)


async def test_each_answer_counts_as_a_request_in_flight() -> None:
    async with routing(max_in_flight=3) as router:
        router.decode.script = forever
        call = router.generate(sampling=types.SamplingParams(n=3))
        while not router.decode.requests:
            await asyncio.sleep(0)
        assert (await refusal(router.generate())).details() == "3 requests are in flight already"
        call.cancel()
        await router.decode.cancelled.wait()
        router.decode.script = decode_two
        error = await refusal(router.generate(sampling=types.SamplingParams(n=2**32 - 1)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (await read_all(router.generate()))[-1].HasField("finished")


async def test_a_request_that_was_handed_back_says_so() -> None:
    async def hand_back(request: Any, context: Any) -> None:
        await context.write(decode_pb2.DecodeResponse(admitted=decode_pb2.DecodeAdmitted(ticket=bytes(16), kv_port=1)))
        await context.write(decode_pb2.DecodeResponse(preempted=decode_pb2.DecodePreempted()))
        router.decode.script = decode_rest

    async def decode_rest(request: Any, context: Any) -> None:
        router.prefill.script = prefill_rest
        await context.write(decode_pb2.DecodeResponse(admitted=decode_pb2.DecodeAdmitted(ticket=bytes(16), kv_port=1)))
        await context.write(decode_pb2.DecodeResponse(tokens=token_event(2, 12, finish=LENGTH)))
        await context.write(decode_pb2.DecodeResponse(finished=decode_pb2.DecodeFinished()))

    async def prefill_rest(request: Any, context: Any) -> None:
        await context.write(prefill_pb2.PrefillResponse(first_token=token_event(1, 11)))
        await context.write(prefill_pb2.PrefillResponse(finished=prefill_pb2.PrefillFinished(cached_tokens=3)))

    async with routing() as router:
        router.decode.script = hand_back
        *events, last = await read_all(router.generate())
        assert [list(event.tokens.token_ids) for event in events] == [[10], [11], [12]]
        assert last.finished.num_resumes == 1
        assert last.finished.usage == types.Usage(prompt_tokens=3, completion_tokens=3, cached_tokens=1)
        timings = last.finished.timings
        assert 0 < timings.second_token_gap_seconds < timings.total_seconds


async def test_requests_that_fail_do_not_stay_in_flight() -> None:
    async with routing(max_in_flight=1) as router:
        for _ in range(3):
            assert (await refusal(router.generate(b""))).code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (await read_all(router.generate()))[-1].HasField("finished")


async def test_a_router_without_workers_says_which() -> None:
    async with routing() as router:
        router.registry.lost(router.workers[1], "gone")
        error = await refusal(router.generate())
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert error.details() == "no decode worker is ready"
        assert (await router.stub.ListModels(pb.ListModelsRequest())).models == []
        router.registry.model = None
        error = await refusal(router.generate())
        assert error.details() == "no worker has connected yet"


async def test_a_client_that_cancels_frees_both_workers() -> None:
    async def prefill_forever(request: Any, context: Any) -> None:
        await context.write(prefill_pb2.PrefillResponse(first_token=token_event(0, 10)))
        await forever()

    async with routing() as router:
        router.prefill.script = prefill_forever
        call = router.generate()
        await call.read()
        call.cancel()
        await router.prefill.cancelled.wait()


async def test_a_worker_that_fails_as_the_first_token_is_relayed_leaves_the_client_with_a_status() -> None:
    async def fail(request: Any, context: Any) -> None:
        await context.write(decode_pb2.DecodeResponse(admitted=decode_pb2.DecodeAdmitted(ticket=bytes(16), kv_port=1)))
        while not router.prefill.requests:
            await asyncio.sleep(0)
        raise UnavailableError("lost at the worst moment")

    # Whether the failure meets the very write of the first token is up to the loop; in a few tries it does.
    async with routing() as router:
        router.decode.script = fail
        for _ in range(40):
            router.prefill.requests.clear()
            error = await refusal(router.generate())
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert "lost at the worst moment" in (error.details() or "")


async def test_tokens_are_what_generate_would_compute() -> None:
    async with routing() as router:
        prompt = pb.Prompt(tokens=pb.TokenPrompt(token_ids=pack_token_ids([5, 99])))
        answer = await router.stub.Tokenize(pb.TokenizeRequest(prompt=prompt))
        assert answer.token_ids == pack_token_ids([5, 99])
        with pytest.raises(grpc.aio.AioRpcError, match="model: 'other'"):
            await router.stub.Tokenize(pb.TokenizeRequest(model="other", prompt=prompt))
        assert list((await router.stub.ListModels(pb.ListModelsRequest())).models) == [model_info()]
        assert router.num_asked == 0


async def test_operators_see_every_worker_and_why_it_is_not_used() -> None:
    async with routing() as router:
        router.registry.lost(router.workers[0], "gone")
        with router.workers[1].carrying():
            listed = (await router.admin.ListWorkers(admin_pb2.ListWorkersRequest())).workers
        assert [(w.connected, w.num_in_flight, w.problem) for w in listed] == [
            (False, 0, "not connected: gone"),
            (True, 1, ""),
        ]
        assert [w.address for w in listed] == [w.address for w in router.workers]
        assert {w.status.model.name for w in listed} == {"fake"}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"decode": ("d:1",)}, "--prefill: name at least one worker"),
        ({"prefill": ("p:1",)}, "--decode: name at least one worker"),
        ({"prefill": ("p:1", "p:1"), "decode": ("d:1",)}, "--prefill: a worker is named twice"),
        ({"prefill": ("p:1",), "decode": ("d",)}, "--decode: address: 'd' is not host:port"),
        ({}, "--prefill: name at least one worker"),
        ({"workers": ("u:1", "u:1")}, "--workers: a worker is named twice"),
        ({"workers": ("u:0",)}, "--workers: 'u:0' has port 0"),
        ({"workers": ("u:1",), "decode": ("d:1", "u:1")}, "--decode and --workers: u:1 cannot be both"),
    ],
)
async def test_a_router_with_wrong_addresses_does_not_start(options: dict[str, Any], problem: str) -> None:
    started: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    with pytest.raises(StartupError, match=problem):
        await serve_router(RouterConfig(**options), asyncio.Event(), started)
    assert not started.done()
