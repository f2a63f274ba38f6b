"""Options of a unified worker."""

from dataclasses import dataclass

from kvbaton.decode.config import DecodeConfig
from kvbaton.rpc.config import option, port_option
from kvbaton.worker.config import MAX_TARGET_ITL_MS, kv_encoding_option


@dataclass(frozen=True, slots=True, kw_only=True)
class UnifiedConfig(DecodeConfig):
    """Options of `kvbaton worker`: those of a decode worker, and what it may compute of prompts beside."""

    port: int = port_option(7300, "Port for routers; 0 takes a free one.")
    max_prefill_tokens: int = option(
        512, "Prompt tokens computed in one step, beside its decodes; longer prompts go in chunks.", minimum=1
    )
    kv_encoding: str = kv_encoding_option()
    target_itl_ms: float = option(
        0.0,
        "Milliseconds that a step with decodes may take: the prompt tokens in it are chosen from measured step times. "
        "0: no target.",
        minimum=0,
        maximum=MAX_TARGET_ITL_MS,
    )
