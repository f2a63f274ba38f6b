"""Services that contradict each other do not start to serve, and say why in one line."""

import asyncio
from pathlib import Path

import pytest

from kvbaton.cli.deployment import UpConfig, deployed
from kvbaton.decode.config import DecodeConfig
from kvbaton.decode.service import serve_decode
from kvbaton.engine.errors import StartupError
from kvbaton.prefill.config import PrefillConfig
from kvbaton.prefill.service import serve_prefill
from kvbaton.router.config import RouterConfig
from kvbaton.router.service import serve_router
from kvbaton.rpc.errors import root_cause
from kvbaton.text.bundled import DEFAULT_MODEL
from support import tiny_models
from support.cluster import serving_in_loop
from support.tokenizers import train


async def router_refusal(prefill: Path, decode: Path, swap: bool = False, router: Path | None = None) -> BaseException:
    """What a router over these two workers ends with; its tokenizer is the prefill worker's unless told otherwise."""
    async with (
        serving_in_loop(serve_prefill, PrefillConfig(model=str(prefill), port=0, kv_memory="1MiB")) as first,
        serving_in_loop(serve_decode, DecodeConfig(model=str(decode), port=0, kv_memory="1MiB")) as second,
    ):
        addresses = (second.address, first.address) if swap else (first.address, second.address)
        config = RouterConfig(model=str(router or prefill), prefill=addresses[:1], decode=addresses[1:], port=0)
        with pytest.raises(BaseExceptionGroup) as caught:
            await serve_until_it_fails(config)
        return root_cause(caught.value)


async def serve_until_it_fails(config: RouterConfig) -> None:
    async with serving_in_loop(serve_router, config):
        await asyncio.Event().wait()


async def test_workers_of_different_models(tmp_path: Path) -> None:
    one = tiny_models.save_tiny_model("llama", tmp_path / "one")
    other = tiny_models.save_tiny_model("qwen3", tmp_path / "other")
    error = await router_refusal(one, other)
    assert isinstance(error, StartupError)
    assert "serves model" in str(error)
    assert "'one'" in str(error)
    assert "'other'" in str(error)


async def test_a_router_that_was_not_told_the_model(tmp_path: Path) -> None:
    model = tiny_models.save_tiny_model("llama", tmp_path / "one")
    train(None).save_pretrained(model)
    error = await router_refusal(model, model, router=Path(DEFAULT_MODEL))
    assert isinstance(error, StartupError)
    assert "serves 'one', whose tokenizer is not that of the router's --model" in str(error)


async def test_workers_in_each_others_place(tmp_path: Path) -> None:
    model = tiny_models.save_tiny_model("llama", tmp_path / "one")
    error = await router_refusal(model, model, swap=True)
    assert isinstance(error, StartupError)
    assert "worker" in str(error)


async def test_a_deployment_whose_worker_cannot_start(tmp_path: Path) -> None:
    lines: list[str] = []
    deployment = deployed(
        UpConfig(model=str(tmp_path / "nowhere"), port=0), lambda name, line: lines.append(f"{name}: {line}")
    )
    with pytest.raises(BaseExceptionGroup) as caught:
        await deployment.__aenter__()
    assert isinstance(root_cause(caught.value), StartupError)
    assert any("does not exist" in line for line in lines)
    assert not any("Traceback" in line for line in lines)
