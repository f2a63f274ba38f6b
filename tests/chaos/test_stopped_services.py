"""A worker that stands still costs its requests their deadline, and the other workers nothing; when it goes on it is as
good as before.
"""

import os
import signal
import time
from pathlib import Path

import pytest

from kvbaton.cli.deployment import UpConfig, deployed
from kvbaton.client import AsyncClient, DeadlineExceededError
from support import tiny_models
from support.cluster import assert_idle, wait_for_status

LONG = 20_000
SECONDS = 3.0
LATE_SECONDS = 5.0
"""How long after its deadline a client may have to wait for it."""


@pytest.mark.parametrize("victim", ["prefill", "decode"])
async def test_a_worker_is_stopped_while_kv_is_on_its_way(tmp_path: Path, victim: str) -> None:
    folder = tiny_models.save_tiny_model("llama", tmp_path, max_position_embeddings=2 * LONG)
    config = UpConfig(model=str(folder), port=0, grace_seconds=0.5, kv_memory="16MiB", max_prefill_tokens=32)
    async with deployed(config, lambda *_: None) as deployment, AsyncClient(deployment.address) as client:
        workers = {"prefill": deployment.prefill[0], "decode": deployment.decode[0]}
        stopped = workers.pop(victim)
        (other,) = workers.values()
        right = await client.generate([5, 6, 7], max_tokens=8, ignore_eos=True, timeout=30).result()
        generation = client.generate([5] * LONG, max_tokens=8, timeout=SECONDS)
        begin = time.monotonic()
        await wait_for_status(deployment.decode[0].address, lambda s: s.counters.kv_bytes_received > 0)
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            with pytest.raises(DeadlineExceededError):
                await generation.result()
            assert time.monotonic() - begin < SECONDS + LATE_SECONDS
            await assert_idle(other.address, seconds=LATE_SECONDS)
        finally:
            os.kill(stopped.pid, signal.SIGCONT)
        await assert_idle(stopped.address, other.address, seconds=LATE_SECONDS)
        again = await client.generate([5, 6, 7], max_tokens=8, ignore_eos=True, timeout=30).result()
        assert again.token_ids == right.token_ids
