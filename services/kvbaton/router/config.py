"""Options of a router."""

from dataclasses import dataclass

from kvbaton.rpc.config import grace_option, option, port_option
from kvbaton.text.bundled import DEFAULT_MODEL


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Options of `kvbaton router`."""

    model: str = option(DEFAULT_MODEL, "Model whose tokenizer and chat template to use, as the workers have it.")
    prefill: tuple[str, ...] = option((), "Prefill workers, as host:port, separated by commas.")
    decode: tuple[str, ...] = option((), "Decode workers, as host:port, separated by commas.")
    workers: tuple[str, ...] = option((), "Workers that serve both legs, as host:port, separated by commas.")
    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = port_option(7000, "Port for clients; 0 takes a free one.")
    default_max_tokens: int = option(
        512, "max_tokens of requests that name none; the context's end comes first.", minimum=1, maximum=2**31 - 1
    )
    max_in_flight: int = option(2048, "Requests in flight before new ones are refused.", minimum=1)
    grace_seconds: float = grace_option("After SIGTERM: seconds for running requests to finish.")
