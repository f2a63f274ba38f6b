"""Everything that can be wrong with a client's request is found before a worker is asked, by the field's name."""

import math
from typing import Any

import pytest

from kvbaton.engine.errors import InvalidArgumentError
from kvbaton.engine.sampling import MAX_SEED, MAX_STOP_TOKEN_IDS
from kvbaton.engine.tokens import pack_token_ids
from kvbaton.router.admission import (
    AdmittedRequest,
    admit,
    check_model,
    check_prompt,
    check_prompt_size,
    prompt_token_ids,
)
from kvbaton.text.tokenizer import Tokenizer
from kvbaton.v1 import inference_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from support.fakes import model_info

MODEL = model_info(vocab_size=100, max_model_len=64)


class FakeTokenizer(Tokenizer):
    """One token a character; a conversation is its messages in a row."""

    def __init__(self) -> None:
        """Needs no vocabulary."""

    def max_chars(self, num_tokens: int) -> int:
        return num_tokens

    def encode(self, text: str) -> list[int]:
        return [len(text)] * len(text)

    def encode_chat(self, messages: Any) -> list[int]:
        return self.encode("".join(f"{m['role']}:{m['content']};" for m in messages))


def ask(prompt: list[int] | None = None, request_id: str = "", **sampling: Any) -> AdmittedRequest:
    request = pb.GenerateRequest(request_id=request_id, sampling=types.SamplingParams(**sampling))
    return admit(request, [5] * 10 if prompt is None else prompt, MODEL, FakeTokenizer(), default_max_tokens=20)


def test_defaults_are_filled_in() -> None:
    admitted = ask()
    assert admitted.prompt == [5] * 10
    assert admitted.sampling.max_tokens == 20
    assert admitted.sampling.is_greedy
    assert (admitted.sampling.top_k, admitted.sampling.top_p) == (0, 1.0)
    other = ask()
    assert other.sampling.seed != admitted.sampling.seed
    assert other.request_id != admitted.request_id
    assert other.request_id.startswith("req-")


def test_what_was_given_is_kept() -> None:
    admitted = ask(
        request_id="mine", max_tokens=3, seed=0, temperature=0.5, top_k=7, top_p=0.25, stop_token_ids=[9, 9, 99]
    )
    sampling = admitted.sampling
    assert admitted.request_id == "mine"
    assert (sampling.max_tokens, sampling.seed, sampling.temperature) == (3, 0, 0.5)
    assert (sampling.top_k, sampling.top_p) == (7, 0.25)
    assert sorted(sampling.stop_token_ids) == [9, 99]
    assert ask(seed=MAX_SEED).sampling.seed == MAX_SEED


def test_the_context_bounds_the_default_and_may_be_used_up() -> None:
    assert ask([5] * 60).sampling.max_tokens == 4
    assert ask([5] * 60, max_tokens=4).sampling.max_tokens == 4
    assert ask([5] * 63).sampling.max_tokens == 1


@pytest.mark.parametrize(
    ("sampling", "field", "problem"),
    [
        ({"temperature": -0.5}, "temperature", "-0.5 is not between 0 and 100"),
        ({"temperature": 101}, "temperature", "101"),
        ({"temperature": math.nan}, "temperature", "nan"),
        ({"temperature": math.inf}, "temperature", "inf"),
        ({"temperature": -math.inf}, "temperature", "inf"),
        ({"top_p": 0}, "top_p", "is not above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p", "1.5"),
        ({"top_p": -0.1}, "top_p", "-0.1"),
        ({"top_p": math.nan}, "top_p", "nan"),
        ({"top_k": 0}, "top_k", "0 is not 1 or more"),
        ({"max_tokens": 0}, "max_tokens", "0 is not 1 or more"),
        ({"max_tokens": 55}, "max_tokens", "55 and 10 prompt tokens exceed 64"),
        ({"max_tokens": 2**32 - 1}, "max_tokens", "exceed 64"),
        ({"stop_token_ids": [5, 100]}, "stop_token_ids", "100 is not below 100"),
    ],
)
def test_sampling_out_of_its_range_is_refused_by_the_field(sampling: dict[str, Any], field: str, problem: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{field}: .*{problem}") as caught:
        ask(**sampling)
    assert caught.value.field == field


def test_n_priority_and_salt_have_defaults_and_are_kept() -> None:
    admitted = ask()
    assert (admitted.n, admitted.priority, admitted.cache_salt) == (1, 0, "")
    request = pb.GenerateRequest(sampling=types.SamplingParams(n=128), priority=-7, cache_salt="tenant 1")
    admitted = admit(request, [5], MODEL, None, 20)
    assert (admitted.n, admitted.priority, admitted.cache_salt) == (128, -7, "tenant 1")


@pytest.mark.parametrize("n", [0, 129, 2**32 - 1])
def test_n_is_bounded(n: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^n: {n} is not between 1 and 128"):
        ask(n=n)


@pytest.mark.parametrize("salt", ["x" * 129, "new\nline", "\x00"])
def test_a_salt_is_short_and_printable(salt: str) -> None:
    with pytest.raises(InvalidArgumentError, match="^cache_salt: must be at most 128 printable characters"):
        admit(pb.GenerateRequest(cache_salt=salt), [5], MODEL, None, 20)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop_token_ids", [5, 100]),
        ("logit_bias", {99: 1.0, 100: 1.0}),
        ("allowed_token_ids", [0, 2**32 - 1]),
        ("banned_token_ids", [100]),
    ],
)
def test_token_ids_are_the_models(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"\d+ is not below 100") as caught:
        ask(**{field: value})
    assert caught.value.field.partition("[")[0] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [("stop", ["end"]), ("structured_output", types.StructuredOutput(json_object=True))],
)
def test_what_needs_text_needs_a_tokenizer(field: str, value: Any) -> None:
    request = pb.GenerateRequest(sampling=types.SamplingParams(**{field: value}))
    with pytest.raises(InvalidArgumentError, match="the model has no tokenizer") as caught:
        admit(request, [5], MODEL, None, 20)
    assert caught.value.field == field
    admit(request, [5], MODEL, FakeTokenizer(), 20)


def test_too_many_stop_tokens_are_refused() -> None:
    request = pb.GenerateRequest(sampling=types.SamplingParams(stop_token_ids=range(MAX_STOP_TOKEN_IDS + 1)))
    with pytest.raises(InvalidArgumentError, match="stop_token_ids: 129 ids are more than 128"):
        admit(request, [5], model_info(vocab_size=1000), None, 20)


@pytest.mark.parametrize(
    ("prompt", "field", "problem"),
    [
        ([], "prompt", "is empty"),
        ([5] * 64, "prompt", "64 tokens leave no room in the model's context of 64"),
        ([5] * 200, "prompt", "200 tokens"),
        ([5, 100, 7], "prompt.tokens", "token id 100 is not below 100"),
        ([2**32 - 1], "prompt.tokens", "token id 4294967295"),
    ],
)
def test_a_prompt_that_the_model_cannot_take_is_refused(prompt: list[int], field: str, problem: str) -> None:
    with pytest.raises(InvalidArgumentError, match=problem) as caught:
        ask(prompt)
    assert caught.value.field == field


@pytest.mark.parametrize("request_id", ["x" * 129, "new\nline", "tab\t", "\x00", "\u202e"])
def test_a_request_id_that_would_spoil_a_log_is_refused(request_id: str) -> None:
    with pytest.raises(InvalidArgumentError, match="at most 128 printable characters") as caught:
        ask(request_id=request_id)
    assert caught.value.field == "request_id"


@pytest.mark.parametrize("request_id", ["x" * 128, "с пробелами и ünïcode"])
def test_a_readable_request_id_is_kept(request_id: str) -> None:
    assert ask(request_id=request_id).request_id == request_id


def test_a_model_is_named_or_left_out() -> None:
    check_model("", MODEL)
    check_model("fake", MODEL)
    with pytest.raises(InvalidArgumentError, match="model: 'other' is not served here; 'fake' is"):
        check_model("other", MODEL)


def test_the_last_token_of_the_vocabulary_is_one() -> None:
    check_prompt([0, 99], MODEL)


def chat(*messages: tuple[str, str]) -> pb.Prompt:
    return pb.Prompt(chat=pb.ChatPrompt(messages=[pb.ChatMessage(role=r, content=c) for r, c in messages]))


def test_every_kind_of_prompt_becomes_tokens() -> None:
    tokenizer = FakeTokenizer()
    tokens = pb.Prompt(tokens=pb.TokenPrompt(token_ids=pack_token_ids([3, 2**32 - 1])))
    assert prompt_token_ids(tokens, None) == [3, 2**32 - 1]
    assert prompt_token_ids(pb.Prompt(text="abc"), tokenizer) == [3, 3, 3]
    assert len(prompt_token_ids(chat(("system", "s"), ("user", "hi"), ("assistant", "")), tokenizer)) == 28


@pytest.mark.parametrize(
    ("prompt", "field", "problem"),
    [
        (pb.Prompt(), "prompt", "is missing: set text, tokens or chat"),
        (pb.Prompt(text=""), "prompt.text", "is empty"),
        (pb.Prompt(tokens=pb.TokenPrompt(token_ids=b"abc")), "prompt.tokens", "3 bytes are not whole"),
        (chat(), "prompt.chat.messages", "is empty"),
        (chat(("user", "a"), ("robot", "b")), "prompt.chat.messages[1].role", "'robot' is not one of system, user"),
        (chat(("", "a")), "prompt.chat.messages[0].role", "'' is not one of"),
    ],
)
def test_a_prompt_of_no_good_form_is_refused(prompt: pb.Prompt, field: str, problem: str) -> None:
    with pytest.raises(InvalidArgumentError, match=problem) as caught:
        prompt_token_ids(prompt, FakeTokenizer())
    assert caught.value.field == field


def test_an_empty_token_prompt_is_refused_as_an_empty_prompt() -> None:
    assert prompt_token_ids(pb.Prompt(tokens=pb.TokenPrompt()), None) == []
    with pytest.raises(InvalidArgumentError, match="prompt: is empty"):
        check_prompt([], MODEL)


@pytest.mark.parametrize(
    ("prompt", "field"), [(pb.Prompt(text="a"), "prompt.text"), (chat(("user", "a")), "prompt.chat")]
)
def test_a_model_without_a_tokenizer_takes_tokens_only(prompt: pb.Prompt, field: str) -> None:
    with pytest.raises(InvalidArgumentError, match="no tokenizer; send token ids") as caught:
        prompt_token_ids(prompt, None)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "prompt",
    [
        pb.Prompt(text="a" * 65),
        pb.Prompt(tokens=pb.TokenPrompt(token_ids=bytes(4 * 65))),
        chat(("user", "a" * 40), ("assistant", "a" * 25)),
    ],
)
def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(prompt: pb.Prompt) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^prompt: 65 \w+ exceed the model's context of 64 tokens"):
        check_prompt_size(prompt, FakeTokenizer(), 64)


@pytest.mark.parametrize("tokenizer", [FakeTokenizer(), None])
def test_more_messages_than_the_context_has_tokens_are_refused(tokenizer: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^prompt\.chat\.messages: 65 messages exceed"):
        check_prompt_size(chat(*[("user", "")] * 65), tokenizer, 64)


@pytest.mark.parametrize("prompt", [pb.Prompt(), pb.Prompt(text="a" * 64), chat(("user", "a" * 64))])
def test_a_prompt_that_may_fit_is_left_to_the_tokenizer(prompt: pb.Prompt) -> None:
    check_prompt_size(prompt, FakeTokenizer(), 64)
    check_prompt_size(prompt, None, 64)
