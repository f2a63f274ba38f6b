"""Options of a decode worker."""

from dataclasses import dataclass

from kvbaton.rpc.config import option, port_option
from kvbaton.worker.config import WorkerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig(WorkerConfig):
    """Options of `kvbaton decode`."""

    port: int = port_option(7200, "Port for routers; 0 takes a free one.")
    kv_port: int = port_option(0, "Port where prefill workers deliver KV; 0 takes a free one.")
    kv_endpoint: str = option("", "host:port at which prefill workers reach --kv-port, where it differs.")
    max_decode_seqs: int = option(256, "Sequences that decode together in one step.", minimum=1)
