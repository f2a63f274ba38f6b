"""What every kind of worker can be told."""

from dataclasses import dataclass
from typing import Any

from kvbaton.engine.geometry import AS_IT_IS, ENCODING_BYTES
from kvbaton.rpc.config import grace_option, option, port_option
from kvbaton.text.bundled import DEFAULT_MODEL

MAX_TARGET_ITL_MS = 60_000
"""Longest target for a step that decodes."""

AS_IN_MEMORY = "auto"
"""What `--kv-encoding` is by default."""


def kv_encoding_option() -> Any:
    """The option of workers that send KV."""
    return option(
        AS_IN_MEMORY,
        "What KV is converted to on its way to decode workers. int8 and float8 halve bfloat16's bytes and cost some "
        "accuracy; auto sends it as it is.",
        (AS_IN_MEMORY, *ENCODING_BYTES),
    )


def encoding_of(setting: str) -> str:
    """The encoding that `--kv-encoding` means."""
    return AS_IT_IS if setting == AS_IN_MEMORY else setting


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Options that all workers share."""

    model: str = option(DEFAULT_MODEL, "Model: a local directory, a hub name, or the bundled baton-tiny.")
    served_model_name: str = option("", "Name that requests use. Default: the last part of --model.")
    dtype: str = option("auto", "Element type of weights and KV.", ("auto", "float32", "bfloat16"))
    device: str = option("cpu", "Where to compute: cpu, cuda or cuda:N.")
    threads: int = option(1, "Threads of computation on a CPU.", minimum=1, maximum=1024)
    block_size: int = option(
        0,
        "Tokens in one KV block. 0: 16 on a CPU, 256 on a GPU, whose kernel takes multiples of it.",
        minimum=0,
        maximum=4096,
    )
    kv_memory: str = option("auto", "Memory for the KV pool, for example 512MiB; auto goes by what the device has.")
    memory_share: float = option(
        1.0, "Share of the device's memory that auto plans with: for several workers on one.", minimum=0.001, maximum=1
    )
    trust_remote_code: bool = option(False, "Run code that comes with the model, with all rights of this process.")
    max_waiting: int = option(1024, "Requests that may wait for KV blocks before new ones are refused.", minimum=1)
    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = port_option(0, "Port for routers; 0 takes a free one.")
    grace_seconds: float = grace_option("After SIGTERM: seconds for running requests to finish.")
