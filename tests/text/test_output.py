"""An answer's text ends at its stop string, shows no half of one, and is the same however the tokens came."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbaton.engine.sampling import FinishReason, SamplingParams
from kvbaton.text.detokenizer import IncrementalDetokenizer
from kvbaton.text.output import OutputText, TextUpdate
from kvbaton.text.tokenizer import Tokenizer

VOCAB = 340
LENGTH, STOP = FinishReason.LENGTH, FinishReason.STOP
PLAIN = SamplingParams(max_tokens=100, seed=0)

TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=30)
"""Anything a model may sample, special tokens too."""
WORDS = st.lists(st.sampled_from(["the", " ba", "ton", "é", "接", "力", "🎉", " ", "\n", "a", "b"]), max_size=12)
STOPS = st.lists(st.text(alphabet="thea bonéb接🎉\n", min_size=1, max_size=5), max_size=4)

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    return replace(
        PLAIN,
        stop=tuple(draw(STOPS)),
        include_stop_in_output=draw(st.booleans()),
        min_tokens=draw(st.sampled_from([0, 0, 1, 3, 8])),
    )


def with_stop(*stop: str, include: bool = False, min_tokens: int = 0) -> SamplingParams:
    return replace(PLAIN, stop=stop, include_stop_in_output=include, min_tokens=min_tokens)


def by_token(output: OutputText, tokens: list[int]) -> list[TextUpdate]:
    return [output.push([token], LENGTH if at == len(tokens) - 1 else None) for at, token in enumerate(tokens)]


def expected(tokenizer: Tokenizer, prompt: list[int], tokens: list[int], sampling: SamplingParams) -> TextUpdate:
    """By looking through the whole text after each token."""
    detokenizer, text, passed = IncrementalDetokenizer(tokenizer, prompt), "", 0
    for count, token in enumerate(tokens, 1):
        text += detokenizer.push([token]) + (detokenizer.flush() if count == len(tokens) else "")
        for end in range(passed + 1, len(text) + 1) if count > sampling.min_tokens else ():
            ended = [stop for stop in sampling.stop if text[:end].endswith(stop)]
            if ended:
                stop = max(ended, key=len)
                return TextUpdate(text[: end if sampling.include_stop_in_output else end - len(stop)], count, stop)
        passed = len(text)
    return TextUpdate(text, len(tokens), None)


@pytest.mark.parametrize(
    ("sampling", "text", "stop"),
    [
        (with_stop("ba"), "go the ", "ba"),
        (with_stop("ba", include=True), "go the ba", "ba"),
        (with_stop("e ba"), "go th", "e ba"),
        (with_stop("batons", "baton s"), "go the baton", None),
        (with_stop("n", "e"), "go th", "e"),
    ],
)
def test_a_stop_string_ends_the_text(tokenizer: Tokenizer, sampling: SamplingParams, text: str, stop: str) -> None:
    tokens = tokenizer.encode("go the baton")
    updates = by_token(OutputText(tokenizer, tokenizer.encode("Say:"), [], sampling), tokens)
    assert "".join(update.text for update in updates) == text
    assert updates[-1].stop == stop


def test_what_may_be_a_stop_string_is_held_back_and_released(tokenizer: Tokenizer) -> None:
    output = OutputText(tokenizer, [], [], with_stop("the end"))
    assert output.push(tokenizer.encode("in the ")).text == "in "
    assert output.push(tokenizer.encode("th")).text == "the "
    assert output.push(tokenizer.encode("is")).text == "this"
    assert output.push(tokenizer.encode(" the e"), LENGTH).text == " the e"


def test_a_stop_string_that_is_shown_is_not_held_back(tokenizer: Tokenizer) -> None:
    output = OutputText(tokenizer, [], [], with_stop("the end", include=True))
    assert output.push(tokenizer.encode("in the ")).text == "in the "
    assert output.push(tokenizer.encode("ends")) == TextUpdate("end", len(tokenizer.encode("end")), "the end")


def test_a_stop_string_of_several_bytes_a_character(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a🎉b👩‍👦c")
    updates = by_token(OutputText(tokenizer, [], [], with_stop("👩‍👦")), tokens)
    assert "".join(update.text for update in updates) == "a🎉b"
    assert sum(update.num_tokens for update in updates) == len(tokenizer.encode("a🎉b👩‍👦"))


def test_tokens_beyond_the_stop_string_are_not_part_of_the_answer(tokenizer: Tokenizer) -> None:
    output = OutputText(tokenizer, [], [], with_stop("a"))
    used = len(tokenizer.encode("the ba"))
    tokens = [*tokenizer.encode("the ba"), *tokenizer.encode(" line"), *tokenizer.encode("!")]
    assert output.push(tokens, LENGTH) == TextUpdate("the b", used, "a")
    assert output.push(tokens, LENGTH) == TextUpdate("", 0, "a")


def test_a_stop_string_before_min_tokens_does_not_count(tokenizer: Tokenizer) -> None:
    once = tokenizer.encode("é")
    output = OutputText(tokenizer, [], [], with_stop("é", min_tokens=2 * len(once)))
    assert output.push(once + once) == TextUpdate("éé", 2 * len(once), None)
    assert output.push(once) == TextUpdate("", len(once), "é")


def test_the_prompt_s_end_is_no_part_of_a_stop_string(tokenizer: Tokenizer) -> None:
    output = OutputText(tokenizer, tokenizer.encode("the e"), [], with_stop("end"))
    assert output.push(tokenizer.encode("nd"), LENGTH).text == "nd"


@pytest.mark.parametrize("include", [False, True])
def test_a_token_that_ends_the_answer_is_shown_where_stop_strings_are(tokenizer: Tokenizer, include: bool) -> None:
    *_, last = tokens = tokenizer.encode("the baton")
    text = tokenizer.decode([last])
    assert text
    # Its text is no stop string either, unless it is shown.
    for stop in ((), (text,)):
        output = OutputText(tokenizer, [], [], with_stop(*stop, include=include))
        update = output.push(tokens, STOP)
        assert update.text == ("the baton" if include else "the baton".removesuffix(text))
        assert (update.num_tokens, update.stop) == (len(tokens), text if include and stop else None)


def test_a_token_that_ends_the_answer_releases_what_was_held_back(tokenizer: Tokenizer) -> None:
    output = OutputText(tokenizer, [], [], with_stop("the end"))
    assert output.push(tokenizer.encode("the e")).text == ""
    assert output.push([tokenizer.encode("n")[0]], STOP) == TextUpdate("the e", 1, None)


def test_without_a_tokenizer_there_is_no_text() -> None:
    output = OutputText(None, [1, 2], [3], with_stop("a"))
    assert output.push([4, 5], LENGTH) == TextUpdate("", 2, None)


@quick
@given(prompt=WORDS, words=WORDS, sampling=sampling_params(), data=st.data())
def test_any_cutting_into_pushes_gives_the_text_up_to_the_first_stop_string(
    tokenizer: Tokenizer, prompt: list[str], words: list[str], sampling: SamplingParams, data: st.DataObject
) -> None:
    prompt_ids = tokenizer.encode("".join(prompt))
    # Word by word, so that stop strings lie across tokens in many ways; and byte tokens that may be no text at all.
    tokens = [token for word in words for token in tokenizer.encode(word)] + data.draw(TOKENS)
    output, text, count, stop = OutputText(tokenizer, prompt_ids, [], sampling), "", 0, None
    start = 0
    while start < len(tokens):
        end = start + data.draw(st.integers(1, 6))
        update = output.push(tokens[start:end], LENGTH if end >= len(tokens) else None)
        text, count, stop, start = text + update.text, count + update.num_tokens, update.stop, end
    assert TextUpdate(text, count, stop) == expected(tokenizer, prompt_ids, tokens, sampling)


@quick
@given(prompt=WORDS, words=WORDS, sampling=sampling_params(), data=st.data())
def test_an_answer_that_is_taken_over_goes_on_as_it_would_have(
    tokenizer: Tokenizer, prompt: list[str], words: list[str], sampling: SamplingParams, data: st.DataObject
) -> None:
    prompt_ids = tokenizer.encode("".join(prompt))
    tokens = [token for word in words for token in tokenizer.encode(word)] + data.draw(TOKENS)
    unbroken = by_token(OutputText(tokenizer, prompt_ids, [], sampling), tokens)
    cut = data.draw(st.integers(0, max(len(tokens) - 1, 0)))
    resumed = OutputText(tokenizer, prompt_ids, tokens[:cut], sampling)
    assert by_token(resumed, tokens[cut:]) == unbroken[cut:]
