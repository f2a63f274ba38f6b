"""SIGTERM: what runs may finish, what is new is refused, and a drain without work is quick."""

import asyncio
from pathlib import Path

import pytest

from kvbaton.client import AsyncClient, UnavailableError
from kvbaton.decode.config import DecodeConfig
from kvbaton.decode.service import serve_decode
from kvbaton.prefill.config import PrefillConfig
from kvbaton.prefill.service import serve_prefill
from kvbaton.router.config import RouterConfig
from kvbaton.router.service import serve_router
from kvbaton.rpc.serving import Server
from support import tiny_models
from support.cluster import serving_in_loop

LONG_GRACE = 60.0
MAX_TOKENS = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_tiny_model("llama", tmp_path_factory.mktemp("model"), max_position_embeddings=2048)


async def test_a_worker_finishes_what_it_has(folder: Path) -> None:
    model = str(folder)
    stop = asyncio.Event()
    started: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
    config = DecodeConfig(model=model, port=0, kv_memory="4MiB", grace_seconds=LONG_GRACE)
    async with asyncio.TaskGroup() as group:
        decode = group.create_task(serve_decode(config, stop, started))
        decode_address = (await started).address
        async with serving_in_loop(serve_prefill, PrefillConfig(model=model, port=0, kv_memory="4MiB")) as prefill:
            router_config = RouterConfig(model=model, prefill=(prefill.address,), decode=(decode_address,), port=0)
            async with serving_in_loop(serve_router, router_config) as router, AsyncClient(router.address) as client:
                while not await client.models():
                    await asyncio.sleep(0.01)
                generation = client.generate([5, 6, 7], max_tokens=MAX_TOKENS, ignore_eos=True)
                async for chunk in generation:
                    if chunk.index >= 3:
                        break
                stop.set()
                result = await generation.result()
                assert len(result.token_ids) == MAX_TOKENS
                # The grace is a minute: a worker that waits for it although nothing runs would fail here.
                async with asyncio.timeout(LONG_GRACE / 4):
                    await decode
                with pytest.raises(UnavailableError):
                    await client.generate([5], max_tokens=4, timeout=30).result()
