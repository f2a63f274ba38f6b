"""What an engine does, and what it has done since it started."""

from dataclasses import dataclass


@dataclass(slots=True)
class EngineCounters:
    """Totals since start."""

    num_steps: int = 0
    prefill_tokens_computed: int = 0
    decode_tokens_computed: int = 0
    prefix_tokens_queried: int = 0
    """Tokens of admitted requests that were looked up in the prefix cache."""
    prefix_tokens_hit: int = 0
    """Those of them whose KV was there."""
    requests_preempted: int = 0
    """Requests handed back for want of blocks."""
    requests_not_a_number: int = 0
    """Requests that ended because their logits were not numbers."""


@dataclass(slots=True)
class Counts:
    """How many requests stand in each phase."""

    waiting: int = 0
    receiving: int = 0
    prefilling: int = 0
    handing_off: int = 0
    decoding: int = 0
