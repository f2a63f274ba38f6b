"""The ways in which a request can be served, each as a function from a tiny model to its greedy answers to PROMPTS."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvbaton.engine.request import Phase, Request, Route
from kvbaton.handoff.frames import FramePlanner
from kvbaton.handoff.landing import fill
from support import tiny_models
from support.engines import TinyEngine

BLOCK = 8
MAX_TOKENS = 12
PROMPTS = tiny_models.random_prompts([1, BLOCK - 1, BLOCK, BLOCK + 1, 40, 61])

ODD_FRAME_BYTES = 1700
"""Frames end where neither side's blocks do."""

Outputs = list[list[int]]


def whole(folder: Path) -> Outputs:
    """Every prompt in one step."""
    engine = TinyEngine(folder, block_size=BLOCK, chunk=512)
    requests = [engine.add(prompt, MAX_TOKENS) for prompt in PROMPTS]
    outputs = engine.finish(requests)
    assert engine.scheduler.pool.num_free == 64
    return outputs


def chunked(folder: Path) -> Outputs:
    """Prompts in chunks of seven tokens, which begin and end within blocks, beside the decodes of others."""
    engine = TinyEngine(folder, block_size=BLOCK, chunk=7, decodes=3)
    requests = [engine.add(prompt, MAX_TOKENS) for prompt in PROMPTS]
    mixed = 0
    while any(request.phase is not Phase.FINISHED for request in requests):
        phases = {request.phase for request in requests}
        mixed += {Phase.PREFILLING, Phase.DECODING} <= phases
        engine.step()
    assert mixed > 3
    return [request.output for request in requests]


def cached(folder: Path) -> Outputs:
    """Prompts whose leading blocks are in the prefix cache: the rest alone is computed."""
    engine = TinyEngine(folder, block_size=BLOCK, chunk=512)
    engine.finish([engine.add([*prompt[:-2], 5], 3) for prompt in PROMPTS if len(prompt) > 3])
    requests = [engine.add(prompt, MAX_TOKENS) for prompt in PROMPTS]
    outputs = engine.finish(requests)
    assert [request.num_cached for request in requests] == [0, 0, 0, 0, 32, 56]
    return outputs


def resumed(folder: Path) -> Outputs:
    """Requests dropped half-way, which go on at another engine from their tokens."""
    first = TinyEngine(folder, block_size=BLOCK, chunk=16)
    dropped = [first.add(prompt, MAX_TOKENS) for prompt in PROMPTS]
    while any(len(request.output) < MAX_TOKENS // 2 for request in dropped):
        first.step()
    half = [request.output[: MAX_TOKENS // 2] for request in dropped]
    second = TinyEngine(folder, block_size=BLOCK, chunk=16)
    return second.finish(
        [second.add(prompt, MAX_TOKENS, output=output) for prompt, output in zip(PROMPTS, half, strict=True)]
    )


def preempted(folder: Path) -> Outputs:
    """A pool with too few blocks for the requests as they grow: some are handed back, and come again."""
    engine = TinyEngine(folder, block_size=2, chunk=64, num_blocks=40)
    requests = [engine.add(prompt, MAX_TOKENS) for prompt in PROMPTS]
    handed_back = 0
    while any(request.finish_reason is None for request in requests):
        engine.step()
        for number, request in enumerate(requests):
            if request.phase is Phase.FINISHED and request.finish_reason is None:
                handed_back += 1
                requests[number] = engine.add(request.prompt, MAX_TOKENS, output=request.output)
    assert handed_back
    return [request.output for request in requests]


def handed_over(folder: Path) -> Outputs:
    """The KV that will be seen moved in odd pieces to a pool of other blocks; the receiver computes no prompt."""
    sender = TinyEngine(folder, block_size=BLOCK, chunk=16)
    receiver = TinyEngine(folder, block_size=5, chunk=16)
    receiver.spoil()
    outputs = receiver.finish([hand_over(sender, receiver, prompt) for prompt in PROMPTS])
    assert receiver.engine.counters.prefill_tokens_computed == 0
    return outputs


def handed_over_again(folder: Path) -> Outputs:
    """The same prompts as before, at a receiver that has their KV as it came the first time: little is moved."""
    sender = TinyEngine(folder, block_size=BLOCK, chunk=16)
    receiver = TinyEngine(folder, block_size=5, chunk=16)
    receiver.spoil()
    receiver.finish([hand_over(sender, receiver, prompt) for prompt in PROMPTS])
    requests = [hand_over(sender, receiver, prompt) for prompt in PROMPTS]
    assert [request.num_cached for request in requests] == [(len(prompt) - 1) // 5 * 5 for prompt in PROMPTS]
    return receiver.finish(requests)


def hand_over(sender: TinyEngine, receiver: TinyEngine, prompt: Sequence[int], **more: Any) -> Request:
    """A request on `receiver` whose KV `sender` has computed, ready to decode."""
    sent = sender.add(prompt, MAX_TOKENS, Route.HAND_OFF, **more)
    received = receiver.add(prompt, MAX_TOKENS, Route.RECEIVE, **more)
    while not received.blocks:
        receiver.step()
    while sent.phase is not Phase.HANDING_OFF:
        sender.step()
    planner = FramePlanner(sender.store.geometry, received.num_cached, received.num_prefill, ODD_FRAME_BYTES)
    planner.begin(received.window_start)
    for layer in range(sender.store.geometry.num_layers):
        planner.advance(layer, sent.num_prefill)
    while (rectangle := planner.next()) is not None:
        payload = b"".join(sender.store.read(rectangle.layers, sent.blocks, rectangle.tokens))
        fill(receiver.store.landing(rectangle.layers, received.blocks, rectangle.tokens), payload)
    sender.remove(sent)
    receiver.scheduler.kv_received(received.request_id, sent.output[-1], 0.0)
    return received


MODES: dict[str, Callable[[Path], Outputs]] = {
    mode.__name__: mode for mode in (whole, chunked, cached, resumed, preempted, handed_over, handed_over_again)
}
"""By name; what a mode does stands in its docstring, and from there in docs/models.md."""
