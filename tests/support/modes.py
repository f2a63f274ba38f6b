"""The ways in which a request can be served, each as a function from a tiny model to its greedy answers to PROMPTS."""

from collections.abc import Callable
from pathlib import Path

from kvbaton.engine.request import Phase, Request, Route
from kvbaton.handoff.landing import fill
from support import tiny_models
from support.engines import TinyEngine

BLOCK = 8
MAX_TOKENS = 12
PROMPTS = tiny_models.random_prompts([1, BLOCK - 1, BLOCK, BLOCK + 1, 40, 61])

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
    """KV moved in pieces of odd sizes between pools of different block sizes; the receiver computes no prompt."""
    sender = TinyEngine(folder, block_size=BLOCK, chunk=16)
    receiver = TinyEngine(folder, block_size=5, chunk=16)
    requests = []
    for prompt in PROMPTS:
        sent = sender.add(prompt, MAX_TOKENS, Route.HAND_OFF)
        received = receiver.add(prompt, MAX_TOKENS, Route.RECEIVE)
        receiver.step()
        while sent.phase is not Phase.HANDING_OFF:
            sender.step()
        _move(sender, sent, receiver, received)
        sender.remove(sent)
        receiver.scheduler.kv_received(received.request_id, sent.output[0], 0.0)
        requests.append(received)
    outputs = receiver.finish(requests)
    assert receiver.engine.counters.prefill_tokens_computed == 0
    return outputs


def _move(sender: TinyEngine, sent: Request, receiver: TinyEngine, received: Request) -> None:
    num_layers, num_tokens = sender.store.geometry.num_layers, len(sent.prompt)
    # Cut where neither side's blocks end.
    for layers in (range(1), range(1, num_layers)):
        for start in range(0, num_tokens, 11):
            tokens = range(start, min(start + 11, num_tokens))
            payload = b"".join(sender.store.read(layers, sent.blocks, tokens))
            fill(receiver.store.landing(layers, received.blocks, tokens), payload)


MODES: dict[str, Callable[[Path], Outputs]] = {
    mode.__name__: mode for mode in (whole, chunked, cached, resumed, preempted, handed_over)
}
"""By name; what a mode does stands in its docstring, and from there in docs/models.md."""
