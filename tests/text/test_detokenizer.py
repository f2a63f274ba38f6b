"""Text comes token by token, never with half a character, and the same after a resume as without one."""

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbaton.text.detokenizer import IncrementalDetokenizer
from kvbaton.text.tokenizer import REPLACEMENT, Tokenizer

VOCAB = 340
NUM_SPECIAL = 2

TEXTS = st.text(alphabet="the baton é接バ🎉🏃🏽‍♀️.'\n" + REPLACEMENT, max_size=20)
TOKENS = st.lists(st.integers(NUM_SPECIAL, VOCAB - 1), max_size=40)
"""Anything a model may sample: most of it is no valid UTF-8."""

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def stream(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> list[str]:
    """The text of each push of one token, and of the flush."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)
    return [detokenizer.push([token]) for token in output] + [detokenizer.flush()]


@pytest.mark.parametrize("text", ["the baton", "don't he's , isn't ?", "café crème", "接力棒传", "👩‍👩‍👧‍👦🏃🏽‍♀️ 🎉"])
def test_pushes_are_the_whole_text_and_no_half_characters(tokenizer: Tokenizer, text: str) -> None:
    pieces = stream(tokenizer, tokenizer.encode("The "), tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert sum(piece != "" for piece in pieces) > 1


@quick
@given(prompt=TEXTS.filter(lambda text: not text.endswith(REPLACEMENT)), output=TOKENS, flags=st.data())
def test_pushes_and_flush_are_the_decoded_text_without_the_prompt_s(
    tokenizer: Tokenizer, prompt: str, output: list[int], flags: st.DataObject
) -> None:
    prompt_ids = tokenizer.encode(prompt)
    whole = tokenizer.decode(prompt_ids + output)
    assert whole.startswith(prompt)
    assert "".join(stream(tokenizer, prompt_ids, output)) == whole[len(prompt) :]
    # However many tokens an event carries.
    detokenizer, start, text = IncrementalDetokenizer(tokenizer, prompt_ids), 0, ""
    while start < len(output):
        stop = start + flags.draw(st.integers(1, 5))
        text += detokenizer.push(output[start:stop])
        start = stop
    assert text + detokenizer.flush() == whole[len(prompt) :]


@quick
@given(text=TEXTS.map(lambda text: text.replace(REPLACEMENT, "")))
def test_no_replacement_is_shown_for_a_character_that_is_still_coming(tokenizer: Tokenizer, text: str) -> None:
    # One token a byte: the longest that a character can take.
    prompt, output = tokenizer.encode("the "), [tokenizer.encode(c)[0] for c in "a"] + _bytes(tokenizer, text)
    pieces = stream(tokenizer, prompt, output)
    assert "".join(pieces) == "a" + text
    assert not any(REPLACEMENT in piece for piece in pieces)


def _bytes(tokenizer: Tokenizer, text: str) -> list[int]:
    """`text` as tokens of one byte each."""
    return [_byte_tokens(tokenizer)[byte] for byte in text.encode()]


_TABLE: dict[int, int] = {}


def _byte_tokens(tokenizer: Tokenizer) -> dict[int, int]:
    if not _TABLE:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        vocab = tokenizer._tokenizer.get_vocab()
        _TABLE.update({byte: vocab[character] for byte, character in bytes_to_unicode().items()})
    return _TABLE


@quick
@given(prompt=TOKENS, output=TOKENS, data=st.data())
def test_a_resume_continues_where_the_text_was(
    tokenizer: Tokenizer, prompt: list[int], output: list[int], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(output)))
    unbroken = stream(tokenizer, prompt, output)
    assert stream(tokenizer, prompt + output[:cut], output[cut:]) == unbroken[cut:]


@pytest.mark.parametrize("sent", [1, 2, 3])
def test_a_resume_in_the_middle_of_a_character_shows_it_once(tokenizer: Tokenizer, sent: int) -> None:
    prompt, output = tokenizer.encode("the baton "), _bytes(tokenizer, "🎉!")
    assert stream(tokenizer, prompt + output[:sent], output[sent:]) == [""] * (3 - sent) + ["🎉", "!", ""]


@quick
@given(broken=st.lists(st.integers(0x80, 0xFF), min_size=60, max_size=140), data=st.data())
def test_a_long_run_of_broken_bytes_is_resumed_too(
    tokenizer: Tokenizer, broken: list[int], data: st.DataObject
) -> None:
    prompt, output = tokenizer.encode("the "), [_byte_tokens(tokenizer)[byte] for byte in broken]
    cut = data.draw(st.integers(0, len(output)))
    unbroken = stream(tokenizer, prompt, output)
    assert "".join(unbroken) == tokenizer.decode(output)
    assert stream(tokenizer, prompt + output[:cut], output[cut:]) == unbroken[cut:]


@quick
@given(text=st.text(alphabet="the ban.é接🎉🏃", min_size=1, max_size=20), data=st.data())
def test_tokens_of_one_byte_each_stream_and_resume_too(
    byte_fallback_tokenizer: Tokenizer, text: str, data: st.DataObject
) -> None:
    prompt, output = byte_fallback_tokenizer.encode("the baton"), byte_fallback_tokenizer.encode(text)
    unbroken = stream(byte_fallback_tokenizer, prompt, output)
    assert "".join(unbroken) == text
    cut = data.draw(st.integers(0, len(output)))
    assert stream(byte_fallback_tokenizer, prompt + output[:cut], output[cut:]) == unbroken[cut:]


def test_a_long_run_of_broken_bytes_is_shown_as_it_grows(tokenizer: Tokenizer) -> None:
    broken = [_byte_tokens(tokenizer)[0xFF]] * 50
    pieces = stream(tokenizer, tokenizer.encode("the "), broken)
    assert "".join(pieces) == REPLACEMENT * 50
    assert len(pieces[-1]) < 8


@pytest.mark.parametrize("broken", [False, True])
def test_what_gives_no_certain_text_for_long_is_not_decoded_again_and_again(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    end = 1
    run = [_byte_tokens(tokenizer)[0xFF] if broken else end] * 500
    detokenizer = IncrementalDetokenizer(tokenizer, tokenizer.encode("the "))
    decode, lengths = tokenizer.decode, []

    def counted(token_ids: Sequence[int]) -> str:
        lengths.append(len(token_ids))
        return decode(token_ids)

    monkeypatch.setattr(tokenizer, "decode", counted)
    text = detokenizer.push([*run, *tokenizer.encode(" baton")]) + detokenizer.flush()
    assert text == (REPLACEMENT * 500 if broken else "") + " baton"
    assert max(lengths) <= 64


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    output = [0, *tokenizer.encode("the"), 1, *tokenizer.encode(" baton"), 1]
    assert "".join(stream(tokenizer, [0], output)) == "the baton"


def test_without_a_tokenizer_all_text_is_empty() -> None:
    detokenizer = IncrementalDetokenizer(None, [1, 2, 3])
    assert detokenizer.push([4, 5]) == ""
    assert detokenizer.flush() == ""


def test_a_flush_shows_what_was_held_back_once(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, tokenizer.encode("the "))
    assert detokenizer.push(_bytes(tokenizer, "🎉")[:2]) == ""
    assert detokenizer.flush() == REPLACEMENT
    assert detokenizer.flush() == ""
