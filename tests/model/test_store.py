"""KV goes through a store bit by bit, in the layout of the wire, and what lies in other slots is never seen."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbaton.engine.core import Engine
from kvbaton.engine.geometry import DTYPE_BYTES, KvGeometry, LayerGeometry
from kvbaton.engine.pool import BlockPool
from kvbaton.engine.request import Phase
from kvbaton.engine.sampling import SamplingParams
from kvbaton.engine.scheduler import Limits, Scheduler
from kvbaton.handoff.landing import fill
from kvbaton.model.loader import load_model
from kvbaton.model.runner import ModelRunner
from kvbaton.model.store import TorchKvStore
from support import tiny_models
from support.requests import new_request

CPU = torch.device("cpu")
LAYERS = st.lists(st.builds(LayerGeometry, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)), min_size=1)
DTYPES = st.sampled_from(sorted(DTYPE_BYTES))


def payload_of(geometry: KvGeometry, layers: range, num_tokens: int, seed: int) -> bytes:
    """Random bytes: whatever they mean as numbers, NaN included, they must come back."""
    size = geometry.span_bytes(layers.start, layers.stop, num_tokens)
    return np.random.default_rng(seed).bytes(size)


def snapshot(store: TorchKvStore) -> list[bytes]:
    """Every bit of every layer."""
    return [tensor.view(torch.uint8).numpy().tobytes() for tensor in [*store.keys, *store.values]]


@settings(deadline=None)
@given(layers=LAYERS.map(tuple), dtype=DTYPES, block_size=st.integers(1, 6), seed=st.integers(0, 9), data=st.data())
def test_what_was_written_is_read(
    layers: tuple[LayerGeometry, ...], dtype: str, block_size: int, seed: int, data: st.DataObject
) -> None:
    num_blocks = 7
    store = TorchKvStore(KvGeometry(layers, dtype), num_blocks, block_size, CPU)
    blocks = data.draw(st.permutations(range(num_blocks)))[: data.draw(st.integers(1, num_blocks))]
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(blocks) * block_size)] * 2)))
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, len(layers))] * 2)))
    payload = payload_of(store.geometry, range(low, high), last - first, seed)
    fill(store.landing(range(low, high), blocks, range(first, last)), payload)
    parts = store.read(range(low, high), blocks, range(first, last))
    assert b"".join(parts) == payload
    assert all(part.format == "B" and part.ndim == 1 and part.contiguous for part in parts)


@settings(deadline=None)
@given(dtype=DTYPES, data=st.data())
def test_what_was_sent_in_rectangles_is_read_as_a_whole(dtype: str, data: st.DataObject) -> None:
    geometry = KvGeometry((LayerGeometry(2, 3, 2), LayerGeometry(1, 2, 2), LayerGeometry(1, 2, 2)), dtype)
    sender, receiver = TorchKvStore(geometry, 6, 4, CPU), TorchKvStore(geometry, 9, 3, CPU)
    num_tokens, here, there = 17, [5, 0, 3, 1, 4], [8, 2, 7, 0, 1, 4]
    payload = payload_of(geometry, range(3), num_tokens, 1)
    fill(sender.landing(range(3), here, range(num_tokens)), payload)
    cut, split = data.draw(st.integers(0, num_tokens)), data.draw(st.integers(0, 3))
    for tokens, layers in itertools.product([range(cut), range(cut, num_tokens)], [range(split), range(split, 3)]):
        fill(receiver.landing(layers, there, tokens), b"".join(sender.read(layers, here, tokens)))
    assert b"".join(receiver.read(range(3), there, range(num_tokens))) == payload


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_the_layout_is_the_payloads(dtype: str) -> None:
    """Layer by layer K `[tokens, heads, k_dim]` and V `[tokens, heads, v_dim]`, row-major, little-endian."""
    geometry = KvGeometry((LayerGeometry(2, 3, 2), LayerGeometry(1, 4, 4)), dtype)
    store = TorchKvStore(geometry, 5, 4, CPU)
    blocks, tokens = [3, 1], range(2, 7)
    slots = torch.tensor([blocks[token // 4] * 4 + token % 4 for token in tokens])
    generator, expected = torch.Generator().manual_seed(0), b""
    for number, layer in enumerate(geometry.layers):
        shapes = [(5, layer.num_kv_heads, dim) for dim in (layer.k_head_dim, layer.v_head_dim)]
        key, value = (torch.randn(shape, generator=generator).to(store.keys[0].dtype) for shape in shapes)
        store.put(number, slots, key, value)
        for tensor in (key, value):
            # A bfloat16 is the upper half of a float32.
            words = tensor.float().numpy().astype("<f4").view("<u4")
            expected += (words if dtype == "float32" else (words >> 16).astype("<u2")).tobytes(order="C")
    assert b"".join(store.read(range(2), blocks, tokens)) == expected


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_a_write_touches_its_own_slots_and_no_others(dtype: str) -> None:
    geometry = KvGeometry((LayerGeometry(1, 2, 3), LayerGeometry(2, 1, 1)), dtype)
    store = TorchKvStore(geometry, 6, 4, CPU)
    everything = list(range(6))
    fill(store.landing(range(2), everything, range(24)), payload_of(geometry, range(2), 24, 0))
    before = snapshot(store)
    # Tokens 3..8 of a request in blocks 4, 0, 2: slots 19, 0..3, 8.
    touched = [19, 0, 1, 2, 3, 8]
    fill(store.landing(range(1, 2), [4, 0, 2], range(3, 9)), payload_of(geometry, range(1, 2), 6, 7))
    for number, (old, new) in enumerate(zip(before, snapshot(store), strict=True)):
        layer, width = number % 2, len(old) // 24
        changed = {slot for slot in range(24) if old[slot * width : (slot + 1) * width] != new[slot * width :][:width]}
        assert changed == (set(touched) if layer == 1 else set())


def test_on_a_cpu_a_read_is_a_view() -> None:
    geometry = KvGeometry((LayerGeometry(1, 2, 2),), "float32")
    store = TorchKvStore(geometry, 2, 4, CPU)
    parts = store.read(range(1), [1], range(4))
    payload = payload_of(geometry, range(1), 4, 2)
    fill(store.landing(range(1), [1], range(4)), payload)
    assert b"".join(parts) == payload


def answers(folder: Path, garbage: float) -> list[list[int]]:
    """What an engine puts out whose store held `garbage` before."""
    loaded = load_model(str(folder), "float32", "cpu")
    store = TorchKvStore(loaded.geometry, 40, 4, CPU)
    for tensor in [*store.keys, *store.values]:
        tensor.fill_(garbage)
    limits = Limits(max_prefill_tokens=11, max_decode_seqs=8, max_waiting=8)
    scheduler = Scheduler(BlockPool(40, 4), limits, frozenset(), 256)
    engine = Engine(scheduler, ModelRunner(loaded, store))
    sampling = SamplingParams(max_tokens=9, seed=0)
    prompts = tiny_models.random_prompts([1, 30, 5, 13])
    requests = [scheduler.add(new_request(str(n), prompt, sampling), 0.0) for n, prompt in enumerate(prompts)]
    while any(request.phase is not Phase.FINISHED for request in requests):
        assert not engine.step(lambda: 0.0).failed
    return [request.output for request in requests]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_garbage_in_unused_slots_never_changes_an_answer(architecture: str, garbage: float, tmp_path: Path) -> None:
    folder = tiny_models.save_tiny_model(architecture, tmp_path)
    assert answers(folder, garbage) == answers(folder, 0.0)
