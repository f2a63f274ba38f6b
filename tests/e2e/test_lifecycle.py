"""How services begin and end around the loading of a model, which takes long."""

import asyncio
import logging
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvbaton.decode.config import DecodeConfig
from kvbaton.decode.service import serve_decode
from kvbaton.engine.errors import StartupError
from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.engine.scheduler import Scheduler
from kvbaton.model.memory import Memory
from kvbaton.prefill.config import PrefillConfig
from kvbaton.prefill.service import serve_prefill
from kvbaton.router.config import RouterConfig
from kvbaton.router.service import serve_router
from kvbaton.rpc.serving import Server
from kvbaton.worker import kv_memory
from kvbaton.worker.engine_thread import EngineFailedError
from support import tiny_models
from support.cluster import worker_status

# A service whose model takes for ever to load.
LOADER = """
import sys, threading
from kvbaton.worker import runtime
def load(*_):
    print("loading", file=sys.stderr, flush=True)
    threading.Event().wait()
runtime.build_runtime = load
from kvbaton.cli.main import main
main()
"""

# `kvbaton up` over such services.
UP = f"""
import asyncio, sys
from kvbaton.cli import deployment
async def start(kind, name, flags, environment):
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-c", {LOADER!r}, kind, "--supervised", *flags)
    process = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
    )
    return deployment.Process(name, process)
deployment._start = start
from kvbaton.cli.main import main
main()
"""


async def loading(script: str, *arguments: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-c", script, *arguments)
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stderr is not None
    async with asyncio.timeout(60):
        async for line in process.stderr:
            if b"loading" in line:
                return process
    raise AssertionError("it ended before it loaded anything")


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, str]:
    """The exit code and what is left of the log. `communicate` closes standard input, and must not be the cause."""
    assert process.stderr is not None
    try:
        async with asyncio.timeout(30):
            rest = await process.stderr.read()
            return await process.wait(), rest.decode()
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_a_worker_that_is_loading(number: signal.Signals) -> None:
    process = await loading(LOADER, "prefill", "--port=0")
    process.send_signal(number)
    code, rest = await ended(process)
    assert code == 0
    assert "Traceback" not in rest


async def test_a_worker_that_is_loading_ends_with_its_supervisor() -> None:
    process = await loading(LOADER, "decode", "--port=0", "--supervised")
    assert process.stdin is not None
    process.stdin.close()
    assert await ended(process) == (0, "")


async def test_ctrl_c_ends_a_deployment_that_is_loading() -> None:
    process = await loading(UP, "up", "--port=0")
    process.send_signal(signal.SIGINT)
    code, rest = await ended(process)
    assert code == 0
    assert "Stopping" in rest
    assert "Traceback" not in rest


async def refusal(serve: Any, config: Any) -> str:
    started: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    with pytest.raises(StartupError) as caught:
        await serve(config, asyncio.Event(), started)
    assert not started.done()
    return str(caught.value)


async def test_an_address_that_cannot_be_bound_is_found_before_the_model_is_looked_for(tmp_path: Path) -> None:
    model = str(tmp_path / "nowhere")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        in_use = f"cannot listen on 127.0.0.1:{port}: address already in use"
        workers: dict[str, Any] = {"prefill": ("a:1",), "decode": ("b:1",)}
        assert await refusal(serve_prefill, PrefillConfig(model=model, port=port)) == in_use
        assert await refusal(serve_decode, DecodeConfig(model=model, port=port)) == in_use
        assert await refusal(serve_decode, DecodeConfig(model=model, port=0, kv_port=port)) == in_use
        assert await refusal(serve_router, RouterConfig(model=model, port=port, **workers)) == in_use
    assert "unknown host" in await refusal(serve_prefill, PrefillConfig(model=model, host="no host"))
    assert "--kv-port" in await refusal(serve_decode, DecodeConfig(model=model, port=7, kv_port=7))


@pytest.mark.parametrize("address", ["a:0", "a b:1", " a:1", "a"])
async def test_an_address_that_nobody_can_dial_is_refused(address: str) -> None:
    assert (await refusal(serve_decode, DecodeConfig(kv_endpoint=address))).startswith("--kv-endpoint: ")
    prefill = RouterConfig(prefill=(address,), decode=("d:1",))
    assert (await refusal(serve_router, prefill)).startswith("--prefill: ")
    decode = RouterConfig(prefill=("p:1",), decode=("d:1", address))
    assert (await refusal(serve_router, decode)).startswith("--decode: ")


async def test_a_worker_cannot_be_both() -> None:
    config = RouterConfig(prefill=("a:1", "b:1"), decode=("b:1", "c:1"))
    assert await refusal(serve_router, config) == "--prefill and --decode: b:1 cannot be both"


async def test_a_pool_larger_than_the_machines_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_memory, "memory_of", lambda device: Memory(4 << 20, 1 << 20))
    model = str(tiny_models.save_tiny_model("llama", tmp_path))
    problem = await refusal(serve_prefill, PrefillConfig(model=model, port=0, kv_memory="2MiB"))
    # With what a pool that others can map has for probes.
    assert problem.startswith("--kv-memory: the pool takes 6.0 MiB, and cpu has 1.0 MiB")


async def test_a_size_that_is_none_is_found_before_the_model_is_looked_for(tmp_path: Path) -> None:
    config = PrefillConfig(model=str(tmp_path / "nowhere"), port=0, kv_memory="much")
    assert "--kv-memory" in await refusal(serve_prefill, config)
    huge = PrefillConfig(model=str(tmp_path / "nowhere"), port=0, kv_memory="9" * 400)
    assert "--kv-memory" in await refusal(serve_prefill, huge)


def test_a_pool_that_is_cut_to_the_most_blocks_is_told(caplog: pytest.LogCaptureFixture) -> None:
    geometry = KvGeometry((LayerGeometry(1, 8, 8),), "float32")
    assert kv_memory.blocks_in(1 << 40, geometry, 1) == kv_memory.MAX_BLOCKS
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "--kv-memory" in caplog.text
    caplog.clear()
    kv_memory.blocks_in(geometry.token_bytes, geometry, 1)
    assert not caplog.records


async def test_a_worker_whose_engine_fails_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug outside of the forward pass")

    folder = tiny_models.save_tiny_model("llama", tmp_path)
    monkeypatch.setattr(Scheduler, "admit", broken)
    started: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
    config = PrefillConfig(model=str(folder), port=0, kv_memory="1MiB")

    async def wake_the_engine() -> None:
        await worker_status((await started).address)

    async with asyncio.timeout(60):
        serving, waking = await asyncio.gather(
            serve_prefill(config, asyncio.Event(), started), wake_the_engine(), return_exceptions=True
        )
    assert isinstance(serving, EngineFailedError)
    assert waking is None or isinstance(waking, grpc.aio.AioRpcError)
