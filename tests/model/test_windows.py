"""Models with sliding windows on a receiver whose memory is NaN wherever nothing was sent: what is left out is seen by
nobody, by neither of the backends, now or in later turns.
"""

from pathlib import Path

import pytest

from kvbaton.engine.request import Request
from kvbaton.model.reference import ReferenceAttention
from support import tiny_models
from support.engines import TinyEngine
from support.modes import MAX_TOKENS, hand_over

PROMPT = tiny_models.random_prompts([90])[0]
QUESTION = tiny_models.random_prompts([7], seed=4)[0]
BLOCK_PAIRS = [(8, 8), (16, 5), (3, 16), (8, 64)]


@pytest.fixture(scope="module", params=["mistral", "qwen2", "gemma2", "gemma3", "gpt_oss", "cohere2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A model with windows, and an answer to the prompt that was computed in one place."""
    folder = tiny_models.save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    engine = TinyEngine(folder, block_size=8, chunk=512)
    return folder, engine.finish([engine.add(PROMPT, MAX_TOKENS)])[0]


def pair(folder: Path, blocks: tuple[int, int], backend: str = "cpu") -> tuple[TinyEngine, TinyEngine]:
    sender, receiver = (TinyEngine(folder, block_size=size, chunk=512) for size in blocks)
    if backend == "reference":
        receiver.attention.backend = ReferenceAttention()
    receiver.spoil()
    return sender, receiver


def unsent(receiver: TinyEngine, request: Request) -> list[bool]:
    """By layer: whether the prompt's first token is missing."""
    slot = request.blocks[0] * receiver.store.block_size
    return [bool(keys.flatten(0, 1)[slot].isnan().any()) for keys in receiver.store.keys]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("blocks", BLOCK_PAIRS)
def test_what_is_not_sent_is_not_missed(model: tuple[Path, list[int]], blocks: tuple[int, int], backend: str) -> None:
    folder, answer = model
    sender, receiver = pair(folder, blocks, backend)
    request = hand_over(sender, receiver, PROMPT)
    windows = [layer.window for layer in receiver.store.geometry.layers]
    assert tiny_models.WINDOW in windows
    # In blocks of 64 tokens the first one that is seen is in the first block.
    assert unsent(receiver, request) == [window is not None and blocks[1] < 64 for window in windows]
    assert receiver.finish([request]) == [answer]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_next_turn_and_the_same_again_find_what_was_received(model: tuple[Path, list[int]], backend: str) -> None:
    folder, answer = model
    sender, receiver = pair(folder, (16, 5), backend)
    receiver.finish([hand_over(sender, receiver, PROMPT)])
    again = hand_over(sender, receiver, PROMPT)
    assert again.num_cached == 85
    local = receiver.add(PROMPT, MAX_TOKENS)
    assert receiver.finish([again, local]) == [answer, answer]
    assert local.num_cached == 85
    turn = [*PROMPT, *answer, *QUESTION]
    moved, here, there = hand_over(sender, receiver, turn), receiver.add(turn, MAX_TOKENS), sender.add(turn, MAX_TOKENS)
    assert receiver.finish([moved, here]) == sender.finish([there]) * 2
    # The answer's last token was never computed; the second one finds what the first one received, too.
    assert (moved.num_cached, here.num_cached) == (100, 105)


def test_half_an_answer_goes_on_elsewhere(model: tuple[Path, list[int]]) -> None:
    folder, answer = model
    sender, receiver = pair(folder, (16, 5))
    receiver.finish([hand_over(sender, receiver, PROMPT)])
    resumed = hand_over(sender, receiver, PROMPT, output=answer[:6])
    assert resumed.num_cached == 95
    assert receiver.finish([resumed]) == [answer]


def test_what_was_received_in_part_is_not_handed_on(model: tuple[Path, list[int]]) -> None:
    folder, answer = model
    sender, middle = pair(folder, (16, 5))
    middle.finish([hand_over(sender, middle, PROMPT)])
    last = TinyEngine(folder, block_size=8, chunk=512)
    last.spoil()
    before = middle.engine.counters.prefill_tokens_computed
    assert last.finish([hand_over(middle, last, PROMPT)]) == [answer]
    assert middle.engine.counters.prefill_tokens_computed - before == len(PROMPT)


def test_models_say_which_layers_have_windows(model: tuple[Path, list[int]]) -> None:
    folder, _ = model
    engine = TinyEngine(folder, block_size=8, chunk=512)
    config = engine.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    expected = [tiny_models.WINDOW if kind == "sliding_attention" else None for kind in kinds]
    assert [layer.window for layer in engine.store.geometry.layers] == expected
