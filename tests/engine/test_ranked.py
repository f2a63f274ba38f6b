"""Requests stand by priority, then arrival, whenever they came into the set."""

from hypothesis import given
from hypothesis import strategies as st

from kvbaton.engine.ranked import RankedRequests
from kvbaton.engine.request import Milestones, Request, Route
from kvbaton.engine.sampling import SamplingParams


def request(priority: int, arrival: int) -> Request:
    sampling = SamplingParams(max_tokens=1, seed=0)
    return Request(str(arrival), [1], sampling, Route.LOCAL, Milestones(0.0), priority=priority, arrival=arrival)


@given(priorities=st.lists(st.integers(-1, 1), max_size=8), data=st.data())
def test_the_order_is_that_of_the_ranks(priorities: list[int], data: st.DataObject) -> None:
    requests = [request(priority, arrival) for arrival, priority in enumerate(priorities)]
    ranked = RankedRequests()
    for one in data.draw(st.permutations(requests)):
        ranked.add(one)
    gone = data.draw(st.sets(st.sampled_from(requests))) if requests else set()
    for one in gone:
        ranked.discard(one)
        ranked.discard(one)
    left = sorted((one for one in requests if one not in gone), key=lambda one: (one.priority, one.arrival))
    assert list(ranked) == left
    assert len(ranked) == len(left)
    assert [ranked[index] for index in range(len(left))] == left


def test_somebody_else_of_the_same_rank_is_not_taken_out() -> None:
    ranked = RankedRequests()
    ranked.add(request(0, 1))
    ranked.discard(request(0, 1))
    assert len(ranked) == 1
