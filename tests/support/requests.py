"""Requests as an engine's shell submits them."""

from collections.abc import Sequence
from typing import Any

from kvbaton.engine.new_request import NewRequest
from kvbaton.engine.request import Route
from kvbaton.engine.sampling import SamplingParams


def new_request(
    request_id: str, prompt: Sequence[int], sampling: SamplingParams, route: Route = Route.LOCAL, **more: Any
) -> NewRequest:
    """Most of them: without a past, a priority or a salt of their own."""
    return NewRequest(request_id=request_id, prompt=prompt, sampling=sampling, route=route, **more)
