"""The receiver's half of a link, fed with any messages: it closes what it opened, and believes no layout that lies."""

from google.protobuf.message import DecodeError

from kvbaton.engine.errors import KvbatonError
from kvbaton.engine.pool_layout import layout_problem, row_bytes
from kvbaton.handoff import wire
from kvbaton.handoff.choice import GRPC, SHARED_MEMORY
from kvbaton.v1 import kv_transfer_pb2 as pb
from support.fakes import GEOMETRY
from support.links import HOST, PROBE_BYTES, FakeOpener, Memory, book


def link(data: bytes) -> None:
    """Messages, each behind two bytes that say how long it is."""
    memory = Memory()
    opener = FakeOpener(memory)
    links = book([opener])
    incoming = links.begin()
    # Whoever has a link's name could have handed its memory over.
    memory.handed_over = _Anything()
    while len(data) >= 2:
        size = int.from_bytes(data[:2], "big")
        message, data = data[2 : 2 + size], data[2 + size :]
        try:
            request = pb.LinkRequest.FromString(message)
            _check_layout(request.hello.layout)
            incoming.on_message(request)
        except (KvbatonError, DecodeError):
            break
    incoming.close()
    assert len(links) == 0
    assert all(pool.closed for pool in opener.opened)
    assert sorted(opener.forgotten) == sorted(opener.invited)


class _Anything(set[bytes]):
    def __contains__(self, _: object) -> bool:
        return True


def _check_layout(told: pb.PoolLayout) -> None:
    layout = wire.layout_from_proto(told)
    if layout_problem(layout, GEOMETRY) is not None:
        return
    slots = layout.num_blocks * layout.block_size
    assert slots > 0
    for offsets, widths in zip(
        (layout.k_offsets, layout.v_offsets), zip(*row_bytes(GEOMETRY), strict=True), strict=True
    ):
        for offset, width in zip(offsets, widths, strict=True):
            assert 0 <= offset <= offset + slots * width <= layout.num_bytes


def conversations() -> list[bytes]:
    """Whole ones."""
    layout = pb.PoolLayout(
        num_bytes=1 << 20,
        block_size=4,
        num_blocks=32,
        k_offsets=[4096, 8192, 16384],
        v_offsets=[32768, 65536, 131072],
        probe_bytes=PROBE_BYTES,
    )
    hello = pb.LinkHello(incarnation="p", host=HOST, transports=[SHARED_MEMORY, GRPC], layout=layout)
    probes = [pb.LinkProbe(transport=SHARED_MEMORY, num_bytes=PROBE_BYTES), pb.LinkProbe(transport=GRPC, payload=b"x")]
    chosen = pb.LinkChosen(transport=GRPC, reason="a reason", bytes_per_second=1e9)
    requests = [
        pb.LinkRequest(hello=hello),
        *(pb.LinkRequest(probe=probe) for probe in probes),
        pb.LinkRequest(chosen=chosen),
    ]
    encoded = [request.SerializeToString() for request in requests]
    whole = b"".join(len(message).to_bytes(2, "big") + message for message in encoded)
    first = len(encoded[0]).to_bytes(2, "big") + encoded[0]
    return [whole, first, first * 2]
