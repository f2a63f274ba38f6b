"""A digest of the receiver's blocks is that of the sender's: for every architecture, between pools of any two block
sizes, by every transport. What was not to be sent has not come, and nothing else was touched.
"""

import hashlib
from dataclasses import dataclass

import pytest
import torch

from kvbaton.engine.geometry import KvGeometry
from kvbaton.engine.request import Phase, Route
from kvbaton.engine.windows import window_start
from kvbaton.handoff.landing import fill
from kvbaton.model.store import DTYPES, TorchKvStore
from support import tiny_models
from support.engines import TinyEngine
from support.handovers import TRANSPORTS, Place

(PROMPT,) = tiny_models.random_prompts([101])
NUM_SLOTS = 768
UNTOUCHED = -123.0

Kv = list[tuple[torch.Tensor, torch.Tensor]]
"""K and V of all tokens, [tokens, heads, dim] each, by layer."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two pools."""

    name: str
    sender_block: int
    receiver_block: int
    num_cached: int
    """What the receiver has already; whole blocks of its own."""
    dtype: str = "float32"


PAIRS = [
    Pair("16 to 256", 16, 256, 0),
    Pair("256 to 16, some cached", 256, 16, 32),
    Pair("7 to 5", 7, 5, 0),
    Pair("5 to 48, most cached", 5, 48, 96),
    Pair("1 to 3, bfloat16", 1, 3, 3, "bfloat16"),
    Pair("16 to 16, bfloat16", 16, 16, 0, "bfloat16"),
]


@pytest.fixture(scope="module", params=list(tiny_models.ARCHITECTURES))
def computed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[KvGeometry, Kv]:
    """What a model has computed of the prompt."""
    folder = tiny_models.save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    engine = TinyEngine(folder, block_size=16, chunk=512)
    sent = engine.add(PROMPT, 4, Route.HAND_OFF)
    while sent.phase is not Phase.HANDING_OFF:
        engine.step()
    slots = slots_of(sent.blocks, range(len(PROMPT)), 16)
    pairs = zip(engine.store.keys, engine.store.values, strict=True)
    return engine.store.geometry, [(k.flatten(0, 1)[slots].clone(), v.flatten(0, 1)[slots].clone()) for k, v in pairs]


def slots_of(blocks: list[int], tokens: range, block_size: int) -> list[int]:
    return [blocks[token // block_size] * block_size + token % block_size for token in tokens]


def place(geometry: KvGeometry, block_size: int, seed: int) -> tuple[Place, TorchKvStore]:
    """A pool full of one number, and a request's blocks anywhere in it."""
    num_blocks = NUM_SLOTS // block_size
    store = TorchKvStore(geometry, num_blocks, block_size, torch.device("cpu"))
    for tensor in (*store.keys, *store.values):
        tensor.fill_(UNTOUCHED)
    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    return Place(store, blocks[: -(-len(PROMPT) // block_size)]), store


def keep(store: TorchKvStore, blocks: list[int], kv: Kv) -> None:
    """Put the prompt's KV there."""
    slots = slots_of(blocks, range(len(PROMPT)), store.block_size)
    dtype = DTYPES[store.geometry.dtype]
    for layer, (key, value) in enumerate(kv):
        store.keys[layer].flatten(0, 1)[slots] = key.to(dtype)
        store.values[layer].flatten(0, 1)[slots] = value.to(dtype)


def digest(store: TorchKvStore, blocks: list[int], first: list[int]) -> bytes:
    """Over K and V of each layer's tokens from its first one on, whatever blocks they lie in."""
    whole = hashlib.blake2b()
    for layer, (keys, values) in enumerate(zip(store.keys, store.values, strict=True)):
        slots = slots_of(blocks, range(first[layer], len(PROMPT)), store.block_size)
        for tensor in (keys, values):
            whole.update(tensor.flatten(0, 1)[slots].contiguous().view(torch.uint8).numpy().tobytes())
    return whole.digest()


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
@pytest.mark.parametrize("transport", list(TRANSPORTS))
async def test_bytes_are_equal(computed: tuple[KvGeometry, Kv], pair: Pair, transport: str) -> None:
    layers, kv = computed[0].layers, computed[1]
    geometry = KvGeometry(layers, pair.dtype)
    source, sender = place(geometry, pair.sender_block, seed=1)
    target, receiver = place(geometry, pair.receiver_block, seed=2)
    keep(sender, source.blocks, kv)
    tokens = range(pair.num_cached, len(PROMPT))
    start = window_start(geometry.window, tokens, pair.receiver_block)
    async with TRANSPORTS[transport]() as move:
        report = await move(source, target, tokens, start)
    first = [tokens.start if layer.window is None else start for layer in layers]
    assert digest(receiver, target.blocks, first) == digest(sender, source.blocks, first)
    sizes = zip(geometry.layer_token_bytes, first, strict=True)
    assert report.payload_bytes == sum(size * (len(PROMPT) - begin) for size, begin in sizes)
    for layer, begin in enumerate(first):
        touched = torch.zeros(receiver.keys[0].flatten(0, 1).shape[0], dtype=torch.bool)
        touched[slots_of(target.blocks, range(begin, len(PROMPT)), pair.receiver_block)] = True
        for tensor in (receiver.keys[layer], receiver.values[layer]):
            assert bool((tensor.flatten(0, 1)[~touched] == UNTOUCHED).all())


@pytest.mark.parametrize("encoding", ["int8", "float8"])
async def test_what_is_encoded_arrives_as_it_is_decoded(computed: tuple[KvGeometry, Kv], encoding: str) -> None:
    geometry, kv = computed
    (source, sender), (target, receiver) = place(geometry, 16, seed=1), place(geometry, 5, seed=2)
    directly, decoded = place(geometry, 5, seed=2)
    keep(sender, source.blocks, kv)
    encoded, tokens, layers = sender.encoded(encoding), range(len(PROMPT)), range(geometry.num_layers)
    payload = b"".join(encoded.read(layers, source.blocks, tokens))
    fill(decoded.encoded(encoding).landing(layers, directly.blocks, tokens), payload)
    start = window_start(geometry.window, tokens, 5)
    async with TRANSPORTS["grpc"]() as move:
        report = await move(Place(encoded, source.blocks), target, tokens, start)
    first = [0 if layer.window is None else start for layer in geometry.layers]
    assert digest(receiver, target.blocks, first) == digest(decoded, directly.blocks, first)
    assert digest(receiver, target.blocks, first) != digest(sender, source.blocks, first)
    sizes = zip(encoded.geometry.layer_token_bytes, first, strict=True)
    assert report.payload_bytes == sum(size * (len(PROMPT) - begin) for size, begin in sizes)


def test_the_matrix_has_what_may_differ(computed: tuple[KvGeometry, Kv]) -> None:
    geometry, kv = computed
    assert len(kv) == geometry.num_layers
    for (key, value), layer in zip(kv, geometry.layers, strict=True):
        assert key.shape == (len(PROMPT), layer.num_kv_heads, layer.k_head_dim)
        assert value.shape == (len(PROMPT), layer.num_kv_heads, layer.v_head_dim)
