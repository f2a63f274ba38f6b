"""The same where frames are references to memory of the sender that the receiver has mapped: what is wrong with a
reference, with the memory or with the link is noticed, nothing of it is applied, and nothing stays mapped.
"""

import contextlib
import random
from collections.abc import AsyncIterator, Callable

import pytest

from kvbaton.engine.errors import TransferRejectedError, UnavailableError
from kvbaton.handoff import conversation as conversation_module
from kvbaton.handoff.choice import AUTO, GRPC, SHARED_MEMORY
from kvbaton.handoff.incoming_links import LinkEndedError
from kvbaton.v1 import kv_transfer_pb2 as pb
from support import chaos, faults
from support.chaos import TOKENS, settled
from support.fault_proxy import Edit, Passed
from support.faults import HUGE, Fault
from support.http2_frames import grpc_message
from support.linked_ends import LinkedEnds, linked_ends
from support.reference_faults import FAULTS


def num_mapped() -> int:
    """Pools that are mapped here, one's own included."""
    return sum("memfd:" in line for line in chaos.mappings())


@pytest.fixture
async def ends() -> AsyncIterator[LinkedEnds]:
    mapped = num_mapped()
    async with linked_ends() as made:
        yield made
    # The sender's own pool is still there.
    assert num_mapped() <= mapped + 1


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_a_fault_ends_in_its_error_and_leaves_nothing(
    ends: LinkedEnds, fault: Fault, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    num_frames = await ends.undisturbed(rng)
    assert num_frames > 10
    descriptors, mapped = chaos.num_descriptors(), num_mapped()
    reservation = ends.reserve(TOKENS, rng)
    ends.proxy.strike(fault.make(rng, num_frames), responses=fault.responses)
    with monkeypatch.context() as patch:
        if fault.silent:
            patch.setattr(conversation_module, "ANSWER_TIMEOUT_SECONDS", 0.3)
        with pytest.raises(fault.error, match=fault.message):
            await ends.send(reservation, ends.compute(TOKENS))
    assert ends.applied == ([77] if fault.applied else [])
    assert ends.arrived(reservation) or not fault.applied
    assert len(ends.book) == (not fault.applied)

    ends.proxy.spare()
    ends.applied.clear()
    if fault.applied:
        reservation = ends.reserve(TOKENS, rng)
    async with ends.reconnected() if fault.frozen else contextlib.nullcontext():
        await ends.send(reservation, ends.compute(TOKENS), attempt=2)
    assert ends.arrived(reservation)
    assert ends.applied == [77]
    if fault.frozen:
        ends.proxy.thaw()
    await settled(ends.attempts, descriptors)
    assert num_mapped() <= mapped
    assert ends.arrived(reservation)


@pytest.mark.parametrize("seed", range(4))
async def test_memory_that_changes_after_it_was_named_is_refused(ends: LinkedEnds, seed: int) -> None:
    """As when a sender gives its blocks away too early."""
    rng = random.Random(seed)
    num_frames = await ends.undisturbed(rng)
    reservation = ends.reserve(TOKENS, rng)

    def overwrite() -> None:
        for layer in range(ends.source.geometry.num_layers):
            ends.source.fill(layer, list(range(11)), TOKENS)

    ends.proxy.strike(faults.calling("frame", rng.randrange(num_frames), overwrite))
    with pytest.raises(TransferRejectedError, match="crc32c"):
        await ends.send(reservation, ends.compute(TOKENS))
    assert ends.applied == []
    ends.proxy.spare()
    await ends.send(reservation, ends.compute(TOKENS), attempt=2)
    assert ends.arrived(reservation)


@pytest.mark.parametrize("seed", range(4))
async def test_a_link_that_ends_in_the_middle_ends_its_transfers(ends: LinkedEnds, seed: int) -> None:
    rng = random.Random(seed)
    num_frames = await ends.undisturbed(rng)
    mapped = num_mapped()
    reservation = ends.reserve(TOKENS, rng)
    (link,) = ends.links._links.values()
    ends.proxy.strike(faults.calling("frame", rng.randrange(num_frames), link.close))
    with pytest.raises(TransferRejectedError, match="link"):
        await ends.send(reservation, ends.compute(TOKENS))
    assert ends.applied == []
    assert num_mapped() == mapped - 1
    ends.proxy.spare()
    # The link's stream is still there, so the sender must be told once more before it links anew.
    async with ends.table.using(ends.proxy.endpoint) as old:
        await ends.table.retire(old)
    await ends.send(reservation, ends.compute(TOKENS), attempt=2)
    assert ends.arrived(reservation)
    assert num_mapped() == mapped


def _layout(change: Callable[[pb.PoolLayout], object]) -> Edit:
    def apply(data: bytes) -> Passed:
        request = pb.LinkRequest.FromString(data)
        change(request.hello.layout)
        return Passed(grpc_message(request.SerializeToString()))

    return faults.at("hello", 0, apply)


LIES: dict[str, Callable[[pb.PoolLayout], object]] = {
    "larger": lambda layout: setattr(layout, "num_bytes", layout.num_bytes + 4096),
    "much larger": lambda layout: setattr(layout, "num_bytes", 2**63),
    "more blocks": lambda layout: setattr(layout, "num_blocks", layout.num_blocks * 2),
    "very many blocks": lambda layout: setattr(layout, "num_blocks", HUGE),
    "blocks of nothing": lambda layout: setattr(layout, "block_size", 0),
    "large blocks": lambda layout: setattr(layout, "block_size", HUGE),
    "no layers": lambda layout: layout.ClearField("k_offsets"),
    "a layer more": lambda layout: layout.v_offsets.append(0),
    "K outside": lambda layout: layout.k_offsets.__setitem__(1, 2**64 - 1),
    "V outside": lambda layout: layout.v_offsets.__setitem__(2, layout.num_bytes),
    "a probe outside": lambda layout: setattr(layout, "probe_offset", layout.num_bytes - 1),
    "a probe elsewhere": lambda layout: setattr(layout, "probe_offset", layout.k_offsets[0]),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
@pytest.mark.parametrize("setting", [AUTO, SHARED_MEMORY])
async def test_a_layout_that_lies_is_not_mapped_or_not_trusted(
    lie: Callable[[pb.PoolLayout], object], setting: str
) -> None:
    mapped, descriptors = num_mapped(), chaos.num_descriptors()
    async with linked_ends(setting=setting) as ends:
        ends.proxy.strike(_layout(lie))
        reservation = ends.reserve(TOKENS, random.Random(1))
        if setting == SHARED_MEMORY:
            with pytest.raises(UnavailableError):
                await ends.send(reservation, ends.compute(TOKENS))
            assert ends.applied == []
        else:
            report = await ends.send(reservation, ends.compute(TOKENS))
            assert report.choice.transport == GRPC
            assert ends.arrived(reservation)
        assert num_mapped() <= mapped + 1, "the sender's own"
    del ends
    await settled((), descriptors)
    assert num_mapped() <= mapped


async def test_a_layout_that_lies_within_its_memory_gives_wrong_kv_that_is_refused(ends: LinkedEnds) -> None:
    def swap(layout: pb.PoolLayout) -> None:
        layout.k_offsets[0], layout.k_offsets[1] = layout.k_offsets[1], layout.k_offsets[0]

    ends.proxy.strike(_layout(swap))
    reservation = ends.reserve(TOKENS, random.Random(1))
    with pytest.raises(TransferRejectedError, match="crc32c"):
        await ends.send(reservation, ends.compute(TOKENS))
    assert ends.applied == []


@pytest.mark.parametrize(
    ("kind", "responses"), [("hello", False), ("probe", False), ("welcome", True), ("probed", True)]
)
@pytest.mark.parametrize("seed", range(6))
async def test_a_bit_of_the_conversation_flipped_never_gives_wrong_kv(kind: str, responses: bool, seed: int) -> None:
    rng = random.Random(seed)
    descriptors = chaos.num_descriptors()
    async with linked_ends() as ends:
        edit = faults.at(kind, 0, lambda data: Passed(grpc_message(faults.flipped(data, rng))))
        ends.proxy.strike(edit, responses=responses)
        reservation = ends.reserve(TOKENS, rng)
        with contextlib.suppress(UnavailableError, TransferRejectedError, LinkEndedError):
            await ends.send(reservation, ends.compute(TOKENS))
        assert ends.applied == ([77] if ends.arrived(reservation) else [])
    del ends
    await settled((), descriptors)
