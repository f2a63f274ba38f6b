"""However KV travels, the tokens are the same; what was chosen is told, and restarts lead to new links."""

import asyncio
import socket
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvbaton.cli.deployment import UpConfig, deployed
from kvbaton.cli.health import wait_until_serving
from kvbaton.client import AsyncClient, GenerationResult, UnavailableError
from kvbaton.decode.config import DecodeConfig
from kvbaton.decode.service import serve_decode
from kvbaton.handoff.host import host_identity
from kvbaton.prefill.config import PrefillConfig
from kvbaton.prefill.service import serve_prefill
from kvbaton.router.config import RouterConfig
from kvbaton.router.service import serve_router
from kvbaton.v1 import types_pb2 as types
from kvbaton.v1 import worker_pb2 as pb
from kvbaton.worker import runtime as runtime_module
from support import tiny_models
from support.cluster import cluster, serving_in_loop, wait_for_status, worker_status

NUM_TOKENS = 12
PROMPTS = tiny_models.random_prompts([40, 7, 90])
OPTIONS: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "timeout": 60}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_tiny_model("qwen3", tmp_path_factory.mktemp("model"))


async def answers(client: AsyncClient) -> list[GenerationResult]:
    return list(await asyncio.gather(*(client.generate(prompt, **OPTIONS).result() for prompt in PROMPTS)))


async def link(prefill: str) -> pb.PeerLink:
    """The one link of a prefill worker, as soon as it is made."""
    status = await wait_for_status(prefill, lambda status: len(status.links) == 1)
    return status.links[0]


def check(results: list[GenerationResult], folder: Path, transport: str) -> None:
    expected = tiny_models.reference_greedy(folder, PROMPTS, NUM_TOKENS, ignore_eos=True)
    assert [list(result.token_ids) for result in results] == expected
    assert {result.timings.transfer.transport for result in results} == {transport}
    assert all(result.timings.transfer.payload_bytes > 0 for result in results)


@pytest.mark.parametrize(
    ("prefill", "decode", "transport", "reason"),
    [
        ("auto", "auto", "shared_memory", "same host"),
        ("shared_memory", "auto", "shared_memory", "--transport shared_memory"),
        ("auto", "shared_memory", "shared_memory", "same host"),
        ("grpc", "auto", "grpc", "--transport grpc"),
        ("auto", "grpc", "grpc", "shared_memory: the decode worker's --transport names another"),
    ],
)
async def test_each_transport_brings_the_same_tokens(
    folder: Path, prefill: str, decode: str, transport: str, reason: str
) -> None:
    async with (
        cluster(folder, prefill={"transport": prefill}, decode={"transport": decode, "block_size": 4}) as services,
        AsyncClient(services.router) as client,
    ):
        told = await link(services.prefill)
        assert (told.transport, told.reason) == (transport, reason)
        assert told.bytes_per_second > 0
        kv_port = (await worker_status(services.decode)).kv_port
        assert told.endpoint == f"127.0.0.1:{kv_port}"
        check(await answers(client), folder, transport)
        await services.assert_idle()


async def test_processes_of_their_own_share_memory(folder: Path) -> None:
    log: list[str] = []
    config = UpConfig(model=str(folder), port=0, grace_seconds=0.5, kv_memory="4MiB", transport="shared_memory")
    async with deployed(config, lambda name, line: log.append(line)) as up, AsyncClient(up.address) as client:
        check(await answers(client), folder, "shared_memory")
        assert (await link(up.prefill[0].address)).transport == "shared_memory"
    assert sum("goes by shared_memory (" in line for line in log) == 1
    assert not any("WARNING" in line and "KV to" in line for line in log)


async def test_workers_that_are_told_different_things_hand_nothing_over(folder: Path) -> None:
    different: dict[str, Any] = {"prefill": {"transport": "shared_memory"}, "decode": {"transport": "grpc"}}
    async with cluster(folder, **different) as services, AsyncClient(services.router) as client:
        with pytest.raises(UnavailableError, match="--transport shared_memory allows no other"):
            await client.generate(PROMPTS[0], **OPTIONS).result()
        await services.assert_idle()


@pytest.mark.parametrize(
    ("elsewhere", "reason"),
    [
        ({"network_namespace": 1}, "shared_memory: other network namespace"),
        ({"boot_id": "another"}, "shared_memory: other host"),
    ],
)
async def test_what_lies_between_them_is_found_out(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    elsewhere: dict[str, Any],
    reason: str,
) -> None:
    identities = [host_identity(), host_identity()]
    for name, value in elsewhere.items():
        setattr(identities[0], name, value)

    def next_identity(gpu_uuids: tuple[str, ...] = ()) -> types.HostIdentity:
        return identities.pop()

    monkeypatch.setattr(runtime_module, "host_identity", next_identity)
    async with cluster(folder) as services, AsyncClient(services.router) as client:
        told = await link(services.prefill)
        assert (told.transport, told.reason) == ("grpc", reason)
        check(await answers(client), folder, "grpc")
    assert not [r for r in caplog.records if r.levelname == "WARNING" and "KV to" in r.message]


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.mark.parametrize("who", ["prefill", "decode"])
async def test_a_worker_that_restarts_is_linked_anew(folder: Path, who: str) -> None:
    """The router tells of the new process before a request needs it."""
    p_port, d_port, kv_port = free_ports(3)
    common: dict[str, Any] = {"model": str(folder), "block_size": 8, "kv_memory": "4MiB", "grace_seconds": 0.1}
    services: dict[str, tuple[Any, Any]] = {
        "prefill": (serve_prefill, PrefillConfig(port=p_port, **common)),
        "decode": (serve_decode, DecodeConfig(port=d_port, kv_port=kv_port, **common)),
    }
    addresses = {"prefill": (f"127.0.0.1:{p_port}",), "decode": (f"127.0.0.1:{d_port}",)}
    router = RouterConfig(
        model=str(folder), port=0, grace_seconds=0.1, prefill=addresses["prefill"], decode=addresses["decode"]
    )
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving_in_loop(serve_router, router))
        client = await stack.enter_async_context(AsyncClient(server.address))
        (stays,) = services.keys() - {who}
        await stack.enter_async_context(serving_in_loop(*services[stays]))
        for _ in range(2):
            async with serving_in_loop(*services[who]):
                told = await link(*addresses["prefill"])
                assert (told.endpoint, told.transport) == (f"127.0.0.1:{kv_port}", "shared_memory")
                await wait_until_serving(server.address)
                check(await answers(client), folder, "shared_memory")
            if who == "decode":
                await wait_for_status(*addresses["prefill"], lambda status: not status.links)
