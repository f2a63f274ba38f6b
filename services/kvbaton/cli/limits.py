"""`kvbaton limits`: a worker's two numbers, and the third that chooses one of them."""

import json
from collections.abc import Mapping
from typing import Any

import click
import grpc
from google.protobuf.json_format import MessageToDict

from kvbaton.engine.errors import InvalidArgumentError, KvbatonError
from kvbaton.rpc.errors import from_rpc_error
from kvbaton.rpc.serving import channel, parse_address
from kvbaton.v1 import worker_pb2 as pb
from kvbaton.v1.worker_pb2_grpc import WorkerServiceStub

_TIMEOUT_SECONDS = 10.0


async def run_limits(address: str, values: Mapping[str, Any], as_json: bool) -> int:
    """Set `values`, fields of `SetLimitsRequest`, and print what is in force; without any only print it.

    Returns the exit code: 0, or 1 when the worker refused or could not be asked.
    """
    try:
        limits = await _limits(address, values)
    except (KvbatonError, TimeoutError) as error:
        click.echo(f"Error: {error}", err=True)
        return 1
    fields = MessageToDict(limits, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    if as_json:
        click.echo(json.dumps(fields))
    else:
        for name, value in fields.items():
            click.echo(f"{name:<20}{value}")
    return 0


async def _limits(address: str, values: Mapping[str, Any]) -> pb.EngineLimits:
    parse_address(address)
    async with channel(address) as connection:
        stub = WorkerServiceStub(connection)
        try:
            if values:
                return (await stub.SetLimits(pb.SetLimitsRequest(**values), timeout=_TIMEOUT_SECONDS)).limits
            return (await stub.GetStatus(pb.GetStatusRequest(), timeout=_TIMEOUT_SECONDS)).limits
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise InvalidArgumentError("address", f"{address} is no worker") from error
            raise from_rpc_error(error, address) from error
