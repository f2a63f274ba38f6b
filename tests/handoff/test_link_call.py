"""A link's stream on the server: answers go back, mistakes end it, and its end is the link's."""

from typing import Any

import pytest

from kvbaton.engine.errors import InvalidArgumentError, OverloadedError
from kvbaton.handoff import incoming_links
from kvbaton.handoff.choice import GRPC
from kvbaton.handoff.codec import crc32c
from kvbaton.handoff.link_call import LinkCall
from kvbaton.v1 import kv_transfer_pb2 as pb
from support.links import book


class Stream:
    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.ended: list[BaseException | None] = []

    def send(self, message: bytes) -> None:
        self.sent.append(message)

    def end(self, error: BaseException | None = None) -> None:
        self.ended.append(error)


def write(call: LinkCall, **message: Any) -> None:
    data = pb.LinkRequest(**message).SerializeToString()
    assert call.place(memoryview(data)[:256], len(data)) is None  # type: ignore[func-returns-value]
    call.on_message(data)


def test_a_conversation_is_answered_and_lasts_until_the_stream_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    links, stream = book(), Stream()
    call = LinkCall(links, stream)
    write(call, hello=pb.LinkHello(incarnation="p-1", transports=[GRPC]))
    write(call, probe=pb.LinkProbe(transport=GRPC, num_bytes=3, payload=b"abc", crc32c=crc32c([b"abc"])))
    write(call, chosen=pb.LinkChosen(transport=GRPC))
    welcome, probed = (pb.LinkResponse.FromString(answer) for answer in stream.sent)
    assert welcome.welcome.obstacles == [""]
    assert probed.probed == pb.LinkProbed()
    assert "linked by grpc with the prefill worker p-1" in caplog.text
    assert links.find(welcome.welcome.link_id, GRPC)
    call.on_half_close()
    assert stream.ended == [None]
    call.on_end()
    assert len(links) == 0


@pytest.mark.parametrize("message", [b"", b"\xff\xff", pb.LinkRequest(chosen=pb.LinkChosen()).SerializeToString()])
def test_a_mistake_is_refused_by_name(message: bytes) -> None:
    stream = Stream()
    with pytest.raises(InvalidArgumentError, match="link"):
        LinkCall(book(), stream).on_message(message)
    assert stream.sent == []


def test_one_too_many_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming_links, "MAX_LINKS", 0)
    with pytest.raises(OverloadedError):
        LinkCall(book(), Stream())
