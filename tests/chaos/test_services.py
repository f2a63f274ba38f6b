"""Router, prefill and decode worker on a real model, with the faulty wire between the workers: a request that was
struck ends in an error, no worker holds a block, and the same prompt asked again has the tokens that it always has.
"""

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvbaton.client import AsyncClient, GenerationResult, UnavailableError
from kvbaton.handoff import conversation as conversation_module
from support import chaos, faults, tiny_models
from support.cluster import Cluster, cluster
from support.fakes import PATIENCE
from support.fault_proxy import FaultProxy, fault_proxy, unchanged

STRIKES = [
    "payload: a bit flipped",
    "any bit of a message flipped",
    "a frame dropped",
    "two frames swapped",
    "a frame repeated",
    "attempt changed",
    "a length that lies",
    "a message of 4 GiB claimed",
    "ticket: a bit flipped",
    "geometry: wide heads",
    "commit: another first token",
    "reset within a frame",
    "closed between frames",
    "stalled within a frame",
    "applied dropped",
]
NUM_PROMPT = 60


@pytest.fixture
def frame_bytes() -> int:
    return 4000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_tiny_model("llama", tmp_path_factory.mktemp("model"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def struck_cluster(folder: Path) -> AsyncIterator[tuple[FaultProxy, Cluster, AsyncClient]]:
    """Services whose decode worker sends everybody to the proxy."""
    async with fault_proxy(f"127.0.0.1:{free_port()}") as proxy:
        kv_port = int(proxy.upstream.rpartition(":")[2])
        decode = {"kv_endpoint": proxy.endpoint, "kv_port": kv_port}
        async with cluster(folder, decode=decode) as services, AsyncClient(services.router) as client:
            yield proxy, services, client


async def ask(client: AsyncClient, prompt: list[int], salt: str = "") -> GenerationResult:
    # Salted, no cache of either worker has any of the prompt.
    return await client.generate(prompt, max_tokens=8, ignore_eos=True, cache_salt=salt, timeout=PATIENCE).result()


def some_prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(5, 90) for _ in range(NUM_PROMPT)]


async def test_a_struck_request_fails_and_the_next_has_the_right_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(1)
    async with struck_cluster(folder) as (proxy, services, client):
        proxy.strike(unchanged)
        await ask(client, some_prompt(rng))
        num_frames = proxy.seen("frame")
        assert num_frames > 3
        descriptors = chaos.num_descriptors()
        for name in STRIKES:
            fault, prompt = faults.FAULTS[name], some_prompt(rng)
            proxy.strike(fault.make(rng, num_frames), responses=fault.responses)
            with monkeypatch.context() as patch:
                if fault.silent:
                    patch.setattr(conversation_module, "ANSWER_TIMEOUT_SECONDS", 0.5)
                with pytest.raises(UnavailableError):
                    await ask(client, prompt)
            await services.assert_idle()
            proxy.spare()
            right = await ask(client, prompt, "a")
            assert right.token_ids == (await ask(client, prompt)).token_ids, name
            await services.assert_idle()
        await chaos.settled((), descriptors)


async def test_a_client_that_leaves_at_any_frame_leaves_nothing(folder: Path) -> None:
    rng = random.Random(2)
    async with struck_cluster(folder) as (proxy, services, client):
        proxy.strike(unchanged)
        await ask(client, some_prompt(rng))
        num_frames = proxy.seen("frame")
        for kind in ["header", *["frame"] * 4, "commit", "applied"]:
            reached = asyncio.Event()
            edit = faults.calling(kind, rng.randrange(num_frames) if kind == "frame" else 0, reached.set)
            proxy.strike(edit, responses=kind == "applied")
            generation = client.generate(some_prompt(rng), max_tokens=8, ignore_eos=True, timeout=PATIENCE)
            async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
                asking = group.create_task(generation.result())
                await reached.wait()
                asking.cancel()
            await services.assert_idle()
        proxy.spare()
        prompt = some_prompt(rng)
        assert (await ask(client, prompt, "a")).token_ids == (await ask(client, prompt)).token_ids
