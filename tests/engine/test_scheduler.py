"""Who is admitted, who computes what in which step, how requests end, and what is refused: rule by rule."""

from collections.abc import Callable

import pytest

from kvbaton.engine.counters import Counts
from kvbaton.engine.errors import InvalidArgumentError, OverloadedError
from kvbaton.engine.request import TRANSITIONS, Phase, Route
from kvbaton.engine.sampling import FinishReason, SamplingParams
from kvbaton.engine.scheduler import Scheduler
from support.requests import new_request
from support.scheduling import EOS, NEVER_EOS, add, ended, names, output, params, scheduler, step, work


def test_admission_is_in_order_and_nobody_overtakes_the_head_of_the_line() -> None:
    of = scheduler(num_blocks=4)
    add(of, "first", num_prompt=8, max_tokens=1)  # 2 blocks
    large = add(of, "large", num_prompt=12, max_tokens=1)  # 3 blocks: does not fit beside it
    small = add(of, "small", num_prompt=4, max_tokens=1)  # 1 block: would fit
    assert names(of.admit(1.0)) == ["first"]
    assert large.phase is small.phase is Phase.WAITING
    of.remove("first", 2.0)
    assert names(of.admit(3.0)) == ["large", "small"]
    assert of.pool.num_free == 0


@pytest.mark.parametrize("route", [Route.LOCAL, Route.RECEIVE])
@pytest.mark.parametrize(("num_prompt", "max_tokens", "blocks"), [(3, 600, 1), (4, 600, 2), (4, 1, 1), (7, 2, 2)])
def test_admission_takes_the_blocks_of_the_prompt_and_one_token(
    route: Route, num_prompt: int, max_tokens: int, blocks: int
) -> None:
    # The last token's KV is never needed.
    of = scheduler(num_blocks=200)
    request = add(of, "a", num_prompt, max_tokens, route)
    of.admit(0.0)
    assert len(request.blocks) == blocks


def test_a_request_to_be_handed_off_takes_the_blocks_of_its_prompt() -> None:
    of = scheduler()
    request = add(of, "a", num_prompt=4, max_tokens=600, route=Route.HAND_OFF)
    of.admit(0.0)
    assert len(request.blocks) == 1


def test_an_admission_leaves_a_block_for_everybody_who_may_need_another_one() -> None:
    of = scheduler(num_blocks=4)
    add(of, "grows", num_prompt=4, max_tokens=8)
    add(of, "fits exactly", num_prompt=4, max_tokens=1)
    late = add(of, "late", num_prompt=4, max_tokens=1)
    assert names(of.admit(0.0)) == ["grows", "fits exactly"]
    assert late.phase is Phase.WAITING
    of.remove("grows", 0.0)
    assert names(of.admit(0.0)) == ["late"]


def test_the_order_of_a_step_is_decodes_then_begun_prompts_then_new_ones() -> None:
    of = scheduler(prefill=5)
    add(of, "decoding", num_prompt=2)
    assert step(of) == [("decoding", 0, 2, True)]
    add(of, "begun", num_prompt=8)
    assert step(of) == [("decoding", 2, 1, True), ("begun", 0, 5, False)]
    add(of, "new", num_prompt=3)
    assert step(of) == [("decoding", 3, 1, True), ("begun", 5, 3, True), ("new", 0, 2, False)]
    assert step(of) == [("decoding", 4, 1, True), ("begun", 8, 1, True), ("new", 2, 1, True)]


def test_the_budget_bounds_prompt_tokens_and_not_decodes() -> None:
    of = scheduler(prefill=4)
    for name in "abc":
        add(of, name, num_prompt=1)
    step(of)
    add(of, "long", num_prompt=9)
    of.admit(0.0)
    batch = of.schedule(0.0)
    assert (batch.num_decode_tokens, batch.num_prefill_tokens) == (3, 4)


def test_chunks_cover_the_prompt_once_and_the_last_one_samples() -> None:
    of = scheduler(prefill=4)
    request = add(of, "a", num_prompt=10, max_tokens=2)
    of.admit(0.0)
    fed: list[int] = []
    shapes = []
    while request.phase is Phase.PREFILLING:
        batch = of.schedule(0.0)
        shapes += work(batch)
        fed += batch.slices[0].token_ids()
        of.commit(batch, output(*[NEVER_EOS] * batch.slices[0].samples), 0.0)
    assert shapes == [("a", 0, 4, False), ("a", 4, 4, False), ("a", 8, 2, True)]
    assert fed == request.prompt
    assert list(of.schedule(0.0).slices[0].token_ids()) == [NEVER_EOS]


def test_scheduling_again_without_a_commit_gives_the_same_work() -> None:
    of = scheduler(prefill=4)
    add(of, "a", num_prompt=10)
    of.admit(0.0)
    assert work(of.schedule(0.0)) == work(of.schedule(1.0))


def test_priorities_come_before_arrival_in_line_in_prompts_and_in_decodes() -> None:
    of = scheduler(decode=2, prefill=8)
    for name, priority in (("late", 1), ("usual", 0), ("urgent", -1)):
        add(of, name, num_prompt=4, priority=priority)
    assert names(of.admit(0.0)) == ["urgent", "usual", "late"]
    assert [name for name, *_ in step(of)] == ["urgent", "usual"]
    assert [name for name, *_ in step(of)] == ["urgent", "usual", "late"]
    assert [name for name, *_ in step(of)] == ["urgent", "usual"]


def test_at_most_max_decode_seqs_decode_and_the_oldest_go_first() -> None:
    of = scheduler(decode=2)
    for name in "abc":
        add(of, name, max_tokens=3)
    step(of)
    assert names([s.request for s in of.schedule(0.0).slices]) == ["a", "b"]
    step(of)
    step(of)  # a and b have their three tokens
    assert names([s.request for s in of.schedule(0.0).slices]) == ["c"]


@pytest.mark.parametrize("token", [NEVER_EOS, EOS])
def test_a_handed_off_request_keeps_its_blocks_until_it_is_removed(token: int) -> None:
    of = scheduler()
    request = add(of, "a", num_prompt=6, route=Route.HAND_OFF)
    step(of, token)
    assert request.phase is Phase.HANDING_OFF
    assert request.output == [token]
    assert request.finish_reason is (FinishReason.STOP if token == EOS else None)
    assert step(of) == []
    assert len(request.blocks) == 2
    assert of.remove("a", 1.0) is request
    assert ended(request)
    assert of.pool.num_free == of.pool.num_blocks


def test_a_received_request_computes_no_prompt_and_decodes_after_its_kv() -> None:
    of = scheduler()
    request = add(of, "a", num_prompt=6, max_tokens=3, route=Route.RECEIVE)
    assert step(of) == []
    assert request.phase is Phase.RECEIVING
    (event,) = of.kv_received("a", 33, 1.0).sampled
    assert (event.index, event.token_id, event.finish_reason) == (0, 33, None)
    assert step(of) == [("a", 6, 1, True)]
    assert step(of) == [("a", 7, 1, True)]
    assert request.output == [33, NEVER_EOS, NEVER_EOS]
    assert ended(request)


def test_a_received_first_token_may_be_the_last() -> None:
    of = scheduler()
    request = add(of, "a", route=Route.RECEIVE)
    of.admit(0.0)
    (event,) = of.kv_received("a", EOS, 1.0).sampled
    assert event.finish_reason is FinishReason.STOP
    assert request.phase is Phase.FINISHED
    assert of.pool.num_free == of.pool.num_blocks


def test_kv_is_taken_only_by_a_request_that_waits_for_it() -> None:
    of = scheduler()
    add(of, "waiting", route=Route.RECEIVE)
    with pytest.raises(AssertionError, match="does not wait for KV"):
        of.kv_received("waiting", 5, 0.0)
    add(of, "local")
    of.admit(0.0)
    of.kv_received("waiting", 5, 0.0)
    for name in ("waiting", "local"):
        with pytest.raises(AssertionError, match="does not wait for KV"):
            of.kv_received(name, 5, 0.0)


@pytest.mark.parametrize(
    ("sampling", "tokens", "reason"),
    [
        (params(4), [9, EOS], FinishReason.STOP),
        (params(4, ignore_eos=True), [9, EOS, EOS, EOS], FinishReason.LENGTH),
        (params(4, stop_token_ids=frozenset({7})), [9, 9, 7], FinishReason.STOP),
        (params(4, stop_token_ids=frozenset({EOS}), ignore_eos=True), [EOS], FinishReason.STOP),
        (params(4), [9, 9, 9, 9], FinishReason.LENGTH),
        (params(1), [9], FinishReason.LENGTH),
        (params(2), [9, EOS], FinishReason.STOP),
        (params(4, min_tokens=2), [EOS, EOS], FinishReason.STOP),
        (params(2, min_tokens=2, stop_token_ids=frozenset({7})), [7, 9], FinishReason.LENGTH),
    ],
)
def test_finish_reasons(sampling: SamplingParams, tokens: list[int], reason: FinishReason) -> None:
    of = scheduler()
    request = of.add(new_request("a", [1, 2, 3], sampling), 0.0)
    of.admit(0.0)
    for index, token in enumerate(tokens):
        of.make_room(0.0)
        (event,) = of.commit(of.schedule(0.0), output(token), 0.0).sampled
        last = index == len(tokens) - 1
        assert (event.index, event.token_id) == (index, token)
        assert event.finish_reason is (reason if last else None)
    assert request.output == tokens
    assert request.finish_reason is reason
    assert request.phase is Phase.FINISHED
    assert not of.schedule(0.0)


@pytest.mark.parametrize("tokens", [[], [1, 1]])
def test_commit_takes_one_token_for_each_slice_that_samples(tokens: list[int]) -> None:
    of = scheduler()
    add(of, "a")
    of.admit(0.0)
    with pytest.raises(AssertionError, match=f"{len(tokens)} tokens for 1 slices"):
        of.commit(of.schedule(0.0), output(*tokens), 0.0)


REFUSALS: dict[str, tuple[Callable[[Scheduler], object], type[Exception], str]] = {
    "empty prompt": (lambda of: add(of, "b", num_prompt=0), InvalidArgumentError, "prompt: is empty"),
    "duplicate id": (lambda of: add(of, "a"), InvalidArgumentError, "request_id: 'a' is already running"),
    "context": (
        lambda of: add(of, "b", num_prompt=30, max_tokens=11),
        InvalidArgumentError,
        "prompt: 30 tokens and max_tokens 11 exceed the context of 40",
    ),
    "pool": (
        lambda of: add(of, "b", num_prompt=30, max_tokens=4),
        OverloadedError,
        "prompt and max_tokens: 33 tokens need 9 KV blocks, the whole pool has 8",
    ),
    "queue": (
        lambda of: [add(of, name) for name in ("b", "c")],
        OverloadedError,
        "2 requests are waiting already",
    ),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_a_refused_request_leaves_nothing_behind(case: str) -> None:
    act, kind, message = REFUSALS[case]
    of = scheduler(num_blocks=8, waiting=2, model_len=40)
    add(of, "a")
    with pytest.raises(kind, match=message):
        act(of)
    assert of.counts().waiting == (2 if case == "queue" else 1)
    of.check_integrity()


def test_what_just_fits_the_context_and_the_pool_is_taken() -> None:
    of = scheduler(num_blocks=10, model_len=41)
    request = add(of, "a", num_prompt=30, max_tokens=11)
    while not ended(request):
        assert step(of)
    assert len(request.output) == 11


def test_an_id_can_be_used_again_after_its_request_has_ended() -> None:
    of = scheduler()
    add(of, "a")
    of.remove("a", 0.0)
    assert add(of, "a").phase is Phase.WAITING


def test_removing_nobody_is_no_error() -> None:
    assert scheduler().remove("nobody", 0.0) is None


def test_milestones_of_a_local_request() -> None:
    of = scheduler(prefill=2)
    request = add(of, "a", num_prompt=3, max_tokens=3, now=1.0)
    for now in (2.0, 3.0, 4.0, 5.0):
        step(of, now=now)
    at = request.milestones
    assert (at.arrived, at.admitted, at.prefill_started, at.prefill_ended) == (1.0, 2.0, 2.0, 3.0)
    assert (at.kv_ready, at.decode_started, at.finished) == (None, 4.0, 5.0)


def test_milestones_of_the_two_legs() -> None:
    of = scheduler()
    sent = add(of, "sent", route=Route.HAND_OFF, now=1.0)
    received = add(of, "received", route=Route.RECEIVE, max_tokens=2, now=1.0)
    step(of, now=2.0)
    of.kv_received("received", NEVER_EOS, 3.0)
    of.remove("sent", 4.0)
    step(of, now=5.0)
    assert (sent.milestones.prefill_ended, sent.milestones.finished) == (2.0, 4.0)
    assert sent.milestones.decode_started is None
    assert (received.milestones.prefill_started, received.milestones.prefill_ended) == (None, None)
    assert (received.milestones.kv_ready, received.milestones.decode_started) == (3.0, 5.0)
    assert received.milestones.finished == 5.0


def test_counts_are_by_phase() -> None:
    of = scheduler(num_blocks=8, prefill=4)
    add(of, "received", route=Route.RECEIVE)
    add(of, "sent", num_prompt=2, route=Route.HAND_OFF)
    add(of, "local", num_prompt=2)
    step(of)
    add(of, "long", num_prompt=8)
    add(of, "too large now", num_prompt=20)
    of.admit(0.0)
    assert of.counts() == Counts(waiting=1, receiving=1, prefilling=1, handing_off=1, decoding=1)


@pytest.mark.parametrize("phase", list(Phase))
def test_only_the_transitions_of_the_life_cycle_exist(phase: Phase) -> None:
    of = scheduler()
    for target in Phase:
        request = add(of, f"{phase.value} to {target.value}")
        of.remove(request.request_id, 0.0)
        request.phase = phase
        if target in TRANSITIONS[phase]:
            request.move_to(target)
            assert request.phase is target
        else:
            with pytest.raises(AssertionError, match="cannot become"):
                request.move_to(target)
