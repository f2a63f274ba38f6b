"""What bench/engine.py says to a system under test, and hears: one line of JSON each way. Standard library only."""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Work:
    """Prompts of random tokens to be computed at once, and decode steps to follow."""

    num_tokens: int
    batch: int
    steps: int
    seed: int

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """`batch` prompts of `num_tokens` ids; the same for every system."""
        rng = random.Random(self.seed)
        return [[rng.randrange(3, vocab_size) for _ in range(self.num_tokens)] for _ in range(self.batch)]


@dataclass
class Steps:
    """Where the time of one piece of work went."""

    prefill_seconds: float
    """Until every prompt had its first token."""
    decode_seconds: list[float]
    """Each step after that."""


def serve(measure: Callable[[Work], Steps]) -> None:
    """Say ready, then answer each line of work, until the input ends."""
    _reply({"ready": True})
    for line in sys.stdin:
        _reply(vars(measure(Work(**json.loads(line)))))


def _reply(message: dict[str, Any]) -> None:
    # Some systems log to standard output too: the answers are the lines that begin so.
    sys.stdout.write("\n#" + json.dumps(message) + "\n")
    sys.stdout.flush()
