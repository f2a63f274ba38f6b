"""Both clients against a fake router: streaming, results, early ends, timeouts, errors."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest

from kvbaton import client as sdk
from kvbaton.client import AsyncClient, Client, InvalidArgumentError, KvbatonError
from kvbaton.engine import errors
from kvbaton.engine.tokens import pack_token_ids
from kvbaton.v1 import inference_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from support.fakes import PATIENCE, FakeRouter, Script, forever, model_info, served, token_event

T = TypeVar("T")


async def hello(request: Any, context: Any) -> None:
    await context.write(pb.GenerateResponse(tokens=token_event(0, 10, text="Hel")))
    await context.write(pb.GenerateResponse(tokens=token_event(1, 11, 12, text="lo")))
    reason = types.FINISH_REASON_LENGTH
    await context.write(pb.GenerateResponse(finished=pb.GenerateFinished(request_id="r", finish_reason=reason)))


async def hello_and_wait(request: Any, context: Any) -> None:
    await context.write(pb.GenerateResponse(tokens=token_event(0, 10, text="Hel")))
    await forever()


def failing(error: Exception) -> Script:
    async def script(request: Any, context: Any) -> None:
        await context.write(pb.GenerateResponse(tokens=token_event(0, 10, text="Hel")))
        raise error

    return script


@asynccontextmanager
async def asking(script: Script) -> AsyncIterator[tuple[FakeRouter, AsyncClient, Client]]:
    router = FakeRouter(script)
    async with asyncio.timeout(PATIENCE), served(router) as address, AsyncClient(address) as asynchronous:
        with Client(address) as synchronous:
            yield router, asynchronous, synchronous


async def in_thread(work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work)


async def test_an_answer_streams_and_ends_with_a_result() -> None:
    async with asking(hello) as (router, client, _):
        generation = client.generate("hi", max_tokens=3, metadata=[("traceparent", "t")])
        assert [chunk.text async for chunk in generation] == ["Hel", "lo"]
        result = await generation.result()
        assert (result.text, result.token_ids, result.finish_reason) == ("Hello", (10, 11, 12), "length")
        assert [chunk async for chunk in generation] == []
        assert (await generation.result()) == result
        assert router.requests == [pb.GenerateRequest(prompt=pb.Prompt(text="hi"), sampling={"max_tokens": 3})]
        assert router.metadata[0]["traceparent"] == "t"


async def test_an_answer_streams_and_ends_with_a_result_without_a_loop() -> None:
    async with asking(hello) as (router, _, client):

        def ask() -> tuple[list[str], Any, Any]:
            with client.generate([5, 6], seed=4, metadata=[("traceparent", "t")]) as generation:
                texts = [chunk.text for chunk in generation]
                return texts, generation.result(), generation.result()

        texts, result, again = await in_thread(ask)
        assert texts == ["Hel", "lo"]
        assert result == again
        assert (result.text, result.token_ids) == ("Hello", (10, 11, 12))
        assert router.requests[0].prompt.tokens.token_ids == pack_token_ids([5, 6])
        assert router.metadata[0]["traceparent"] == "t"


async def test_a_result_needs_no_iteration() -> None:
    async with asking(hello) as (_, client, synchronous):
        assert (await client.generate("hi").result()).text == "Hello"
        assert (await in_thread(lambda: synchronous.generate("hi").result())).text == "Hello"


async def test_an_early_close_cancels_at_the_router() -> None:
    async with asking(hello_and_wait) as (router, client, _):
        async with client.generate("hi") as generation:
            assert (await anext(generation)).text == "Hel"
        await router.cancelled.wait()
        assert [chunk async for chunk in generation] == []
        await generation.aclose()


async def test_a_generation_that_nobody_holds_any_more_is_cancelled_at_the_router() -> None:
    async with asking(hello_and_wait) as (router, client, _):
        async for chunk in client.generate("hi"):
            assert chunk.text == "Hel"
            break
        gc.collect()
        await router.cancelled.wait()


async def test_a_closed_generation_has_no_result() -> None:
    async with asking(hello_and_wait) as (_, client, synchronous):
        generation = client.generate("hi")
        await generation.aclose()
        with pytest.raises(sdk.RequestCancelledError):
            await generation.result()

        def close_and_ask() -> None:
            plain = synchronous.generate("hi")
            plain.close()
            plain.result()

        with pytest.raises(sdk.RequestCancelledError):
            await in_thread(close_and_ask)


async def test_an_early_close_cancels_at_the_router_without_a_loop() -> None:
    async with asking(hello_and_wait) as (router, _, client):

        def ask() -> list[Any]:
            with client.generate("hi") as generation:
                assert next(generation).text == "Hel"
            generation.close()
            return list(generation)

        assert await in_thread(ask) == []
        await router.cancelled.wait()


async def test_a_close_elsewhere_ends_a_waiting_reader_with_an_error() -> None:
    async with asking(hello_and_wait) as (router, client, _):
        generation = client.generate("hi")
        await anext(generation)

        async def read() -> None:
            with pytest.raises(sdk.RequestCancelledError):
                await anext(generation)

        async with asyncio.TaskGroup() as group:
            reading = group.create_task(read())
            await asyncio.sleep(0)
            await generation.aclose()
        assert not reading.cancelled()
        await router.cancelled.wait()


async def test_a_cancelled_reader_is_cancelled_and_ends_the_call() -> None:
    async with asking(hello_and_wait) as (router, client, _):
        generation = client.generate("hi")
        await anext(generation)
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(generation.result())
            await asyncio.sleep(0)
            reading.cancel()
        assert reading.cancelled()
        await router.cancelled.wait()


async def test_closing_the_client_ends_its_calls() -> None:
    async with asking(hello_and_wait) as (router, client, synchronous):
        await anext(client.generate("hi"))
        await client.close()
        await router.cancelled.wait()
        router.cancelled.clear()
        generation = synchronous.generate("hi")
        assert (await in_thread(lambda: next(generation))).text == "Hel"
        synchronous.close()
        await router.cancelled.wait()
        with pytest.raises(sdk.RequestCancelledError):
            await in_thread(lambda: next(generation))


async def test_a_call_on_a_closed_client_is_an_error_of_the_sdk() -> None:
    async with asking(hello) as (_, client, synchronous):
        await client.close()
        synchronous.close()
        with pytest.raises(KvbatonError):
            await client.generate("hi").result()
        with pytest.raises(KvbatonError):
            await client.models()
        with pytest.raises(KvbatonError):
            await in_thread(lambda: synchronous.generate("hi").result())
        with pytest.raises(KvbatonError):
            await in_thread(synchronous.models)


async def test_a_timeout_is_a_deadline_error() -> None:
    async with asking(hello_and_wait) as (router, client, synchronous):
        with pytest.raises(sdk.DeadlineExceededError):
            await client.generate("hi", timeout=0.2).result()
        await router.cancelled.wait()
        with pytest.raises(sdk.DeadlineExceededError):
            await in_thread(lambda: synchronous.generate("hi", timeout=0.2).result())


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (errors.InvalidArgumentError("top_p", "is odd"), InvalidArgumentError),
        (errors.OverloadedError("full"), sdk.OverloadedError),
        (errors.UnavailableError("no worker"), sdk.UnavailableError),
        (errors.TransferRejectedError("crc"), sdk.UnavailableError),
        (TimeoutError("late"), sdk.DeadlineExceededError),
        (ValueError("secret"), sdk.ServiceError),
    ],
)
async def test_errors_of_the_service_are_the_sdks(raised: Exception, kind: type[KvbatonError]) -> None:
    async with asking(failing(raised)) as (_, client, synchronous):
        generation = client.generate("hi")
        assert (await anext(generation)).text == "Hel"
        with pytest.raises(kind) as caught:
            await anext(generation)
        if kind is sdk.ServiceError:
            assert "secret" not in str(caught.value)
        else:
            assert str(caught.value) == str(raised)
        # It does not turn into an ordinary end when it is asked again.
        with pytest.raises(kind):
            await generation.result()
        with pytest.raises(kind) as again:
            await in_thread(lambda: synchronous.generate("hi").result())
        assert str(again.value) == str(caught.value)
        if isinstance(caught.value, InvalidArgumentError):
            assert caught.value.field == "top_p"


async def test_nobody_listening_is_unavailable() -> None:
    async with served(FakeRouter(hello)) as address:
        pass
    async with AsyncClient(address) as client:
        with pytest.raises(sdk.UnavailableError):
            await client.generate("hi").result()
        with pytest.raises(sdk.UnavailableError):
            await client.tokenize("hi")
    with Client(address) as synchronous, pytest.raises(sdk.UnavailableError):
        await in_thread(lambda: synchronous.generate("hi").result())


async def test_a_stream_that_ends_early_or_skips_tokens_is_a_service_error() -> None:
    async def short(request: Any, context: Any) -> None:
        await context.write(pb.GenerateResponse(tokens=token_event(int(request.request_id), 10)))

    async with asking(short) as (_, client, synchronous):
        with pytest.raises(sdk.ServiceError, match="ended without a result"):
            await client.generate("hi", request_id="0").result()
        with pytest.raises(sdk.ServiceError, match="token 1 came where 0 was next"):
            await client.generate("hi", request_id="1").result()
        with pytest.raises(sdk.ServiceError, match="token 1 came where 0 was next"):
            await in_thread(lambda: synchronous.generate("hi", request_id="1").result())


async def test_arguments_that_cannot_be_sent_are_refused_before_any_call() -> None:
    async with asking(hello) as (router, client, synchronous):
        for generate in (client.generate, synchronous.generate):
            with pytest.raises(ValueError, match="token id"):
                generate([2**32])
            with pytest.raises(TypeError):
                generate(["no prompt"])  # type: ignore[arg-type]
        assert router.requests == []


async def test_tokenize_and_models_ask_the_router() -> None:
    async with asking(hello) as (router, client, synchronous):
        router.tokenized = pb.TokenizeResponse(token_ids=pack_token_ids([1, 2]))
        router.listed = pb.ListModelsResponse(models=[model_info()])
        assert await client.tokenize("hi", model="m") == [1, 2]
        assert await in_thread(lambda: synchronous.tokenize("hi", model="m")) == [1, 2]
        assert router.requests == [pb.TokenizeRequest(model="m", prompt=pb.Prompt(text="hi"))] * 2
        assert await client.models() == [model_info()]
        assert await in_thread(synchronous.models) == [model_info()]
