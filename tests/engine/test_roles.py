"""A role is two numbers, changed between two steps: what they leave no place for ends, to go on elsewhere."""

import pytest

from kvbaton.engine.counters import Counts
from kvbaton.engine.errors import PreemptedError, UnavailableError
from kvbaton.engine.request import Phase, Route
from kvbaton.engine.scheduler import Limits
from support.scheduling import BLOCK, NEVER_EOS, add, ended, names, scheduler, step

NO_PROMPTS = "computes no prompts"
NO_DECODE = "does not decode"


def limits(prefill: int, decode: int) -> Limits:
    return Limits(max_prefill_tokens=prefill, max_decode_seqs=decode, max_waiting=10)


@pytest.mark.parametrize(
    ("prefill", "decode", "route", "problem"),
    [
        (4, 4, Route.HAND_OFF, None),
        (4, 4, Route.RECEIVE, None),
        (4, 4, Route.LOCAL, None),
        (4, 0, Route.HAND_OFF, None),
        (4, 0, Route.RECEIVE, NO_DECODE),
        (4, 0, Route.LOCAL, NO_DECODE),
        (0, 4, Route.HAND_OFF, NO_PROMPTS),
        (0, 4, Route.RECEIVE, None),
        (0, 4, Route.LOCAL, NO_PROMPTS),
    ],
)
def test_a_request_needs_a_place_in_the_step(prefill: int, decode: int, route: Route, problem: str | None) -> None:
    of = scheduler(prefill=prefill, decode=decode)
    if problem is None:
        add(of, "a", route=route)
        return
    # A prompt that is to be handed off has nothing to be handed back.
    with pytest.raises(UnavailableError if route is Route.HAND_OFF else PreemptedError, match=problem):
        add(of, "a", route=route)
    assert of.counts() == Counts()


def test_other_numbers_count_from_the_next_step_on() -> None:
    of = scheduler(prefill=2, decode=1)
    add(of, "a", num_prompt=8)
    assert step(of) == [("a", 0, 2, False)]
    assert of.set_limits(limits(5, 1), 0.0).failed == []
    assert step(of) == [("a", 2, 5, False)]


def test_a_worker_that_becomes_prefill_only_keeps_what_is_handed_off_and_hands_back_what_decodes() -> None:
    of = scheduler(prefill=4)
    received, local = add(of, "received", route=Route.RECEIVE), add(of, "local")
    step(of)
    add(of, "coming", route=Route.RECEIVE)
    handed_off, begun = add(of, "handed off", num_prompt=8, route=Route.HAND_OFF), add(of, "begun", num_prompt=16)
    of.kv_received("received", NEVER_EOS, 0.0)
    step(of)
    assert (received.phase, local.phase, begun.phase) == (Phase.DECODING, Phase.DECODING, Phase.PREFILLING)
    result = of.set_limits(limits(4, 0), 1.0)
    ((failed, error),) = result.failed
    assert failed is begun
    assert isinstance(error, PreemptedError)
    assert str(error) == "this worker does not decode at present"
    assert ended(begun)
    assert sorted(names(of.make_room(1.0))) == ["local", "received"]
    assert ended(received)
    assert ended(local)
    assert of.counters.requests_preempted == 0, "blocks were not what was wanting"
    # What waits for its KV is handed back once that has come: until then somebody may be writing to its blocks.
    assert of.counts().receiving == 1
    of.kv_received("coming", NEVER_EOS, 2.0)
    assert names(of.make_room(2.0)) == ["coming"]
    while handed_off.phase is Phase.PREFILLING:
        step(of)
    assert handed_off.phase is Phase.HANDING_OFF
    of.check_integrity()


def test_a_worker_that_becomes_decode_only_loses_its_prompts_and_goes_on_decoding() -> None:
    of = scheduler(num_blocks=8, prefill=4)
    decoding = add(of, "decoding", max_tokens=9)
    step(of)
    handed_off = add(of, "handed off", num_prompt=8, route=Route.HAND_OFF)
    waiting = add(of, "waiting", num_prompt=6 * BLOCK, route=Route.HAND_OFF)
    step(of)
    assert waiting.phase is Phase.WAITING
    result = of.set_limits(limits(0, 4), 1.0)
    assert {request.request_id for request, _ in result.failed} == {"handed off", "waiting"}
    assert all(isinstance(error, UnavailableError) for _, error in result.failed)
    assert ended(waiting)
    # Its transfer may be reading from them.
    assert handed_off.blocks
    assert names([piece.request for piece in of.schedule(1.0).slices]) == ["decoding"]
    of.check_integrity()
    of.remove("handed off", 2.0)
    while not ended(decoding):
        step(of)
    assert of.pool.num_free == 8
