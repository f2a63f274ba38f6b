"""A request whose logits or grammar go wrong ends alone, with its reason; logprobs are passed on beside tokens."""

from collections.abc import Sequence
from typing import Any

import pytest

from kvbaton.engine.errors import InvalidArgumentError, NotANumberError
from kvbaton.engine.output import NOT_A_NUMBER, NOTHING_ALLOWED, SampledToken, StepOutput, TokenLogprobs
from kvbaton.engine.request import Phase, Route
from support.requests import new_request
from support.scheduling import EOS, NEVER_EOS, add, ended, output, params, scheduler, step


class NoNines:
    """Knows one token that must not come, and what has come."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def accept(self, token_id: int) -> None:
        """See `Constraint.accept`."""
        if token_id == 9:
            raise ValueError("a nine")
        self.accepted.append(token_id)

    def fill(self, bitmask: Any, row: int) -> None:
        """See `Constraint.fill`."""
        raise AssertionError("the scheduler fills no masks")


@pytest.mark.parametrize("route", [Route.LOCAL, Route.HAND_OFF])
def test_logits_that_are_not_numbers_end_that_request_alone(route: Route) -> None:
    of = scheduler()
    bad, good = add(of, "bad", route=route), add(of, "good")
    of.admit(0.0)
    result = of.commit(of.schedule(0.0), output(NOT_A_NUMBER, NEVER_EOS), 0.0)
    ((failed, error),) = result.failed
    assert failed is bad
    assert isinstance(error, NotANumberError)
    assert str(error) == "the logits of token 0 are not numbers"
    assert [event.request for event in result.sampled] == [good]
    assert bad.output == []
    assert bad.phase is (Phase.HANDING_OFF if route is Route.HAND_OFF else Phase.FINISHED)
    assert of.counters.requests_not_a_number == 1
    of.check_integrity()


@pytest.mark.parametrize(
    ("constraint", "field"), [(None, "allowed_token_ids"), (NoNines(), "structured_output")], ids=str
)
def test_a_request_that_allows_nothing_is_the_callers_mistake(constraint: NoNines | None, field: str) -> None:
    of = scheduler()
    of.add(new_request("bad", [11], params(4), constraint=constraint), 0.0)
    of.admit(0.0)
    ((failed, error),) = of.commit(of.schedule(0.0), output(NOTHING_ALLOWED), 0.0).failed
    assert isinstance(error, InvalidArgumentError)
    assert str(error) == f"{field}: nothing is left that may be token 0 of the answer"
    assert ended(failed)
    assert failed.output == []
    assert of.counters.requests_not_a_number == 0
    of.check_integrity()


def test_a_decode_may_end_so_too() -> None:
    of = scheduler()
    request = add(of, "a")
    step(of)
    ((failed, _),) = of.commit(of.schedule(0.0), output(NOT_A_NUMBER), 0.0).failed
    assert failed is request
    assert ended(request)
    assert request.output == [NEVER_EOS]
    assert of.pool.num_free == of.pool.num_blocks


@pytest.mark.parametrize("route", [Route.LOCAL, Route.HAND_OFF])
def test_a_constraint_hears_each_token_and_may_refuse_one(route: Route) -> None:
    of = scheduler()
    bad, good = NoNines(), NoNines()
    of.add(new_request("bad", [11], params(4), route, constraint=bad), 0.0)
    of.add(new_request("good", [12], params(4), constraint=good), 0.0)
    of.admit(0.0)
    result = of.commit(of.schedule(0.0), output(9, 8), 0.0)
    ((failed, error),) = result.failed
    assert (failed.request_id, str(error)) == ("bad", "a nine")
    assert failed.output == []
    step(of, token=EOS)
    assert (bad.accepted, good.accepted) == ([], [8, EOS])
    of.check_integrity()


def test_a_constraint_hears_the_token_that_comes_with_kv() -> None:
    of = scheduler()
    constraint = NoNines()
    request = of.add(new_request("a", [11], params(4), Route.RECEIVE, output=[7], constraint=constraint), 0.0)
    of.admit(0.0)
    result = of.kv_received("a", 9, 0.0)
    assert [(failed, str(error)) for failed, error in result.failed] == [(request, "a nine")]
    assert result.sampled == []
    assert ended(request)
    assert constraint.accepted == [], "what came with the request it has accepted before"


def logprobs(*tokens: int) -> Sequence[TokenLogprobs]:
    return [TokenLogprobs(token, -1.5, 1) for token in tokens]


def test_logprobs_go_with_their_tokens_and_those_of_prompts_beside_them() -> None:
    of = scheduler(prefill=2)
    request = of.add(new_request("a", [11, 12, 13], params(4, logprobs=1, prompt_logprobs=0)), 0.0)
    of.admit(0.0)
    first = of.commit(of.schedule(0.0), StepOutput([], {"a": logprobs(12)}), 0.0)
    assert (first.prompt_logprobs, first.sampled) == ([(request, logprobs(12))], [])
    (chosen,) = logprobs(40)
    second = of.commit(of.schedule(0.0), StepOutput([SampledToken(40, chosen)], {"a": logprobs(13)}), 0.0)
    assert second.prompt_logprobs == [(request, logprobs(13))]
    assert [event.logprobs for event in second.sampled] == [chosen]
