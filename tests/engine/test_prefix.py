"""What requests have in common is computed once: found when it is in place, never beyond what is the same, and never
the last token.
"""

from typing import Any

import pytest

from kvbaton.engine import prefix
from kvbaton.engine.output import NOT_A_NUMBER
from kvbaton.engine.request import Phase, Request, Route
from kvbaton.engine.scheduler import Scheduler
from support.requests import new_request
from support.scheduling import BLOCK, NEVER_EOS, ended, output, params, scheduler, step

PROMPT = list(range(20, 31))  # two full blocks and three tokens


def ask(of: Scheduler, name: str, prompt: list[int], route: Route = Route.LOCAL, **more: Any) -> Request:
    return of.add(new_request(name, prompt, params(4), route, **more), 0.0)


def run(of: Scheduler, name: str, prompt: list[int], **more: Any) -> Request:
    request = ask(of, name, prompt, **more)
    while not ended(request):
        assert step(of)
    return request


@pytest.mark.parametrize(
    ("prompt", "num_cached"),
    [
        (PROMPT, 8),
        ([*PROMPT, 99, 99], 8),
        (PROMPT[:8], 4),  # the last token's logits are needed
        (PROMPT[:9], 8),
        (PROMPT[:7], 4),
        (PROMPT[:4], 0),
        ([*PROMPT[:4], 99, *PROMPT[5:]], 4),
        ([99, *PROMPT[1:]], 0),
    ],
)
def test_what_was_computed_before_is_not_computed_again(prompt: list[int], num_cached: int) -> None:
    of = scheduler()
    run(of, "before", PROMPT)
    again = ask(of, "again", prompt)
    assert step(of) == [("again", num_cached, len(prompt) - num_cached, True)]
    assert again.num_cached == num_cached
    assert of.counters.prefix_tokens_queried == len(PROMPT) + len(prompt)
    assert of.counters.prefix_tokens_hit == num_cached


def test_generated_tokens_serve_the_next_turn() -> None:
    of = scheduler()
    first = run(of, "first", PROMPT)
    assert first.output == [NEVER_EOS] * 4
    # The last token was sampled and never computed: 11 + 3 tokens have KV, in three full blocks.
    turn = ask(of, "turn", [*PROMPT, *first.output, 60, 61])
    of.admit(0.0)
    assert turn.num_cached == 12


def test_running_requests_share_blocks_and_the_last_one_frees_them() -> None:
    of = scheduler()
    first = ask(of, "first", PROMPT)
    step(of)
    second = ask(of, "second", PROMPT)
    of.admit(0.0)
    assert second.blocks[:2] == first.blocks[:2]
    assert set(second.blocks[2:]).isdisjoint(first.blocks)
    of.remove("first", 0.0)
    assert step(of) == [("second", 8, 3, True)]
    of.remove("second", 0.0)
    assert of.pool.num_free == of.pool.num_blocks


def test_only_what_is_in_place_is_found() -> None:
    of = scheduler(prefill=5)
    ask(of, "first", PROMPT)
    step(of)
    second = ask(of, "second", PROMPT)
    of.admit(0.0)
    assert second.num_cached == 4
    waits = ask(of, "waits", [70 + token for token in PROMPT], route=Route.RECEIVE)
    of.admit(0.0)
    early = ask(of, "early", list(waits.prompt))
    of.admit(0.0)
    assert early.num_cached == 0
    of.kv_received("waits", NEVER_EOS, 0.0)
    late = ask(of, "late", list(waits.prompt))
    of.admit(0.0)
    assert late.num_cached == 8


def test_a_receiver_takes_what_it_has_and_receives_the_rest() -> None:
    of = scheduler()
    run(of, "before", PROMPT)
    request = ask(of, "a", PROMPT, route=Route.RECEIVE)
    of.admit(0.0)
    assert (request.phase, request.num_cached, len(request.blocks)) == (Phase.RECEIVING, 8, 3)
    of.kv_received("a", NEVER_EOS, 0.0)
    assert step(of) == [("a", 11, 1, True)]


def test_salts_share_nothing() -> None:
    of = scheduler()
    run(of, "before", PROMPT, cache_salt="mine")
    for salt, num_cached in (("", 0), ("yours", 0), ("mine", 8)):
        request = ask(of, f"salt {salt}", PROMPT, cache_salt=salt)
        of.admit(0.0)
        assert request.num_cached == num_cached
        of.remove(request.request_id, 0.0)


def test_a_prompt_whose_logprobs_are_asked_for_is_computed_whole_and_serves_others() -> None:
    of = scheduler()
    run(of, "before", PROMPT)
    of.add(new_request("a", PROMPT, params(4, prompt_logprobs=0)), 0.0)
    assert step(of) == [("a", 0, 11, True)]
    assert of.counters.prefix_tokens_queried == 11


def test_a_request_handed_back_finds_its_blocks_again() -> None:
    of = scheduler(num_blocks=20)
    before = ask(of, "a", PROMPT)
    for _ in range(3):
        step(of)
    of.remove("a", 0.0)
    resumed = ask(of, "b", PROMPT, output=before.output)
    of.admit(0.0)
    assert resumed.num_cached == 12


def test_a_cached_prefix_counts_as_free_and_is_evicted_when_needed() -> None:
    of = scheduler(num_blocks=4)
    run(of, "before", PROMPT)
    assert (of.pool.num_free, of.pool.num_cached) == (4, 3)
    run(of, "other", [90] * 13)
    again = ask(of, "again", PROMPT)
    of.admit(0.0)
    assert again.num_cached == 0


def test_what_waits_for_room_counts_as_one_look_up() -> None:
    of = scheduler(num_blocks=4)
    run(of, "before", PROMPT)
    ask(of, "large", [90] * 13, route=Route.RECEIVE)
    of.admit(0.0)
    ask(of, "waits", PROMPT)
    for _ in range(3):
        assert of.admit(0.0) == []
    assert of.counters.prefix_tokens_queried == 11 + 13


def test_kv_that_led_to_no_numbers_is_found_by_nobody() -> None:
    of = scheduler(prefill=8)
    bad = ask(of, "bad", PROMPT)
    step(of)
    assert of.pool.match(bad.hashes.digests) != []
    of.commit(of.schedule(0.0), output(NOT_A_NUMBER), 0.0)
    of.check_integrity()
    again = ask(of, "again", PROMPT)
    of.admit(0.0)
    assert again.num_cached == 0


def test_each_block_is_hashed_once_and_none_in_vain() -> None:
    of = scheduler(num_blocks=300, prefill=40, model_len=2000)
    request = ask(of, "long", list(range(1000)))
    hashed = []
    while request.phase is not Phase.DECODING:
        step(of)
        hashed.append(len(request.hashes.digests))
    assert hashed == [(number + 1) * 40 // BLOCK for number in range(25)]


@pytest.fixture
def few_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "HASHES_A_STEP", 2)


LONG = list(range(100, 130))  # seven full blocks


@pytest.mark.usefixtures("few_hashes")
def test_a_long_look_up_takes_several_steps_beside_decodes_and_one_without() -> None:
    of = scheduler(num_blocks=40)
    run(of, "before", LONG)
    alone = ask(of, "alone", LONG)
    assert of.admit(0.0) == [alone]
    step(of)
    long, short = ask(of, "long", [*LONG, 1]), ask(of, "short", [*LONG[:4], 1])
    steps = [[request.request_id for request in of.admit(0.0)] for _ in range(4)]
    assert steps == [[], [], [], ["long", "short"]]
    assert (long.num_cached, short.num_cached) == (28, 4)


@pytest.mark.usefixtures("few_hashes")
def test_a_prompt_on_its_way_is_hashed_beside_decodes_before_it_arrives() -> None:
    of = scheduler(num_blocks=40)
    coming = ask(of, "coming", LONG, route=Route.RECEIVE)
    of.admit(0.0)
    assert len(coming.hashes.digests) == 1, "nobody decodes: there is time when it arrives"
    ask(of, "decoding", [1, 2, 3])
    step(of)
    hashed = []
    for _ in range(4):
        of.admit(0.0)
        hashed.append(len(coming.hashes.digests))
    assert hashed == [3, 5, 7, 7]
    of.kv_received("coming", NEVER_EOS, 0.0)
    of.check_integrity()
    twin = ask(of, "twin", LONG)
    while not twin.blocks:
        of.admit(0.0)
    assert twin.num_cached == 28
