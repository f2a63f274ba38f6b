"""A descriptor reaches the link that expects it; who brings anything else is hung up on, and nothing is left open."""

import asyncio
import gc
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from kvbaton.engine.errors import UnavailableError
from kvbaton.handoff import descriptors
from kvbaton.handoff.descriptors import MAX_CLIENTS, DescriptorInbox, send_descriptor

ID, OTHER = b"i" * 16, b"o" * 16


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd"), key=int)
    yield
    gc.collect()
    assert sorted(os.listdir("/proc/self/fd"), key=int) == before


@pytest.fixture
def ours() -> Iterator[int]:
    """A descriptor to pass."""
    descriptor = os.memfd_create("test")
    yield descriptor
    os.close(descriptor)


def client(name: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.setblocking(False)
    made.connect("\0" + name)
    return made


async def hung_up(made: socket.socket) -> bytes:
    """What the receiver says until it hangs up."""
    said = b""
    async with asyncio.timeout(10):
        while True:
            try:
                part = await asyncio.get_running_loop().sock_recv(made, 16)
            except ConnectionError:
                part = b""
            if not part:
                made.close()
                return said
            said += part


async def test_a_descriptor_arrives(ours: int) -> None:
    inbox = DescriptorInbox()
    name = inbox.expect(ID)
    assert inbox.collect(ID) is None
    await send_descriptor(name, ID, ours)
    received = inbox.collect(ID)
    assert received is not None
    assert os.fstat(received).st_ino == os.fstat(ours).st_ino
    assert not os.get_inheritable(received)
    os.close(received)
    assert inbox.collect(ID) is None
    inbox.forget(ID)
    inbox.forget(ID)


async def test_each_link_has_its_own(ours: int) -> None:
    inbox, second = DescriptorInbox(), os.memfd_create("second")
    name = inbox.expect(ID)
    assert inbox.expect(OTHER) == name
    async with asyncio.TaskGroup() as group:
        group.create_task(send_descriptor(name, OTHER, second))
        group.create_task(send_descriptor(name, ID, ours))
    received = {link: inbox.collect(link) for link in (ID, OTHER)}
    for link, descriptor in ((ID, ours), (OTHER, second)):
        found = received[link]
        assert found is not None
        assert os.fstat(found).st_ino == os.fstat(descriptor).st_ino
        os.close(found)
    os.close(second)
    inbox.forget(ID)
    inbox.forget(OTHER)


async def test_what_is_not_collected_is_closed(ours: int) -> None:
    inbox = DescriptorInbox()
    await send_descriptor(inbox.expect(ID), ID, ours)
    inbox.forget(ID)


async def test_an_unknown_link(ours: int) -> None:
    inbox = DescriptorInbox()
    name = inbox.expect(ID)
    with pytest.raises(UnavailableError, match="did not expect the descriptor"):
        await send_descriptor(name, OTHER, ours)
    assert inbox.collect(ID) is None
    inbox.forget(ID)


async def test_a_second_descriptor_for_one_link(ours: int) -> None:
    inbox = DescriptorInbox()
    name = inbox.expect(ID)
    await send_descriptor(name, ID, ours)
    with pytest.raises(UnavailableError, match="did not expect the descriptor"):
        await send_descriptor(name, ID, ours)
    inbox.forget(ID)


@pytest.mark.parametrize("num_descriptors", [0, 2, 4, 9])
async def test_not_one_descriptor(ours: int, num_descriptors: int) -> None:
    inbox = DescriptorInbox()
    made = client(inbox.expect(ID))
    socket.send_fds(made, [ID], [ours] * num_descriptors)
    assert await hung_up(made) == b""
    assert inbox.collect(ID) is None
    inbox.forget(ID)


@pytest.mark.parametrize("message", [b"x", b"i" * 15, b"i" * 17, os.urandom(5000)])
@pytest.mark.parametrize("num_descriptors", [0, 1])
async def test_garbage(ours: int, message: bytes, num_descriptors: int) -> None:
    inbox = DescriptorInbox()
    made = client(inbox.expect(ID))
    socket.send_fds(made, [message], [ours] * num_descriptors)
    assert await hung_up(made) == b""
    inbox.forget(ID)


async def test_a_client_that_goes_at_once(ours: int) -> None:
    inbox = DescriptorInbox()
    name = inbox.expect(ID)
    client(name).close()
    with client(name) as made:
        socket.send_fds(made, [OTHER], [ours])
    await send_descriptor(name, ID, ours)
    inbox.forget(ID)


async def test_a_silent_client_is_not_waited_for() -> None:
    inbox = DescriptorInbox(client_seconds=0.01)
    assert await hung_up(client(inbox.expect(ID))) == b""
    inbox.forget(ID)


async def test_silent_clients_are_few(ours: int) -> None:
    inbox = DescriptorInbox()
    name = inbox.expect(ID)
    silent = []
    for _ in range(MAX_CLIENTS):
        silent.append(client(name))
        await asyncio.sleep(0)
    assert await hung_up(client(name)) == b""
    silent.pop().close()
    # The receiver hears of it on its loop.
    for _ in range(1000):
        try:
            await send_descriptor(name, ID, ours)
            break
        except UnavailableError:
            await asyncio.sleep(0.001)
    found = inbox.collect(ID)
    assert found is not None
    os.close(found)
    inbox.forget(ID)
    for made in silent:
        assert await hung_up(made) == b""


async def test_another_user(ours: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox = DescriptorInbox()
    name = inbox.expect(ID)
    made = client(name)
    monkeypatch.setattr(descriptors, "_user_of", lambda connected: os.geteuid() + 1)
    assert await hung_up(made) == b""
    with pytest.raises(UnavailableError, match="belongs to another user"):
        await send_descriptor(name, ID, ours)
    inbox.forget(ID)


async def test_nobody_listens(ours: int) -> None:
    inbox = DescriptorInbox()
    name = inbox.expect(ID)
    inbox.forget(ID)
    with pytest.raises(UnavailableError, match="the receiver's socket: "):
        await send_descriptor(name, ID, ours)
    assert inbox.expect(ID) != name
    inbox.forget(ID)


async def test_a_receiver_that_says_nothing(ours: int) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as deaf:
        deaf.bind("\0kvbaton-test-deaf-" + str(os.getpid()))
        deaf.listen()
        with pytest.raises(UnavailableError, match="did not take the descriptor within 0.01 s"):
            await send_descriptor("kvbaton-test-deaf-" + str(os.getpid()), ID, ours, timeout=0.01)


async def test_forgotten_by_another_thread(ours: int) -> None:
    inbox = DescriptorInbox()
    name = inbox.expect(ID)
    await send_descriptor(name, ID, ours)
    thread = threading.Thread(target=inbox.forget, args=(ID,))
    thread.start()
    thread.join()
    await asyncio.sleep(0)
    with pytest.raises(UnavailableError):
        await send_descriptor(name, ID, ours)


def test_forgotten_after_the_loop() -> None:
    inbox = DescriptorInbox()

    async def expect() -> None:
        inbox.expect(ID)

    asyncio.run(expect())
    inbox.forget(ID)


async def test_a_system_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "AF_UNIX")
    with pytest.raises(UnavailableError, match="no sockets that pass descriptors"):
        DescriptorInbox().expect(ID)
