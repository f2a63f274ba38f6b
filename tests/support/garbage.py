"""Requests that no client in its right mind would send, for `hypothesis`: every field has garbage of its own."""

import json
import string
from typing import Any

from hypothesis import strategies as st

from kvbaton.grammar.json_schema import SUPPORTED
from kvbaton.v1 import inference_pb2 as pb
from kvbaton.v1 import types_pb2 as types

VOCABULARY = 1059
"""Of the bundled model."""

FLOATS = st.floats(width=32) | st.sampled_from([1e-45, -0.0, 3e38, float("inf"), float("nan")])
UINTS = st.sampled_from([0, 1, 20, 21, 128, 129, 2048, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1)
IDS = st.one_of(
    st.lists(st.integers(0, VOCABULARY) | UINTS, max_size=8),
    st.sampled_from([[*range(1024)], [*range(VOCABULARY)], [5] * 500_000]),
)
TEXTS = st.text(max_size=12) | st.sampled_from(["", "\0", "é" * 129, "🎉" * 257, "x" * 2**20])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2000) | FLOATS | st.sampled_from(["string", "#", "a{9}{9}{9}", "date"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*sorted(SUPPORTED), "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)
SCHEMAS = JSON.map(json.dumps) | st.sampled_from(
    [
        "{",
        "x" * 2**20,
        '{"$ref": "#"}',
        "[" * 50_000,
        '{"items":' * 5000,
        '{"anyOf":[' * 900 + "{}" + "]}" * 900,
    ]
)
REGEXES = st.text("ab(){}[]|*+?^$.\\d10,", max_size=24) | st.sampled_from(
    ["(a{1000}){1000}", "(" * 4000, "(a|b|ab)*c" * 400, r"(\w{1,500}){1,500}", "(?i)" + "é" * 4000, ".{4000}" * 100]
)
GRAMMARS = st.text(string.printable, max_size=40) | st.sampled_from(
    [
        'start: start start | "a"',
        "start: a\na: start",
        "start: /(/",
        'start: "a"{1,100000}',
        "start: " + "(" * 5000,
        'start: a a a a a a\na: b b b b b b\nb: "x"* "x"* "x"*',
        "%llguidance {}\nstart: x",
        "start: %json {}",
        "\n".join(["start: r0", *(f"r{n}: r{n + 1} r{n + 1}" for n in range(400)), 'r400: "a"']),
    ]
)
FORMS = st.one_of(
    st.builds(types.StructuredOutput, json_schema=SCHEMAS),
    st.builds(types.StructuredOutput, json_object=st.booleans()),
    st.builds(types.StructuredOutput, regex=REGEXES),
    st.builds(types.StructuredOutput, grammar=GRAMMARS),
    st.lists(TEXTS, max_size=5).map(lambda texts: types.StructuredOutput(choice=types.Choices(texts=texts))),
    st.sampled_from([types.StructuredOutput(), types.StructuredOutput(choice=types.Choices(texts=["x"] * 100_000))]),
)

MESSAGES = st.builds(pb.ChatMessage, role=st.sampled_from(["user", "system", "", "x" * 2**20]), content=TEXTS)
PROMPTS = st.one_of(
    st.builds(pb.Prompt, text=TEXTS),
    st.binary(max_size=20).map(lambda data: pb.Prompt(tokens=pb.TokenPrompt(token_ids=data))),
    st.lists(MESSAGES, max_size=4).map(lambda messages: pb.Prompt(chat=pb.ChatPrompt(messages=messages))),
    st.sampled_from([pb.Prompt(), pb.Prompt(chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="user")] * 500_000))]),
)

SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("temperature", "top_p", "min_p"), FLOATS),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "repetition_penalty"), FLOATS),
    **dict.fromkeys(("top_k", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "n"), UINTS),
    **dict.fromkeys(("stop_token_ids", "allowed_token_ids", "banned_token_ids"), IDS),
    **dict.fromkeys(("ignore_eos", "include_stop_in_output"), st.booleans()),
    "seed": st.integers(0, 2**64 - 1),
    "logit_bias": st.dictionaries(st.integers(0, VOCABULARY) | UINTS, FLOATS, max_size=5)
    | st.just(dict.fromkeys(range(90_000), 1.0)),
    "stop": st.lists(TEXTS, max_size=18) | st.just(["x"] * 10_000),
    "structured_output": FORMS,
}
"""By the field of SamplingParams."""

REQUEST: dict[str, st.SearchStrategy[Any]] = {
    "model": TEXTS,
    "prompt": PROMPTS,
    "request_id": TEXTS,
    "priority": st.integers(-(2**31), 2**31 - 1),
    "cache_salt": TEXTS,
}
"""By the field of GenerateRequest, SamplingParams left out."""


@st.composite
def requests(draw: st.DrawFn) -> pb.GenerateRequest:
    """A request that would be right but for garbage in one to three fields."""
    request = pb.GenerateRequest(prompt=pb.Prompt(text="The red lamp"), sampling=types.SamplingParams(max_tokens=4))
    for name in draw(st.lists(st.sampled_from([*SAMPLING, *REQUEST]), min_size=1, max_size=3, unique=True)):
        if name in SAMPLING:
            value = draw(SAMPLING[name], label=name)
            request.sampling.ClearField(name)
            request.sampling.MergeFrom(types.SamplingParams(**{name: value}))
        else:
            request.ClearField(name)
            request.MergeFrom(pb.GenerateRequest(**{name: draw(REQUEST[name], label=name)}))
    return request


@st.composite
def torn_requests(draw: st.DrawFn) -> bytes:
    """The bytes of a request, some of them changed, and sometimes without their end."""
    whole = bytearray(draw(requests().filter(lambda request: request.ByteSize() < 1000)).SerializeToString())
    for _ in range(draw(st.integers(1, 4))):
        whole[draw(st.integers(0, len(whole) - 1))] = draw(st.integers(0, 255))
    return bytes(whole[: draw(st.integers(0, 2 * len(whole)))])
