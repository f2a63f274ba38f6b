"""Servers that start, say how they are, drain and end; addresses; the loop; signals."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry.trace import SpanKind

from kvbaton.engine.errors import InvalidArgumentError, StartupError
from kvbaton.rpc import serving as module
from kvbaton.rpc.serving import (
    MAX_MESSAGE_BYTES,
    channel,
    format_address,
    parse_address,
    run,
    serving,
    termination_event,
    wait_for_termination,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

SERVING, NOT_SERVING = 1, 2
NAME = "kvbaton.test.Shapes"
METHOD = f"/{NAME}/unary_stream"


async def echo(request: bytes, context: Any) -> bytes:
    return request


async def asked(service: str) -> AsyncIterator[Any]:
    yield reflection_pb2.ServerReflectionRequest(file_containing_symbol=service)
    yield reflection_pb2.ServerReflectionRequest(list_services="")


async def test_health_and_reflection_answer_and_leave_no_spans(shapes: Any, spans: Any) -> None:
    async with (
        serving([shapes(unary_unary=echo)], "127.0.0.1", 0) as server,
        channel(server.address) as opened,
    ):
        assert server.port > 0
        assert server.address == f"127.0.0.1:{server.port}"
        health = health_pb2_grpc.HealthStub(opened)
        for service in ("", NAME):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="else"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        reflection = reflection_pb2_grpc.ServerReflectionStub(opened)
        answers = [answer async for answer in reflection.ServerReflectionInfo(asked("grpc.health.v1.Health"))]
        assert answers[0].file_descriptor_response.file_descriptor_proto
        assert {service.name for service in answers[1].list_services_response.service} == {
            NAME,
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
    assert spans.ended == []


async def test_watchers_see_each_change_and_do_not_hold_up_the_end(shapes: Any) -> None:
    async with asyncio.timeout(10), AsyncExitStack() as stack:
        # A grace period far beyond the test's patience: an open watch must not use it up.
        server = await stack.enter_async_context(serving([shapes(unary_unary=echo)], "127.0.0.1", 0, grace_seconds=600))
        opened = channel(server.address)
        watch = health_pb2_grpc.HealthStub(opened).Watch(health_pb2.HealthCheckRequest(service=NAME))
        assert (await watch.read()).status == SERVING
        await server.set_serving(False)
        assert (await watch.read()).status == NOT_SERVING
        await server.set_serving(True)
        assert (await watch.read()).status == SERVING
        async with asyncio.TaskGroup() as tasks:
            stopping = tasks.create_task(stack.aclose())
            assert (await watch.read()).status == NOT_SERVING
            assert await watch.read() is grpc.aio.EOF
            await stopping
        await opened.close()


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    """Call until the server, which has begun to stop, refuses."""
    while True:
        accepted = call(b"", timeout=10)
        try:
            await accepted.read()
        except grpc.aio.AioRpcError as error:
            return error
        accepted.cancel()


async def test_streams_in_flight_finish_within_the_grace_period_and_new_calls_are_refused(
    shapes: Any,
) -> None:
    finish = asyncio.Event()

    async def patient(request: bytes, context: Any) -> None:
        await context.write(b"one")
        await finish.wait()
        await context.write(b"two")

    opened: Any
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        leave = asyncio.Event()
        address: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def serve() -> None:
            async with serving([shapes(unary_stream=patient)], "127.0.0.1", 0, grace_seconds=600) as server:
                address.set_result(server.address)
                await leave.wait()

        server_task = tasks.create_task(serve())
        async with channel(await address) as opened:
            call = opened.unary_stream(METHOD)(b"")
            watch = health_pb2_grpc.HealthStub(opened).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == SERVING
            assert await call.read() == b"one"
            leave.set()
            # The watch's end is the start of the stop.
            assert (await watch.read()).status == NOT_SERVING
            assert await watch.read() is grpc.aio.EOF
            refused = await refusal(opened.unary_stream(METHOD))
            assert refused.code() is grpc.StatusCode.UNAVAILABLE
            assert not server_task.done()
            finish.set()
            assert await call.read() == b"two"
            assert await call.read() is grpc.aio.EOF
            assert await call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("failing", [False, True])
async def test_streams_that_outlive_the_grace_period_are_cancelled(shapes: Any, failing: bool) -> None:
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    waiting = asyncio.Event()

    async def endless(request: bytes, context: Any) -> None:
        try:
            await context.write(b"one")
            waiting.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.set_result("cancelled")
            raise

    async def scenario() -> Any:
        opened: Any
        grace = 600 if failing else 0
        registered = [shapes(unary_stream=endless)]
        async with serving(registered, "127.0.0.1", 0, grace_seconds=grace) as server:
            opened = channel(server.address)
            call = opened.unary_stream(METHOD)(b"")
            assert await call.read() == b"one"
            # The client may have the message before the server's write has returned, and a write that is cut
            # off fails instead of being cancelled.
            await waiting.wait()
            if failing:
                raise ValueError("a sibling failed")
        return opened

    async with asyncio.timeout(10):
        if failing:
            with pytest.raises(ValueError, match="a sibling failed"):
                await scenario()
        else:
            await (await scenario()).close()
        assert await ended == "cancelled"


async def test_a_port_in_use_is_one_clear_line(shapes: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError) as caught:
            async with serving([shapes(unary_unary=echo)], "127.0.0.1", port):
                pass
    assert str(caught.value) == f"cannot listen on 127.0.0.1:{port}: address already in use"


async def test_two_servers_cannot_share_a_port(shapes: Any) -> None:
    async with serving([shapes(unary_unary=echo)], "127.0.0.1", 0) as server:
        with pytest.raises(StartupError, match="already in use"):
            async with serving([shapes(unary_unary=echo)], "127.0.0.1", server.port):
                pass


@pytest.mark.parametrize(
    ("host", "port", "expected"),
    [
        ("no such host", 0, "unknown host 'no such host'"),
        ("192.0.2.1", 0, "cannot assign requested address"),
        ("127.0.0.1", 70000, "the port must be 0 to 65535"),
    ],
)
async def test_what_cannot_be_bound_says_why(host: str, port: int, expected: str) -> None:
    with pytest.raises(StartupError) as caught:
        async with serving([], host, port):
            pass
    assert str(caught.value) == f"cannot listen on {host}:{port}: {expected}"


async def test_when_grpc_cannot_bind_although_the_probe_could(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fine(host: str, port: int) -> None:
        """Somebody else takes the port after this."""

    monkeypatch.setattr(module, "probe", fine)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{port}"):
            async with serving([], "127.0.0.1", port):
                pass


async def test_messages_are_bounded_on_both_sides(shapes: Any) -> None:
    async def grow(request: bytes, context: Any) -> bytes:
        return request + b"\0"

    fits = MAX_MESSAGE_BYTES - 1
    opened: Any
    async with (
        serving([shapes(unary_unary=grow)], "127.0.0.1", 0) as server,
        channel(server.address) as opened,
    ):
        call = opened.unary_unary(f"/{NAME}/unary_unary")
        assert len(await call(b"\0" * fits)) == fits + 1
        for size in (fits + 1, fits + 2):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"\0" * size)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_every_channel_argument_is_one_that_grpc_knows() -> None:
    """gRPC ignores an option that it does not know, so a typing error would go unnoticed."""
    from grpc._cython import cygrpc  # type: ignore[attr-defined]

    with open(str(cygrpc.__file__), "rb") as library:
        binary = library.read()
    for name, _ in (*module._CHANNEL_OPTIONS, *module._SERVER_OPTIONS):
        assert name.encode() + b"\0" in binary, name


@pytest.mark.parametrize("options", [module._CHANNEL_OPTIONS, module._SERVER_OPTIONS], ids=["channel", "server"])
def test_a_silent_peer_is_given_up_after_thirty_seconds_on_both_sides(options: tuple[tuple[str, int], ...]) -> None:
    values = dict(options)
    # A ping that is late by either of the two timeouts waits for the longer one.
    waits = [values["grpc.keepalive_timeout_ms"], values["grpc.http2.ping_timeout_ms"]]
    assert values["grpc.keepalive_time_ms"] + max(waits) == 30_000


async def test_client_spans_name_a_target_that_is_no_address(spans: Any) -> None:
    opened: Any
    async with channel("unix:/nonexistent/socket") as opened:
        with pytest.raises(grpc.aio.AioRpcError):
            await opened.unary_unary(f"/{NAME}/unary_unary")(b"")
    client = await spans.one(SpanKind.CLIENT)
    assert client.attributes["server.address"] == "unix:/nonexistent/socket"
    assert "server.port" not in client.attributes


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("localhost:7000", ("localhost", 7000)),
        ("10.0.0.1:0", ("10.0.0.1", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("[fe80::1%eth0]:1", ("fe80::1%eth0", 1)),
    ],
)
def test_addresses_are_parsed_and_formatted(address: str, expected: tuple[str, int]) -> None:
    assert parse_address(address) == expected
    assert format_address(*expected) == address


@pytest.mark.parametrize(
    "address",
    [
        "",
        ":",
        "localhost",
        "localhost:",
        ":7000",
        "::1:7000",
        "a:b",
        "a:-1",
        "a:65536",
        "a:1_0",
        "a:²",
        "[]:1",
    ],
)
def test_bad_addresses_are_refused(address: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_address(address)
    assert caught.value.field == "address"


async def _loop_module() -> str:
    return type(asyncio.get_running_loop()).__module__


def test_run_uses_uvloop_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(_loop_module()).startswith("uvloop")
    monkeypatch.setitem(__import__("sys").modules, "uvloop", None)
    assert run(_loop_module()).startswith("asyncio")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("runner", [run, asyncio.run])
def test_signals_end_the_wait(number: signal.Signals, runner: Callable[..., Any]) -> None:
    async def main() -> None:
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            event = termination_event()
            waiting = tasks.create_task(event.wait())
            os.kill(os.getpid(), number)
            await waiting
            assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)

    runner(main())


def test_the_other_signal_is_still_a_graceful_one_and_the_second_of_a_kind_is_not() -> None:
    async def main() -> None:
        async with asyncio.timeout(10):
            event = termination_event()
            os.kill(os.getpid(), signal.SIGINT)
            await event.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
                await asyncio.sleep(0)
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())


def test_wait_for_termination() -> None:
    async def main() -> str:
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(wait_for_termination())
            await asyncio.sleep(0)
            os.kill(os.getpid(), signal.SIGTERM)
            await waiting
        return "ended"

    assert run(main()) == "ended"
