"""Stop strings are found at the character that completes them, and what may become one is known."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbaton.text.stop import StopFinder, StopMatch

STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=5)
TEXT = st.text(alphabet="abc", max_size=30)


def first_match(text: str, stops: list[str]) -> StopMatch | None:
    """By trying every place."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return StopMatch(max(ended, key=len), end)
    return None


@pytest.mark.parametrize(
    ("stops", "text", "match"),
    [
        (["STOP"], "go STOP it", StopMatch("STOP", 7)),
        (["abc", "b"], "abc", StopMatch("b", 2)),
        (["bc", "abc"], "xabc", StopMatch("abc", 4)),
        (["aab"], "aaaab", StopMatch("aab", 5)),
        (["👩‍👦", "\n\n"], "x👩‍👦", StopMatch("👩‍👦", 4)),
        (["a"], "xyz", None),
        ([], "xyz", None),
    ],
)
def test_a_stop_string_is_found_where_it_ends(stops: list[str], text: str, match: StopMatch | None) -> None:
    assert StopFinder(stops).feed(text, armed=True) == match


@settings(deadline=None)
@given(stops=STOPS, text=TEXT)
def test_the_first_to_be_complete_is_found_and_of_those_the_longest(stops: list[str], text: str) -> None:
    assert StopFinder(stops).feed(text, armed=True) == first_match(text, stops)


@settings(deadline=None)
@given(stops=STOPS, text=TEXT, armed=st.booleans())
def test_pending_is_the_longest_end_that_may_become_a_stop_string(stops: list[str], text: str, armed: bool) -> None:
    finder = StopFinder(stops)
    for at, character in enumerate(text):
        if finder.feed(character, armed=armed) is not None:
            return
        seen = text[: at + 1]
        starts = {stop[:length] for stop in stops for length in range(len(stop))}
        assert finder.pending == max(len(start) for start in starts if seen.endswith(start))


def test_one_that_is_passed_over_can_still_grow_into_a_longer_one() -> None:
    finder = StopFinder(["ab", "abcd"])
    assert finder.feed("xabc", armed=False) is None
    assert finder.pending == 3
    assert finder.feed("d", armed=True) == StopMatch("abcd", 1)
