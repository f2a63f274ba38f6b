"""The choice of a pair: the least loaded of each role, ties at random, a missing role by name."""

import random
from collections import Counter

import pytest

from kvbaton.engine.errors import UnavailableError
from kvbaton.router.policy import Candidate, choose


def idle(address: str) -> Candidate:
    return Candidate(address, num_in_flight=0, tokens_in_flight=0, num_queued=0)


def test_the_least_loaded_of_each_role_is_chosen_and_the_reason_says_so() -> None:
    candidates = [
        Candidate("many-tokens", num_in_flight=1, tokens_in_flight=900, num_queued=0),
        Candidate("many-requests", num_in_flight=5, tokens_in_flight=100, num_queued=0),
    ]
    choice = choose(candidates, candidates, random.Random(0))
    assert (choice.prefill, choice.decode) == ("many-requests", "many-tokens")
    assert choice.reason == (
        "remote: prefill many-requests: 100 tokens before it, least of 2; decode many-tokens: 1 sequences, least of 2"
    )


def test_between_equal_loads_the_shorter_reported_queue_wins() -> None:
    candidates = [Candidate("long", 2, 50, num_queued=3), Candidate("short", 2, 50, num_queued=1)]
    for seed in range(20):
        choice = choose(candidates, candidates, random.Random(seed))
        assert (choice.prefill, choice.decode) == ("short", "short")


def test_ties_are_random_and_independent_for_the_roles() -> None:
    rng = random.Random(1)
    prefill, decode = [idle("p1"), idle("p2")], [idle("d1"), idle("d2")]
    chosen = Counter((c.prefill, c.decode) for c in (choose(prefill, decode, rng) for _ in range(400)))
    assert set(chosen) == {(p.address, d.address) for p in prefill for d in decode}
    assert min(chosen.values()) > 50


def test_the_same_seed_makes_the_same_choice() -> None:
    candidates = [idle(str(number)) for number in range(10)]
    choices = {choose(candidates, candidates, random.Random(3)) for _ in range(5)}
    assert len(choices) == 1


@pytest.mark.parametrize(("prefill", "decode", "missing"), [(0, 1, "prefill"), (1, 0, "decode"), (0, 0, "prefill")])
def test_a_role_without_a_worker_is_named(prefill: int, decode: int, missing: str) -> None:
    with pytest.raises(UnavailableError, match=f"no {missing} worker is ready"):
        choose([idle("a")] * prefill, [idle("a")] * decode, random.Random(0))


def test_a_decode_worker_that_prefills_does_both() -> None:
    both = Candidate("both", num_in_flight=1, tokens_in_flight=500, num_queued=0, prefills=True)
    other = Candidate("other", num_in_flight=2, tokens_in_flight=0, num_queued=0)
    choice = choose([idle("p"), both], [both, other], random.Random(0))
    assert (choice.prefill, choice.decode) == (None, "both")
    assert choice.reason == "unified: decode both: 1 sequences, least of 2"


def test_a_busy_one_leaves_the_request_to_a_pair() -> None:
    both = Candidate("both", num_in_flight=3, tokens_in_flight=500, num_queued=0, prefills=True)
    other = Candidate("other", num_in_flight=2, tokens_in_flight=0, num_queued=0)
    choice = choose([idle("p"), both], [both, other], random.Random(0))
    assert (choice.prefill, choice.decode) == ("p", "other")
    assert choose([both], [other], random.Random(0)).prefill == "both", "it prefills for others, too"
