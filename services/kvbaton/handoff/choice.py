"""Which transport a link uses: pure, from what both ends say of themselves and what was found when it was tried.

A transport is left out because of an `Obstacle`, which both ends can tell without trying and nobody need be warned of,
or because it failed where it should have worked: that deserves a warning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from kvbaton.v1 import types_pb2 as types

CUDA_IPC, SHARED_MEMORY, GRPC = "cuda_ipc", "shared_memory", "grpc"
BEST_FIRST = (CUDA_IPC, SHARED_MEMORY, GRPC)
"""All transports."""

AUTO = "auto"
SETTINGS = (AUTO, *BEST_FIRST)
"""What `--transport` can be."""

_MAX_REASON = 200


class Obstacle(StrEnum):
    """Why a transport is not to be had between two workers, known before it is tried."""

    OTHER_HOST = "other host"
    NAMELESS_HOST = "a host without a boot id"
    OTHER_NETWORK_NAMESPACE = "other network namespace"
    SAME_PROCESS = "the same process"
    NO_GPU = "the decode worker's KV is not on a GPU"
    NOT_IN_HOST_MEMORY = "the decode worker's KV is not in host memory"
    NO_PEER_ACCESS = "no common GPU, and no peer access between the two"
    NOT_SHAREABLE = "the KV pool cannot be shared here"
    ENCODED = "KV is encoded on its way"
    FORCED = "--transport names another"
    FORCED_THERE = "the decode worker's --transport names another"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A transport that is not used."""

    transport: str
    reason: str
    expected: bool
    """Whether nobody could have thought that it works: an `Obstacle`."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """What may be tried, best first, and why nothing else."""

    order: tuple[str, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """The transport of a link."""

    transport: str
    reason: str
    warn: bool
    """Whether a better one was to be expected."""
    bytes_per_second: float = 0.0
    """As the probe measured it."""

    def sentence(self, endpoint: str) -> str:
        """The log's line about it; `endpoint` is the receiver's host:port."""
        speed = f" ({self.bytes_per_second / 1e9:.1f} GB/s)" if self.bytes_per_second else ""
        return f"KV to {endpoint} goes by {self.transport}{speed}: {self.reason}"


def allowed(setting: str, possible: Sequence[str]) -> tuple[str, ...]:
    """The transports that a worker uses, best first: all that its memory makes `possible`, or the one it is told."""
    return tuple(transport for transport in BEST_FIRST if transport in possible and setting in (AUTO, transport))


def host_obstacle(transport: str, ours: types.HostIdentity, theirs: types.HostIdentity) -> Obstacle | None:
    """What two host identities have against a transport. The same from either end."""
    if transport == GRPC:
        return None
    if not ours.boot_id or not theirs.boot_id:
        return Obstacle.NAMELESS_HOST
    if ours.boot_id != theirs.boot_id:
        return Obstacle.OTHER_HOST
    if transport == SHARED_MEMORY and ours.network_namespace != theirs.network_namespace:
        # The descriptor travels through an abstract socket, which belongs to a network namespace.
        return Obstacle.OTHER_NETWORK_NAMESPACE
    if transport == CUDA_IPC and not (ours.gpu_uuids and theirs.gpu_uuids):
        return Obstacle.NO_GPU
    return None


def receiver_obstacle(
    transport: str,
    allowed_here: Sequence[str],
    possible_here: Sequence[str],
    ours: types.HostIdentity,
    theirs: types.HostIdentity,
) -> str:
    """The receiver's first answer about an offered transport: empty, or an `Obstacle`."""
    obstacle = host_obstacle(transport, ours, theirs)
    if obstacle is None and transport not in possible_here:
        known = {CUDA_IPC: Obstacle.NO_GPU, SHARED_MEMORY: Obstacle.NOT_IN_HOST_MEMORY}
        obstacle = known.get(transport, Obstacle.NOT_SHAREABLE)
    if obstacle is None and transport not in allowed_here:
        obstacle = Obstacle.FORCED_THERE
    return obstacle or ""


def candidates(
    offered: Sequence[str],
    ours: types.HostIdentity,
    theirs: types.HostIdentity,
    obstacles: Mapping[str, str],
) -> Candidates:
    """What the sender tries, of the transports that it has `offered`.

    `obstacles` is what the receiver has against each, empty for nothing; one that it says nothing of is not tried.
    """
    order: list[str] = []
    left_out: list[LeftOut] = []
    for transport in BEST_FIRST:
        if transport not in offered:
            continue
        reason: str | None = host_obstacle(transport, ours, theirs)
        if reason is None:
            reason = obstacles.get(transport, Obstacle.FORCED_THERE)
        if reason:
            left_out.append(LeftOut(transport, _shown(reason), expected=reason in set(Obstacle)))
        else:
            order.append(transport)
    return Candidates(tuple(order), tuple(left_out))


def chosen(setting: str, tried: Candidates, failures: Mapping[str, str], transport: str, speed: float) -> Choice:
    """The choice of `transport`, which passed its probe at `speed` bytes per second.

    `failures` says what was wrong with those that were tried before it.
    """
    better = BEST_FIRST[: BEST_FIRST.index(transport)]
    against = [out for out in _all_left_out(tried, failures) if out.transport in better]
    if against:
        reason = "; ".join(f"{out.transport}: {out.reason}" for out in against)
    elif setting == transport:
        reason = f"--transport {setting}"
    else:
        reason = "nothing better is to be had here" if transport == GRPC else "same host"
    return Choice(transport, reason, any(not out.expected for out in against), speed)


def refusal(setting: str, tried: Candidates, failures: Mapping[str, str]) -> str:
    """Why no transport is left."""
    reasons = "; ".join(f"{out.transport}: {out.reason}" for out in _all_left_out(tried, failures))
    told = "" if setting == AUTO else f"--transport {setting} allows no other; "
    return told + (reasons or "the two have no transport in common")


def _all_left_out(tried: Candidates, failures: Mapping[str, str]) -> list[LeftOut]:
    failed = [LeftOut(transport, _shown(why), expected=False) for transport, why in failures.items()]
    return sorted([*tried.left_out, *failed], key=lambda out: BEST_FIRST.index(out.transport))


def _shown(reason: str) -> str:
    # A peer's text goes into a log line; neither its length nor its lines are the peer's to choose.
    return " ".join(reason.split())[:_MAX_REASON]
