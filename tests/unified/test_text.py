"""Forms, stop strings and logprobs, with a model that has a tokenizer: on one worker, handed over, resumed."""

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from kvbaton.text.bundled import DEFAULT_MODEL, resolve_model
from kvbaton.text.tokenizer import Tokenizer, load_tokenizer
from kvbaton.unified.config import UnifiedConfig
from kvbaton.unified.service import serve_unified
from kvbaton.v1 import types_pb2 as types
from support.cluster import assert_idle, serving_in_loop, worker_status
from support.legs import Answer, Ask, answer_locally, hand_over, refusal_of

STORY = "The red lamp is with Ann. The blue key is in the kitchen. Where is the blue key?"
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    loaded = load_tokenizer(resolve_model(DEFAULT_MODEL))
    assert loaded is not None
    return loaded


@pytest.fixture
async def pair() -> AsyncIterator[tuple[str, str]]:
    config = UnifiedConfig(port=0, dtype="float32", kv_memory="8MiB", grace_seconds=0.5)
    async with serving_in_loop(serve_unified, config) as first, serving_in_loop(serve_unified, config) as second:
        yield first.address, second.address
        await assert_idle(first.address, second.address)


def ask(tokenizer: Tokenizer, output: list[int] | None = None, **sampling: Any) -> Ask:
    prompt = tokenizer.encode_chat([{"role": "user", "content": STORY}])
    return Ask(prompt=prompt, output=output or [], sampling={"max_tokens": 40, "ignore_eos": False, **sampling})


async def answers(pair: tuple[str, str], tokenizer: Tokenizer, **sampling: Any) -> list[tuple[Answer, str]]:
    """Three ways to the same answer, each with its whole text."""
    whole = ask(tokenizer, **sampling)
    local, handed = await answer_locally(pair[0], whole), await hand_over(*pair, whole)
    half = len(local.token_ids) // 2
    resumed = await hand_over(*pair, ask(tokenizer, local.token_ids[:half], **sampling))
    assert local.token_ids == handed.token_ids == local.token_ids[:half] + resumed.token_ids
    assert local.text.endswith(resumed.text)
    return [(local, local.text), (handed, handed.text), (resumed, local.text)]


@pytest.mark.parametrize(
    ("form", "fits"),
    [
        ({"regex": "[a-c]{4} [0-9]{2}"}, lambda text: re.fullmatch("[a-c]{4} [0-9]{2}", text)),
        ({"choice": types.Choices(texts=["kitchen", "garden"])}, lambda text: text in ("kitchen", "garden")),
        ({"json_schema": json.dumps(SCHEMA)}, lambda text: isinstance(json.loads(text)["n"], int)),
    ],
    ids=["regex", "choice", "json schema"],
)
async def test_an_answer_has_the_form_that_was_asked_for(
    pair: tuple[str, str], tokenizer: Tokenizer, form: dict[str, Any], fits: Any
) -> None:
    for answer, text in await answers(pair, tokenizer, structured_output=types.StructuredOutput(**form)):
        assert answer.finish_reason == types.FINISH_REASON_STOP
        assert fits(text), text


@pytest.mark.parametrize("shown", [False, True])
async def test_a_stop_string_ends_it_anywhere(pair: tuple[str, str], tokenizer: Tokenizer, shown: bool) -> None:
    stop = "y is in the k"
    for answer, text in await answers(pair, tokenizer, stop=[stop], include_stop_in_output=shown):
        assert (answer.finish_reason, answer.stop) == (types.FINISH_REASON_STOP, stop)
        assert text == "The blue ke" + (stop if shown else "")
    status = await worker_status(pair[0])
    assert status.counters.requests_cancelled == 0


async def test_logprobs_are_the_same_on_every_way(pair: tuple[str, str], tokenizer: Tokenizer) -> None:
    (local, _), (handed, _), (resumed, _) = await answers(pair, tokenizer, logprobs=2, prompt_logprobs=1)
    for answer in (local, handed, resumed):
        assert [token.token_id for token in answer.logprobs] == answer.token_ids
        assert all(token.rank == 1 and len(token.top_token_ids) == 2 for token in answer.logprobs)
    for answer in (local, handed):
        assert [token.token_id for token in answer.prompt_logprobs] == list(ask(tokenizer).prompt[1:])
    assert resumed.prompt_logprobs == [], "they came with the first tokens"
    values = [token.logprob for token in local.logprobs]
    assert [token.logprob for token in handed.logprobs] == pytest.approx(values, abs=1e-4)


async def test_a_form_that_no_answer_can_have_is_refused_and_the_engine_never_hears_of_it(
    pair: tuple[str, str], tokenizer: Tokenizer
) -> None:
    forms: tuple[dict[str, Any], ...] = (
        {"regex": "(["},
        {"json_schema": "{"},
        {"grammar": "start: missing"},
        {"regex": "x" * (1 << 20)},
    )
    for form in forms:
        error = await refusal_of(pair[0], ask(tokenizer, structured_output=types.StructuredOutput(**form)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (error.details() or "").startswith(f"structured_output.{next(iter(form))}: ")
    assert (await worker_status(pair[0])).counters.num_steps == 0
