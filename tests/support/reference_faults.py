"""What can happen to a transfer by reference on its way, beside what can happen to any."""

import random
import struct
from collections.abc import Callable

from kvbaton.engine.errors import UnavailableError
from kvbaton.v1 import kv_transfer_pb2 as pb
from support import faults
from support.fault_proxy import Edit, Passed, Then
from support.faults import HUGE, Fault

OTHERS_TOO = [
    "info: a bit flipped",
    "any bit of a message flipped",
    "a frame dropped",
    "a frame repeated",
    "two frames swapped",
    "attempt changed",
    "number changed",
    "layer_stop changed",
    "token_stop changed",
    "a message of 4 GiB claimed",
    "noise in a message's place",
    "an unasked confirmation",
    "the header again",
    "a commit too early",
    "ticket: a bit flipped",
    "attempt 0",
    "geometry: wide heads",
    "geometry: many layers",
    "tokens: more",
    "commit: another first token",
    "commit: no digest",
    "closed between frames",
    "reset within a frame",
    "stalled between frames",
    "frozen within a frame",
    "ready dropped",
    "applied dropped",
    "closed before applied",
]
"""Of `faults.FAULTS`: those that do not strike a payload."""


def _blocks(change: Callable[[random.Random, list[int]], list[int]]) -> Callable[[random.Random, int], Edit]:
    def apply(rng: random.Random, request: pb.TransferRequest) -> None:
        packed = request.frame.reference.blocks
        blocks = change(rng, list(struct.unpack(f"<{len(packed) // 4}I", packed)))
        request.frame.reference.blocks = struct.pack(f"<{len(blocks)}I", *blocks)

    return faults.on_frame(faults.parsed(apply))


def _one_is(value: Callable[[int], int]) -> Callable[[random.Random, list[int]], list[int]]:
    def change(rng: random.Random, blocks: list[int]) -> list[int]:
        place = rng.randrange(len(blocks))
        return [*blocks[:place], value(blocks[place]), *blocks[place + 1 :]]

    return change


def _with_payload(rng: random.Random, request: pb.TransferRequest) -> None:
    request.frame.payload = bytes(rng.randint(1, 500))


def _payload_instead(rng: random.Random, request: pb.TransferRequest) -> None:
    request.frame.ClearField("reference")
    request.frame.payload = bytes(rng.randint(1, 500))


def _torn_blocks(rng: random.Random, request: pb.TransferRequest) -> None:
    request.frame.reference.blocks = request.frame.reference.blocks[: rng.choice((1, 2, 3))]


def _nothing(_: random.Random, __: bytes) -> Passed:
    return Passed(b"")


def _link_id(header: pb.KvHeader) -> None:
    header.link_id = bytes(16)


def _by_grpc(header: pb.KvHeader) -> None:
    header.transports[:] = ["grpc"]


FAULTS: dict[str, Fault] = {
    **{name: faults.FAULTS[name] for name in OTHERS_TOO},
    "a block outside the pool": Fault(_blocks(_one_is(lambda _: 96)), message="block"),
    "a block far outside the pool": Fault(_blocks(_one_is(lambda _: HUGE)), message="block"),
    "another block": Fault(_blocks(_one_is(lambda block: (block + 50) % 96)), message="crc32c"),
    "blocks: one less": Fault(_blocks(lambda _, blocks: blocks[:-1]), message="block"),
    "blocks: one more": Fault(_blocks(lambda _, blocks: [*blocks, 0])),
    "blocks: none": Fault(_blocks(lambda *_: []), message="block"),
    "blocks: a million": Fault(_blocks(lambda _, blocks: blocks * 100_000)),
    "blocks: not whole": Fault(faults.on_frame(faults.parsed(_torn_blocks)), message="reference.blocks"),
    "reference and payload": Fault(faults.on_frame(faults.parsed(_with_payload)), message="frame.payload"),
    "payload for a reference": Fault(faults.on_frame(faults.parsed(_payload_instead)), message="frame.payload"),
    "unknown link": Fault(faults.on_header(_link_id), message="link"),
    "no confirmation": Fault(faults.single("confirm", _nothing), UnavailableError, "without an answer"),
    "confirmation stalled": Fault(
        faults.single("confirm", lambda *_: Passed(b"", Then.HOLD)), UnavailableError, "gave no answer", silent=True
    ),
    "closed before confirmation": Fault(faults.single("confirm", lambda *_: Passed(b"", Then.CLOSE)), UnavailableError),
    "copied dropped": Fault(
        faults.single("copied", _nothing), UnavailableError, "gave no answer", responses=True, silent=True
    ),
    "closed after copied": Fault(faults.single("copied", faults.after(Then.CLOSE)), UnavailableError, responses=True),
}
"""By name, for transfers whose frames are references."""
