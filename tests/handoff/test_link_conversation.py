"""Both halves of a link's conversation against each other, without sockets: what is agreed, and what is refused."""

import asyncio
from typing import Any

import pytest

from kvbaton.engine.errors import InvalidArgumentError, OverloadedError, TransferRejectedError, UnavailableError
from kvbaton.handoff import agreement as agreement_module
from kvbaton.handoff import incoming_links as receiver_module
from kvbaton.handoff.agreement import Agreement, LinkOffer
from kvbaton.handoff.choice import CUDA_IPC, GRPC, SHARED_MEMORY, Obstacle
from kvbaton.handoff.codec import crc32c
from kvbaton.handoff.incoming_links import LinkBook, LinkEndedError
from kvbaton.v1 import kv_transfer_pb2 as pb
from support.links import FakeOpener, FakeSharedPool, LinkedStream, Memory, book, offer


@pytest.fixture(autouse=True)
def _short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement_module, "GRPC_PROBE_BYTES", 5000)


class Pair:
    """A sender and a receiver on one host that can share memory."""

    def __init__(self, setting: str = "auto", there: str = "auto", **host_there: Any) -> None:
        self.memory = Memory()
        self.pool, self.opener = FakeSharedPool(self.memory), FakeOpener(self.memory)
        self.offer: LinkOffer = offer([self.pool], setting)
        self.book: LinkBook = book([self.opener], there, **host_there)
        self.stream: LinkedStream

    async def agree(self) -> Agreement:
        self.stream = LinkedStream(self.book)
        return await self.offer.agree(self.stream)

    def kinds(self) -> list[str | None]:
        return [request.WhichOneof("message") for request in self.stream.received]


async def test_two_on_one_host_share_memory() -> None:
    pair = Pair()
    agreed = await pair.agree()
    assert (agreed.incarnation, agreed.choice.transport, agreed.choice.reason) == ("d-1", SHARED_MEMORY, "same host")
    assert agreed.choice.bytes_per_second == pytest.approx(8e9)
    assert not agreed.choice.warn
    assert pair.kinds() == ["hello", "probe", "chosen"]
    assert pair.stream.received[-1].chosen.reason == "same host"
    assert pair.book.find(agreed.link_id, SHARED_MEMORY) is pair.stream.link
    with pair.stream.link.pool() as pool:
        assert pool is pair.opener.opened[0]


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ({"boot_id": "b2"}, "shared_memory: other host"),
        ({"boot_id": ""}, "shared_memory: a host without a boot id"),
        ({"network_namespace": 8}, "shared_memory: other network namespace"),
    ],
)
async def test_two_that_share_no_memory_say_so_without_a_warning(host: dict[str, Any], reason: str) -> None:
    pair = Pair(**host)
    agreed = await pair.agree()
    assert (agreed.choice.transport, agreed.choice.reason, agreed.choice.warn) == (GRPC, reason, False)
    assert agreed.choice.bytes_per_second > 0
    assert pair.opener.invited == []


@pytest.mark.parametrize("which", ["handing over", "opening", "damage", "obstacle"])
async def test_what_should_have_worked_is_warned_of(which: str) -> None:
    pair = Pair()
    if which == "handing over":
        pair.pool.problem = UnavailableError("the socket is gone")
    elif which == "opening":
        pair.opener.problem = UnavailableError("its seals are missing")
    elif which == "damage":
        pair.pool.damage = True
    else:
        pair.opener.against = "the layouts differ"
    agreed = await pair.agree()
    reasons = {
        "handing over": "shared_memory: the socket is gone",
        "opening": "shared_memory: its seals are missing",
        "damage": "shared_memory: the pattern of 1000 bytes did not arrive as it was sent",
        "obstacle": "shared_memory: the layouts differ",
    }
    assert (agreed.choice.transport, agreed.choice.reason, agreed.choice.warn) == (GRPC, reasons[which], True)
    # What was opened and is not used is closed.
    assert all(pool.closed for pool in pair.opener.opened)


async def test_the_better_of_two_is_tried_first_and_the_other_not_opened() -> None:
    memory = Memory()
    pools = [FakeSharedPool(memory), FakeSharedPool(memory, CUDA_IPC)]
    openers = [FakeOpener(memory), FakeOpener(memory, CUDA_IPC)]
    stream = LinkedStream(book(openers))
    agreed = await offer(pools).agree(stream)
    assert agreed.choice.transport == CUDA_IPC
    assert (len(openers[0].opened), len(openers[1].opened)) == (0, 1)
    stream.end()
    assert openers[0].forgotten == openers[0].invited == [agreed.link_id]
    assert openers[1].opened[0].closed


@pytest.mark.parametrize("forced", [SHARED_MEMORY, GRPC])
async def test_what_is_forced_is_used(forced: str) -> None:
    agreed = await Pair(forced).agree()
    assert (agreed.choice.transport, agreed.choice.reason) == (forced, f"--transport {forced}")
    agreed = await Pair(there=forced).agree()
    assert agreed.choice.transport == forced


async def test_what_is_forced_never_falls_back() -> None:
    pair = Pair(SHARED_MEMORY, boot_id="b2")
    with pytest.raises(UnavailableError, match="--transport shared_memory allows no other; shared_memory: other host"):
        await pair.agree()
    pair = Pair(SHARED_MEMORY)
    pair.pool.damage = True
    with pytest.raises(UnavailableError, match="did not arrive"):
        await pair.agree()
    assert pair.kinds() == ["hello", "probe"]


async def test_two_that_are_told_different_things_do_not_agree() -> None:
    with pytest.raises(UnavailableError, match=str(Obstacle.FORCED_THERE)):
        await Pair(GRPC, SHARED_MEMORY).agree()


async def test_each_link_has_a_pattern_of_its_own() -> None:
    pair = Pair()
    await pair.agree()
    first = pair.stream.received[1].probe.crc32c
    # What an earlier link has left in the memory is not taken for a new pattern.
    pair.pool.write_probe = lambda pattern: None  # type: ignore[method-assign]
    agreed = await pair.agree()
    assert pair.stream.received[1].probe.crc32c != first
    assert agreed.choice.transport == GRPC


async def test_links_take_turns_with_the_memory_for_probes() -> None:
    pair = Pair()
    streams = [LinkedStream(pair.book) for _ in range(5)]
    agreed = await asyncio.gather(*(pair.offer.agree(stream) for stream in streams))
    assert [one.choice.transport for one in agreed] == [SHARED_MEMORY] * 5
    assert len({one.link_id for one in agreed}) == 5


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (pb.LinkResponse(), "was answered None, not welcome"),
        (pb.LinkResponse(probed=pb.LinkProbed()), "was answered probed, not welcome"),
        (pb.LinkResponse(welcome=pb.LinkWelcome(link_id=b"x" * 16)), "0 answers to 2 transports"),
        (pb.LinkResponse(welcome=pb.LinkWelcome(obstacles=["", ""])), "a link id of 0 bytes"),
    ],
)
async def test_a_receiver_that_talks_nonsense_is_not_linked_with(answer: pb.LinkResponse, problem: str) -> None:
    pair = Pair()
    stream = LinkedStream(pair.book)
    stream.reply = lambda request: answer
    with pytest.raises(UnavailableError, match=problem):
        await pair.offer.agree(stream)


async def test_a_receiver_that_is_silent_or_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement_module, "STEP_TIMEOUT_SECONDS", 0.01)
    pair = Pair()
    stream = LinkedStream(pair.book)
    stream.reply = lambda request: None
    with pytest.raises(UnavailableError, match="no answer"):
        await pair.offer.agree(stream)
    stream.end()
    with pytest.raises(UnavailableError, match="was ended"):
        await pair.offer.agree(stream)


HELLO = pb.LinkRequest(
    hello=pb.LinkHello(transports=[SHARED_MEMORY, GRPC], host=offer().host, layout=pb.PoolLayout(probe_bytes=100))
)
CHOSEN = pb.LinkRequest(chosen=pb.LinkChosen(transport=GRPC))


def probe(**fields: Any) -> pb.LinkRequest:
    return pb.LinkRequest(probe=pb.LinkProbe(**fields))


WORKS = probe(transport=GRPC, num_bytes=3, payload=b"abc", crc32c=crc32c([b"abc"]))


@pytest.mark.parametrize(
    ("requests", "problem"),
    [
        ([WORKS], "probe where hello must come"),
        ([CHOSEN], "chosen where hello must come"),
        ([HELLO, HELLO], "a second hello"),
        ([HELLO, CHOSEN], "'grpc' has passed no probe"),
        ([HELLO, pb.LinkRequest()], "empty message"),
        ([HELLO, WORKS, CHOSEN, WORKS], "probe after chosen"),
        ([HELLO, probe(transport="pigeon", num_bytes=1)], "'pigeon' was not agreed on"),
        ([HELLO, probe(transport=CUDA_IPC, num_bytes=1)], "'cuda_ipc' was not agreed on"),
        ([HELLO, probe(transport=GRPC)], "0 bytes prove nothing"),
        ([HELLO, probe(transport=SHARED_MEMORY, num_bytes=101)], "101 bytes of a memory for probes of 100"),
        ([pb.LinkRequest(hello=pb.LinkHello(transports=["a"] * 9))], "9 are more than 8"),
    ],
)
def test_a_sender_that_does_not_keep_to_the_conversation_is_refused(
    requests: list[pb.LinkRequest], problem: str
) -> None:
    link = book([FakeOpener(Memory())]).begin()
    for request in requests[:-1]:
        link.on_message(request)
    with pytest.raises(InvalidArgumentError, match=problem):
        link.on_message(requests[-1])


def test_a_payload_of_another_length_has_not_arrived() -> None:
    link = book().begin()
    link.on_message(HELLO)
    answer = link.on_message(probe(transport=GRPC, num_bytes=4, payload=b"abc", crc32c=crc32c([b"abc"])))
    assert answer is not None
    assert "did not arrive" in answer.probed.problem


async def test_a_link_that_has_ended_lends_nothing() -> None:
    pair = Pair()
    agreed = await pair.agree()
    link = pair.stream.link
    pair.stream.end()
    assert len(pair.book) == 0
    assert pair.opener.opened[0].closed
    assert pair.opener.forgotten == pair.opener.invited
    with pytest.raises(LinkEndedError):
        pair.book.find(agreed.link_id, SHARED_MEMORY)
    with pytest.raises(TransferRejectedError, match="has ended"), link.pool():
        pass
    link.close()
    assert len(pair.opener.forgotten) == 1


async def test_closing_waits_for_a_copy() -> None:
    pair = Pair()
    await pair.agree()
    link, pool = pair.stream.link, pair.opener.opened[0]
    async with asyncio.TaskGroup() as group:
        with link.pool():
            group.create_task(asyncio.to_thread(link.close))
            while len(pair.book):
                await asyncio.sleep(0)
            assert not pool.closed
    assert pool.closed


async def test_a_link_is_found_by_its_own_transport_alone() -> None:
    pair = Pair()
    agreed = await pair.agree()
    for link_id, transport in ((agreed.link_id, GRPC), (agreed.link_id, CUDA_IPC), (b"", SHARED_MEMORY)):
        with pytest.raises(LinkEndedError):
            pair.book.find(link_id, transport)


def test_there_are_not_more_links_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver_module, "MAX_LINKS", 2)
    links = book()
    first, _ = links.begin(), links.begin()
    with pytest.raises(OverloadedError, match="2 links"):
        links.begin()
    first.close()
    links.begin()
