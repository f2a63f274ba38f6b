"""Workers whose KV is of different dtypes, or is converted on its way: answers come, the bytes are those of the
encoding, and without one the two are told apart before a request is served.
"""

from pathlib import Path
from typing import Any

import pytest

from kvbaton.client import AsyncClient
from kvbaton.engine.errors import StartupError
from kvbaton.rpc.errors import root_cause
from support import tiny_models
from support.cluster import mixed_cluster, worker_status

(PROMPT,) = tiny_models.random_prompts([43])
OPTIONS: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True, "timeout": 120}
NUM_HEADS = tiny_models.SHAPE["num_hidden_layers"] * tiny_models.SHAPE["num_key_value_heads"] * 2
HEAD_BYTES = {"bfloat16": 2 * tiny_models.SHAPE["head_dim"], "int8": tiny_models.SHAPE["head_dim"] + 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_tiny_model("qwen3", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("prefill", "decode", "encoding"),
    [("float32", "bfloat16", "int8"), ("bfloat16", "float32", "int8"), ("float32", "bfloat16", "bfloat16")],
)
async def test_dtypes_that_differ_meet_in_an_encoding(folder: Path, prefill: str, decode: str, encoding: str) -> None:
    options = {"prefill": {"dtype": prefill, "kv_encoding": encoding}, "decode": {"dtype": decode}}
    async with mixed_cluster(folder, **options) as services, AsyncClient(services.router) as client:
        first = await client.generate(PROMPT, **OPTIONS).result()
        assert len(first.token_ids) == OPTIONS["max_tokens"]
        size = len(PROMPT) * NUM_HEADS * HEAD_BYTES[encoding]
        assert first.timings.transfer.payload_bytes == size
        assert (await worker_status(services.decode)).counters.kv_bytes_received == size
        assert (await worker_status(services.prefill)).kv_encoding == encoding
        # What has arrived is in place for the next one.
        second = await client.generate(PROMPT, **OPTIONS).result()
        assert second.timings.transfer.payload_bytes == 3 * NUM_HEADS * HEAD_BYTES[encoding]
        await services.assert_idle()


async def test_without_one_they_are_told_apart(folder: Path) -> None:
    options: dict[str, Any] = {"prefill": {"dtype": "float32"}, "decode": {"dtype": "bfloat16"}}
    with pytest.raises(BaseExceptionGroup) as caught:
        async with mixed_cluster(folder, **options):
            pass
    assert isinstance(root_cause(caught.value), StartupError)
    assert "KV dtype" in str(root_cause(caught.value))
