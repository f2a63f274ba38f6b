"""Which transport a link uses: every obstacle by name, the order, when to warn, and what the log says."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.handoff.choice import (
    AUTO,
    BEST_FIRST,
    CUDA_IPC,
    GRPC,
    SETTINGS,
    SHARED_MEMORY,
    Candidates,
    LeftOut,
    Obstacle,
    allowed,
    candidates,
    chosen,
    host_obstacle,
    receiver_obstacle,
    refusal,
)
from kvbaton.v1 import types_pb2 as types

HERE: dict[str, Any] = {"boot_id": "b1", "network_namespace": 7, "gpu_uuids": ["G1"]}


def host(**changes: Any) -> types.HostIdentity:
    return types.HostIdentity(**{**HERE, **changes})


hosts = st.builds(
    host,
    boot_id=st.sampled_from(["", "b1", "b2"]),
    network_namespace=st.sampled_from([0, 7, 8]),
    gpu_uuids=st.sampled_from([[], ["G1"], ["G2"]]),
)
offers = st.lists(st.sampled_from(BEST_FIRST), unique=True)
answers = st.dictionaries(st.sampled_from(BEST_FIRST), st.sampled_from(["", *Obstacle, "it\nbroke"]))


@pytest.mark.parametrize(
    ("transport", "theirs", "obstacle"),
    [
        (CUDA_IPC, host(), None),
        (SHARED_MEMORY, host(), None),
        (SHARED_MEMORY, host(gpu_uuids=[]), None),
        (GRPC, host(boot_id="b2", network_namespace=8, gpu_uuids=[]), None),
        (CUDA_IPC, host(boot_id="b2"), Obstacle.OTHER_HOST),
        (SHARED_MEMORY, host(boot_id="b2"), Obstacle.OTHER_HOST),
        (SHARED_MEMORY, host(boot_id=""), Obstacle.NAMELESS_HOST),
        (SHARED_MEMORY, host(network_namespace=8), Obstacle.OTHER_NETWORK_NAMESPACE),
        # The handle travels in the hello: no socket is needed.
        (CUDA_IPC, host(network_namespace=8), None),
        (CUDA_IPC, host(gpu_uuids=[]), Obstacle.NO_GPU),
        # Another GPU may be reached too; its driver knows.
        (CUDA_IPC, host(gpu_uuids=["G2"]), None),
    ],
)
def test_what_two_hosts_have_against_a_transport(
    transport: str, theirs: types.HostIdentity, obstacle: Obstacle | None
) -> None:
    assert host_obstacle(transport, host(), theirs) == obstacle
    assert host_obstacle(transport, theirs, host()) == obstacle


def test_a_host_without_a_boot_id_is_not_its_own_neighbour() -> None:
    assert host_obstacle(SHARED_MEMORY, host(boot_id=""), host(boot_id="")) is Obstacle.NAMELESS_HOST


@pytest.mark.parametrize(
    ("setting", "possible", "left"),
    [
        (AUTO, [GRPC, SHARED_MEMORY], (SHARED_MEMORY, GRPC)),
        (AUTO, [GRPC], (GRPC,)),
        (GRPC, [GRPC, SHARED_MEMORY], (GRPC,)),
        (SHARED_MEMORY, [GRPC, SHARED_MEMORY], (SHARED_MEMORY,)),
        (CUDA_IPC, [GRPC, SHARED_MEMORY], ()),
    ],
)
def test_what_a_worker_uses(setting: str, possible: list[str], left: tuple[str, ...]) -> None:
    assert allowed(setting, possible) == left


@pytest.mark.parametrize(
    ("transport", "allowed_here", "possible_here", "obstacle"),
    [
        (SHARED_MEMORY, [SHARED_MEMORY, GRPC], [SHARED_MEMORY, GRPC], ""),
        (SHARED_MEMORY, [GRPC], [SHARED_MEMORY, GRPC], Obstacle.FORCED_THERE),
        (GRPC, [SHARED_MEMORY], [SHARED_MEMORY, GRPC], Obstacle.FORCED_THERE),
        (SHARED_MEMORY, [GRPC], [CUDA_IPC, GRPC], Obstacle.NOT_IN_HOST_MEMORY),
        (CUDA_IPC, [GRPC], [GRPC], Obstacle.NO_GPU),
        ("pigeon", [GRPC], [GRPC], Obstacle.NOT_SHAREABLE),
    ],
)
def test_what_a_receiver_answers(
    transport: str, allowed_here: list[str], possible_here: list[str], obstacle: str
) -> None:
    assert receiver_obstacle(transport, allowed_here, possible_here, host(), host()) == obstacle


def test_what_the_identities_say_comes_before_what_is_here() -> None:
    assert receiver_obstacle(SHARED_MEMORY, [], [], host(), host(boot_id="b2")) == Obstacle.OTHER_HOST


def test_the_best_that_nobody_has_anything_against_comes_first() -> None:
    found = candidates(BEST_FIRST, host(), host(), dict.fromkeys(BEST_FIRST, ""))
    assert found == Candidates(BEST_FIRST, ())


def test_what_the_receiver_has_against_one_is_kept() -> None:
    answered = {CUDA_IPC: str(Obstacle.NO_PEER_ACCESS), SHARED_MEMORY: "its seals are missing", GRPC: ""}
    assert candidates(BEST_FIRST, host(), host(), answered) == Candidates(
        (GRPC,),
        (
            LeftOut(CUDA_IPC, "no common GPU, and no peer access between the two", expected=True),
            LeftOut(SHARED_MEMORY, "its seals are missing", expected=False),
        ),
    )


def test_a_receiver_that_says_nothing_of_one_does_not_get_it() -> None:
    found = candidates([SHARED_MEMORY, GRPC], host(), host(), {GRPC: ""})
    assert found.order == (GRPC,)


@pytest.mark.parametrize(
    ("setting", "left_out", "failures", "transport", "reason", "warn"),
    [
        (AUTO, (), {}, SHARED_MEMORY, "same host", False),
        (AUTO, (), {}, GRPC, "nothing better is to be had here", False),
        (GRPC, (), {}, GRPC, "--transport grpc", False),
        (SHARED_MEMORY, (), {}, SHARED_MEMORY, "--transport shared_memory", False),
        (AUTO, (LeftOut(SHARED_MEMORY, "other host", True),), {}, GRPC, "shared_memory: other host", False),
        (AUTO, (), {SHARED_MEMORY: "damaged"}, GRPC, "shared_memory: damaged", True),
        (AUTO, (LeftOut(SHARED_MEMORY, "no seals", False),), {}, GRPC, "shared_memory: no seals", True),
        (
            AUTO,
            (LeftOut(SHARED_MEMORY, "other network namespace", True),),
            {CUDA_IPC: "damaged"},
            GRPC,
            "cuda_ipc: damaged; shared_memory: other network namespace",
            True,
        ),
        # What is worse than the one in use is nobody's concern.
        (AUTO, (LeftOut(GRPC, "the pipe is blocked", False),), {}, SHARED_MEMORY, "same host", False),
    ],
)
def test_the_reason_of_a_choice(
    setting: str, left_out: tuple[LeftOut, ...], failures: dict[str, str], transport: str, reason: str, warn: bool
) -> None:
    choice = chosen(setting, Candidates((transport,), left_out), failures, transport, 2e9)
    assert (choice.transport, choice.reason, choice.warn) == (transport, reason, warn)


def test_what_the_log_says() -> None:
    choice = chosen(AUTO, Candidates((SHARED_MEMORY,), ()), {}, SHARED_MEMORY, 9.14e9)
    assert choice.sentence("127.0.0.1:7201") == "KV to 127.0.0.1:7201 goes by shared_memory (9.1 GB/s): same host"
    unmeasured = chosen(AUTO, Candidates((GRPC,), ()), {}, GRPC, 0.0)
    assert unmeasured.sentence("h:1") == "KV to h:1 goes by grpc: nothing better is to be had here"


def test_where_nothing_is_left_the_reasons_say_why() -> None:
    out = Candidates((), (LeftOut(SHARED_MEMORY, "other host", True),))
    assert refusal(SHARED_MEMORY, out, {}) == "--transport shared_memory allows no other; shared_memory: other host"
    assert refusal(AUTO, out, {GRPC: "damaged"}) == "shared_memory: other host; grpc: damaged"
    assert refusal(AUTO, Candidates((), ()), {}) == "the two have no transport in common"


@given(offers, hosts, hosts, answers)
def test_each_offered_transport_is_tried_or_has_a_reason(
    offered: list[str], ours: types.HostIdentity, theirs: types.HostIdentity, answered: dict[str, str]
) -> None:
    found = candidates(offered, ours, theirs, answered)
    assert {*found.order, *(out.transport for out in found.left_out)} == set(offered)
    assert len(found.order) + len(found.left_out) == len(offered)
    assert list(found.order) == [transport for transport in BEST_FIRST if transport in found.order]
    assert all(out.reason and "\n" not in out.reason for out in found.left_out)
    assert all(answered[transport] == "" for transport in found.order)
    assert all(host_obstacle(transport, ours, theirs) is None for transport in found.order)


@given(st.sampled_from(SETTINGS), hosts, hosts, st.data())
def test_nothing_forced_falls_back(
    setting: str, ours: types.HostIdentity, theirs: types.HostIdentity, data: st.DataObject
) -> None:
    possible = data.draw(offers)
    offered = allowed(setting, possible)
    found = candidates(offered, ours, theirs, dict.fromkeys(offered, ""))
    if setting != AUTO:
        assert set(found.order) <= {setting}
    for transport in found.order:
        choice = chosen(setting, found, {}, transport, 1.0)
        assert not choice.warn
        assert choice.reason


@given(st.text(), st.sampled_from([CUDA_IPC, SHARED_MEMORY]))
def test_a_peers_words_neither_flood_the_log_nor_break_its_lines(words: str, transport: str) -> None:
    found = candidates([transport, GRPC], host(), host(), {transport: "x" + words, GRPC: ""})
    sentence = chosen(AUTO, found, {}, GRPC, 1e9).sentence("h:1")
    assert len(sentence) < 300
    assert len(sentence.splitlines()) == 1
