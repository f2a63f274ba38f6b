"""The text of an answer, from its tokens: whole characters only, and nothing beyond a stop string.

All of it follows from the prompt and the answer's tokens, however they were cut into pushes, so that a worker that
takes an answer over shows what the first one would have shown next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvbaton.engine.sampling import FinishReason, SamplingParams
from kvbaton.text.detokenizer import IncrementalDetokenizer
from kvbaton.text.stop import StopFinder
from kvbaton.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextUpdate:
    """What some tokens added to an answer's text."""

    text: str
    """Text that is now certain to be part of the answer."""
    num_tokens: int
    """How many of the tokens are part of the answer: the rest comes after the stop string."""
    stop: str | None
    """The stop string that has ended the answer, if one has."""


class OutputText:
    """Text of one growing answer.

    The answer ends at the stop string that is complete first; of several that end together, the longest counts. Stop
    strings are looked for in the answer alone, not across its border with the prompt. As in vLLM, one that is complete
    within the first `min_tokens` tokens does not count, then or later; one that begins there and ends beyond does. And
    as there, EOS and the stop tokens are to the text what stop strings are: left out, unless stops are to be shown.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, prompt: Sequence[int], output: Sequence[int], sampling: SamplingParams
    ) -> None:
        """`output` are the answer's tokens so far, whose text was shown. Without a tokenizer there is no text."""
        self._min_tokens = sampling.min_tokens
        self._include_stop = sampling.include_stop_in_output
        self._finder = StopFinder(sampling.stop)
        self._num_tokens = 0
        # Text that may be the start of a stop string.
        self._held = ""
        self._stop: str | None = None
        if sampling.stop:
            self._detokenizer = IncrementalDetokenizer(tokenizer, prompt)
            self.push(output)
        else:
            # Nothing but the detokenizer has a state, and that follows from the last few tokens.
            self._detokenizer = IncrementalDetokenizer(tokenizer, [*prompt, *output])

    def push(self, token_ids: Sequence[int], ending: FinishReason | None = None) -> TextUpdate:
        """Add tokens, the last of which ends the answer if it has a reason: everything held back becomes text.

        After a stop string nothing is added.
        """
        num_shown = len(token_ids) - (ending is FinishReason.STOP and not self._include_stop)
        shown: list[str] = []
        num_used = 0
        for token_id in token_ids:
            if self._stop is not None:
                break
            num_used += 1
            self._num_tokens += 1
            if num_used <= num_shown:
                shown.append(self._add(self._detokenizer.push([token_id])))
        if ending is not None and self._stop is None:
            shown.append(self._add(self._detokenizer.flush()))
            shown.append(self._held)
            self._held = ""
        return TextUpdate("".join(shown), num_used, self._stop)

    def _add(self, text: str) -> str:
        """Take text of the last token; return what is certain."""
        match = self._finder.feed(text, armed=self._num_tokens > self._min_tokens)
        whole = self._held + text
        if match is not None:
            self._stop = match.stop
            end = len(self._held) + match.end
            self._held = ""
            return whole[: end if self._include_stop else end - len(match.stop)]
        # A stop string that will be shown is not held back.
        certain = len(whole) - (0 if self._include_stop else self._finder.pending)
        self._held = whole[certain:]
        return whole[:certain]
