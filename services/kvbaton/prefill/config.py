"""Options of a prefill worker."""

from dataclasses import dataclass

from kvbaton.rpc.config import option, port_option
from kvbaton.worker.config import WorkerConfig, kv_encoding_option


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig(WorkerConfig):
    """Options of `kvbaton prefill`."""

    port: int = port_option(7100, "Port for routers; 0 takes a free one.")
    max_prefill_tokens: int = option(
        2048, "Prompt tokens computed in one step; longer prompts go in chunks.", minimum=1
    )
    kv_encoding: str = kv_encoding_option()
