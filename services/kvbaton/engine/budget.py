"""How much of a prompt a step may carry, beside its decodes, and still be done in time.

Model. A step's time is taken to be linear in what it does,

    seconds = w0 + w1 * decode sequences + w2 * KV tokens they look at + w3 * prompt tokens + w4 * prompt pairs,

where a pair is a query and a key of one prompt: the first and third term are the weights' GEMMs, the others attention.
It is the cost model that chunked prefill is planned with (Agrawal et al. 2024, "Sarathi-Serve", section 4.3), fitted to
the steps as they come instead of being profiled before.

Fit. Least squares over relative errors, with weights that are not negative, by coordinate descent (Franc, Hlavac and
Navara 2005). Older steps count less by a constant factor, and a proximal term holds each weight where it was as long as
nothing is learned about it (Parikh and Boyd 2014, "Proximal Algorithms"): a worker that has not seen a prompt for an
hour still knows what one costs.

Safety. A step counts as at most twice as slow as it was predicted, so one that was held up changes little, while a
worker that has slowed down is believed after ten or so. A chunk is at most twice as large as any that was measured. It
never falls below a small minimum, or prompts would not get on at all. A fit that is wrong about what it has not seen
corrects itself: as long as steps are faster than asked for the chunk grows, and what it costs is then seen.
"""

import math
from dataclasses import dataclass
from operator import mul

MIN_CHUNK = 16
"""Prompt tokens that a step carries however late it is."""

_MEMORY = 0.9
"""What a step still counts for one step later: the last ten or so make the fit."""
_HOLD = 1e-3
"""Strength of the proximal term, relative to what was learned of all weights on average."""
_SWEEPS = 8
"""Rounds of coordinate descent for each step; the next one goes on from there."""
_CLIP = 2.0
"""How much slower than predicted a step counts at most."""
_GROWTH = 2
"""How much larger than any chunk that was measured the next may be."""
_UNITS = (1.0, 16.0, 4096.0, 256.0, 65536.0)
"""Ordinary sizes of the five terms: weights in these units are of like size, which the proximal term presumes."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step does."""

    decode_seqs: int = 0
    decode_context: int = 0
    """KV tokens that the decodes look at, all together."""
    prefill_tokens: int = 0
    prefill_pairs: int = 0
    """Pairs of a query and a key in the prompts' attention."""

    def terms(self) -> list[float]:
        """The model's inputs, each in its unit."""
        values = (1, self.decode_seqs, self.decode_context, self.prefill_tokens, self.prefill_pairs)
        return [value / unit for value, unit in zip(values, _UNITS, strict=True)]


class ChunkBudget:
    """Learns what steps cost and chooses chunks. Pure: it is told the times."""

    def __init__(self) -> None:
        size = len(_UNITS)
        self._weights = [0.0] * size
        self._moments = [[0.0] * size for _ in range(size)]
        self._products = [0.0] * size
        self._largest = 0

    def predict(self, shape: StepShape) -> float:
        """Seconds that a step should take; 0 before anything was observed."""
        seconds: float = sum(map(mul, self._weights, shape.terms()))
        return seconds

    def observe(self, shape: StepShape, seconds: float) -> None:
        """A step took so long. A time that is not positive tells nothing."""
        if not seconds > 0:
            return
        predicted = self.predict(shape)
        if predicted > 0:
            seconds = min(seconds, predicted * _CLIP)
        self._largest = max(self._largest, shape.prefill_tokens)
        relative = [term / seconds for term in shape.terms()]
        for row, moments in zip(relative, self._moments, strict=True):
            for column, other in enumerate(relative):
                moments[column] = moments[column] * _MEMORY + row * other
        self._products = [product * _MEMORY + row for product, row in zip(self._products, relative, strict=True)]
        self._fit()

    def choose(self, target: float, decodes: StepShape, start: int, most: int) -> int:
        """The largest chunk, of at most `most` tokens, with which a step of `decodes` should take `target` seconds.

        As if all of it were of one prompt, of which `start` tokens are computed.
        """
        most = min(most, max(MIN_CHUNK, _GROWTH * self._largest))
        spare = target - self.predict(decodes)
        token, pair = self._weights[3] / _UNITS[3], self._weights[4] / _UNITS[4]
        # The n tokens look at n * start + n * (n + 1) / 2 keys.
        linear, square = token + pair * (start + 0.5), pair / 2
        if spare <= 0:
            fits = 0.0
        elif square * spare > 0:
            fits = 2 * spare / (linear + math.sqrt(linear * linear + 4 * square * spare))
        else:
            fits = spare / linear if linear > 0 else math.inf
        return min(most, max(MIN_CHUNK, int(min(fits, most))))

    def _fit(self) -> None:
        size = len(_UNITS)
        hold = _HOLD * sum(self._moments[i][i] for i in range(size)) / size
        held = [product + hold * weight for product, weight in zip(self._products, self._weights, strict=True)]
        for _ in range(_SWEEPS):
            for i, moments in enumerate(self._moments):
                others = sum(map(mul, moments, self._weights)) - moments[i] * self._weights[i]
                self._weights[i] = max(0.0, (held[i] - others) / (moments[i] + hold))
