"""KvTransferService: the thin shell around `IncomingTransfer`."""

import logging
from collections.abc import AsyncIterator, Callable

import grpc

from kvbaton.engine.errors import TransferRejectedError
from kvbaton.handoff.codec import Frame, Message, WireError, decode_message
from kvbaton.handoff.incoming_links import LinkEndedError
from kvbaton.handoff.pending import settled
from kvbaton.handoff.receiver import IncomingTransfer, ReceiverCounters, RequestEndedError
from kvbaton.v1 import kv_transfer_pb2 as pb

logger = logging.getLogger(__name__)

SERVICE_NAME = "kvbaton.v1.KvTransferService"


class KvTransferServicer:
    """Receives transfers on an event loop of its own; large messages never delay token streams."""

    def __init__(self, new_transfer: Callable[[], IncomingTransfer], counters: ReceiverCounters) -> None:
        """`new_transfer` makes the receiving half of one attempt."""
        self._new_transfer = new_transfer
        self._counters = counters

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the service with a deserialiser that leaves payloads where they arrived."""
        handler = grpc.stream_stream_rpc_method_handler(
            self.Transfer,
            request_deserializer=_decode_or_keep_error,
            response_serializer=pb.TransferResponse.SerializeToString,
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, {"Transfer": handler}),))

    async def Transfer(
        self,
        requests: AsyncIterator[Message | WireError],
        context: "grpc.aio.ServicerContext[Message, pb.TransferResponse]",
    ) -> None:
        """See the proto. A transfer that breaks half-way leaves nothing behind but bytes that are never read."""
        transfer = self._new_transfer()
        try:
            async for message in requests:
                if isinstance(message, pb.KvCommit):
                    await settled(transfer.landed())
                answer = _apply(transfer, message)
                if answer is not None:
                    await context.write(answer)
        except TransferRejectedError as error:
            if not isinstance(error, RequestEndedError):
                self._counters.transfers_rejected += 1
                logger.warning("KV transfer from %s rejected: %s", context.peer(), error)
            ended = isinstance(error, LinkEndedError)
            await context.write(pb.TransferResponse(rejected=pb.KvRejected(reason=str(error), link_ended=ended)))


def _apply(transfer: IncomingTransfer, message: Message | WireError) -> pb.TransferResponse | None:
    match message:
        case Frame():
            transfer.write(message)
            return None
        case pb.KvHeader():
            return pb.TransferResponse(ready=transfer.begin(message))
        case pb.KvCommit():
            return transfer.commit(message)
        case pb.KvConfirm():
            return transfer.confirm()
        case WireError():
            raise TransferRejectedError(f"malformed message: {message}")


def _decode_or_keep_error(data: bytes) -> Message | WireError:
    # An exception in a deserialiser would end the stream as INTERNAL, without a reason.
    try:
        return decode_message(data)
    except WireError as error:
        return error
