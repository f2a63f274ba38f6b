"""Asking a service whether it serves, by the standard gRPC health protocol."""

import asyncio

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvbaton.rpc.serving import channel

_SERVING = health_pb2.HealthCheckResponse.SERVING


async def is_serving(address: str, timeout_seconds: float) -> tuple[bool, str]:
    """Ask the service at host:port once; whether it serves, and its answer in words."""
    async with channel(address) as connection:
        stub = health_pb2_grpc.HealthStub(connection)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            return False, error.details() or error.code().name
    return answer.status == _SERVING, health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


async def wait_until_serving(address: str) -> None:
    """Return once the service at host:port says that it serves; wait for ever otherwise."""
    async with channel(address) as connection:
        stub = health_pb2_grpc.HealthStub(connection)
        while True:
            try:
                async for answer in stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True):
                    if answer.status == _SERVING:
                        return
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.1)
