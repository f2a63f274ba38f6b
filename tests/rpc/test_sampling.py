"""Sampling parameters and logprobs on the wire: nothing is lost on the way, and what is wrong is named."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.engine.errors import InvalidArgumentError
from kvbaton.engine.output import TokenLogprobs
from kvbaton.engine.sampling import MAX_SEED, FinishReason, SamplingParams, StructuredOutput
from kvbaton.rpc.sampling import (
    FINISH_REASONS,
    complete_sampling_from_proto,
    logprobs_from_proto,
    logprobs_to_proto,
    sampling_from_proto,
    sampling_to_proto,
)
from kvbaton.v1 import types_pb2 as types

TOKEN_IDS = st.integers(0, 2**32 - 1)
ID_SETS = st.frozensets(TOKEN_IDS, max_size=8)
TEXTS = st.text(min_size=1, max_size=20)
FORMS = st.one_of(
    st.just(StructuredOutput("json_object")),
    st.builds(StructuredOutput, st.sampled_from(["json_schema", "regex", "grammar"]), TEXTS),
    st.builds(lambda texts: StructuredOutput("choice", choices=tuple(texts)), st.lists(TEXTS, min_size=1, max_size=4)),
)


def floats(low: float, high: float, **more: Any) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32, **more)


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    form = draw(st.none() | FORMS)
    return SamplingParams(
        max_tokens=draw(st.integers(100, 2**32 - 1)),
        seed=draw(st.integers(0, MAX_SEED)),
        temperature=draw(floats(0, 100)),
        top_k=draw(TOKEN_IDS),
        top_p=draw(floats(0, 1, exclude_min=True)),
        min_p=draw(floats(0, 1)),
        presence_penalty=draw(floats(-2, 2)),
        frequency_penalty=draw(floats(-2, 2)),
        repetition_penalty=draw(floats(0, 10, exclude_min=True)),
        logit_bias=draw(st.dictionaries(TOKEN_IDS, floats(-100, 100), max_size=8)),
        allowed_token_ids=draw(ID_SETS),
        banned_token_ids=draw(ID_SETS),
        min_tokens=draw(st.integers(0, 100)) if form is None else 0,
        stop_token_ids=draw(ID_SETS),
        ignore_eos=draw(st.booleans()) if form is None else False,
        stop=tuple(draw(st.lists(TEXTS, max_size=16))),
        include_stop_in_output=draw(st.booleans()),
        logprobs=draw(st.none() | st.integers(0, 20)),
        prompt_logprobs=draw(st.none() | st.integers(0, 20)),
        structured_output=form,
    )


@given(sampling_params())
def test_parameters_go_there_and_back(params: SamplingParams) -> None:
    sent = types.SamplingParams.FromString(sampling_to_proto(params).SerializeToString())
    assert complete_sampling_from_proto(sent) == params


def test_every_field_but_n_is_sent() -> None:
    params = SamplingParams(
        max_tokens=1,
        seed=1,
        top_k=1,
        logit_bias={1: 1.0},
        allowed_token_ids=frozenset({1}),
        banned_token_ids=frozenset({2}),
        stop_token_ids=frozenset({1}),
        ignore_eos=True,
        stop=("x",),
        include_stop_in_output=True,
        logprobs=0,
        prompt_logprobs=0,
    )
    sent = {field.name for field, _ in sampling_to_proto(params).ListFields()}
    assert sent == {field.name for field in types.SamplingParams.DESCRIPTOR.fields} - {"n", "structured_output"}


def test_what_is_left_out_has_its_default() -> None:
    assert sampling_from_proto(types.SamplingParams(), max_tokens=7, seed=9) == SamplingParams(max_tokens=7, seed=9)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {17: 101}}, "logit_bias[17]"),
        ({"logit_bias": dict.fromkeys(range(10_000), 1)}, "logit_bias"),
        ({"stop": ["a", "b", "c", ""]}, "stop[3]"),
        ({"stop": ["x"] * 10_000}, "stop"),
        # A set of one, but the list is what was sent.
        ({"stop_token_ids": [5] * 10_000}, "stop_token_ids"),
        ({"allowed_token_ids": [5] * 10_000}, "allowed_token_ids"),
        ({"banned_token_ids": range(10_000)}, "banned_token_ids"),
        ({"structured_output": {}}, "structured_output"),
        ({"structured_output": {"json_object": False}}, "structured_output.json_object"),
        ({"structured_output": {"json_schema": ""}}, "structured_output.json_schema"),
        ({"structured_output": {"json_schema": " " * (1 << 20)}}, "structured_output.json_schema"),
        ({"structured_output": {"choice": {}}}, "structured_output.choice.texts"),
        ({"structured_output": {"choice": {"texts": ["a", ""]}}}, "structured_output.choice.texts[1]"),
    ],
)
def test_a_wrong_value_is_named_as_it_was_sent(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        sampling_from_proto(types.SamplingParams(**given), max_tokens=5, seed=0)
    assert caught.value.field == field
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("field", ["max_tokens", "seed"])
def test_a_worker_wants_everything_set(field: str) -> None:
    proto = types.SamplingParams(max_tokens=1, seed=0)
    proto.ClearField(field)
    with pytest.raises(InvalidArgumentError, match=f"{field}: is missing"):
        complete_sampling_from_proto(proto)


def test_a_worker_wants_no_n() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        complete_sampling_from_proto(types.SamplingParams(max_tokens=1, seed=0, n=1))
    assert caught.value.field == "n"


FLOATS = st.floats(width=32, allow_nan=False)


@given(
    st.builds(
        TokenLogprobs, TOKEN_IDS, FLOATS, st.integers(1, 2**32 - 1), st.lists(st.tuples(TOKEN_IDS, FLOATS)).map(tuple)
    )
)
def test_logprobs_go_there_and_back(logprobs: TokenLogprobs) -> None:
    sent = types.TokenLogprobs.FromString(logprobs_to_proto(logprobs).SerializeToString())
    assert logprobs_from_proto(sent) == logprobs


def test_logprobs_without_their_tokens_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="top_logprobs: 1 values for 2 ids"):
        logprobs_from_proto(types.TokenLogprobs(top_token_ids=[1, 2], top_logprobs=[0.5]))


def test_every_finish_reason_has_its_number() -> None:
    assert set(FINISH_REASONS) == {None, *FinishReason}
    assert sorted(FINISH_REASONS.values()) == sorted(types.FinishReason.values())
