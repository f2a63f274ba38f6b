"""Unified workers on a tiny model, in the test's own loop."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kvbaton.unified.config import UnifiedConfig
from kvbaton.unified.service import serve_unified
from support import tiny_models
from support.cluster import assert_idle, serving_in_loop

Unified = Callable[..., AbstractAsyncContextManager[str]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a long context."""
    folder = tmp_path_factory.mktemp("model")
    return tiny_models.save_tiny_model("qwen3", folder, max_position_embeddings=50_000)


@pytest.fixture(scope="session")
def unified(folder: Path) -> Unified:
    """`async with unified(**options) as address`: a worker, which must hold nothing at the end."""

    @asynccontextmanager
    async def start(**options: Any) -> AsyncIterator[str]:
        values = {"dtype": "float32", "block_size": 8, "kv_memory": "4MiB", "grace_seconds": 0.5, **options}
        async with serving_in_loop(serve_unified, UnifiedConfig(model=str(folder), port=0, **values)) as server:
            yield server.address
            await assert_idle(server.address)

    return start
