"""A peer that takes its time to answer a new connection, far away or busy, is connected to all the same."""

from typing import Any

from kvbaton.rpc.serving import channel, serving
from support.fault_proxy import fault_proxy


async def test_a_connection_may_take_longer_than_the_wait_between_attempts() -> None:
    async with serving([], "127.0.0.1", 0) as server, fault_proxy(server.address) as proxy:
        proxy.connect_delay = 0.7
        async with channel(proxy.endpoint) as opened:
            check: Any = opened.unary_unary("/grpc.health.v1.Health/Check")
            assert await check(b"", timeout=10) == b"\x08\x01"
