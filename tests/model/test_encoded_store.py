"""A store's memory in an encoding: sizes and layout of the wire, whatever the blocks; what comes back is what the
encoding makes of it; and no other slot is touched.
"""

import numpy as np
import pytest
import torch
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbaton.engine.errors import UnavailableError
from kvbaton.engine.geometry import DTYPE_BYTES, ENCODING_BYTES, KvGeometry, LayerGeometry
from kvbaton.engine.kv_store import Reading
from kvbaton.handoff.landing import fill
from kvbaton.model.store import TorchKvStore
from support.fakes import FakeStore

CPU = torch.device("cpu")
LAYERS = (LayerGeometry(2, 5, 3), LayerGeometry(1, 4, 7), LayerGeometry(3, 1, 2))
SEVERAL = range(1, 3)


def store(dtype: str, num_blocks: int, block_size: int, seed: int = 0) -> TorchKvStore:
    made = TorchKvStore(KvGeometry(LAYERS, dtype), num_blocks, block_size, CPU)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*made.keys, *made.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return made


def slots(blocks: list[int], tokens: range, block_size: int) -> list[int]:
    return [blocks[token // block_size] * block_size + token % block_size for token in tokens]


def scaled(rows: torch.Tensor, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    scales = (rows.abs().amax(-1) / largest).bfloat16()
    return rows * (1 / scales.float())[..., None], scales


def expected(rows: torch.Tensor, encoding: str) -> bytes:
    """Of K or V of some tokens, [tokens, heads, dim] in float32, by torch."""
    if encoding == "bfloat16":
        return rows.bfloat16().view(torch.uint8).numpy().tobytes()
    codes, scales = scaled(rows, 127 if encoding == "int8" else 448)
    narrow = codes.round().to(torch.int8) if encoding == "int8" else codes.to(torch.float8_e4m3fn)
    return narrow.view(torch.uint8).numpy().tobytes() + scales.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("encoding", sorted(ENCODING_BYTES))
@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_a_payload_is_codes_and_scales_of_k_and_then_of_v(dtype: str, encoding: str) -> None:
    made, blocks, tokens = store(dtype, 6, 4), [5, 0, 2, 3], range(3, 14)
    encoded = made.encoded(encoding)
    payload = b"".join(encoded.read(SEVERAL, blocks, tokens))
    at = slots(blocks, tokens, 4)
    wanted = b"".join(
        expected(tensors[layer].flatten(0, 1)[at].float(), encoding)
        for layer in SEVERAL
        for tensors in (made.keys, made.values)
    )
    assert payload == wanted
    assert len(payload) == encoded.geometry.span_bytes(1, 3, len(tokens))
    assert encoded.geometry.layers == made.geometry.layers


@settings(deadline=None, max_examples=60)
@given(
    encoding=st.sampled_from(sorted(ENCODING_BYTES)),
    dtypes=st.tuples(*[st.sampled_from(sorted(DTYPE_BYTES))] * 2),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    data=st.data(),
)
def test_any_pool_takes_what_any_other_sends(
    encoding: str, dtypes: tuple[str, str], sizes: tuple[int, int], data: st.DataObject
) -> None:
    here, there = store(dtypes[0], 9, sizes[0]), store(dtypes[1], 9, sizes[1], seed=1)
    most = 9 * min(sizes)
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, most)] * 2)))
    tokens = range(first, last)
    ours, theirs = (data.draw(st.permutations(range(9))) for _ in range(2))
    before = [tensor.clone() for tensor in (*there.keys, *there.values)]
    payload = b"".join(here.encoded(encoding).read(SEVERAL, ours, tokens))
    fill(there.encoded(encoding).landing(SEVERAL, theirs, tokens), payload)
    assert len(payload) == here.geometry.encoded(encoding).span_bytes(1, 3, len(tokens))
    tolerance = {"bfloat16": 2**-8, "int8": 0.01, "float8": 0.07}[encoding]
    touched = slots(theirs, tokens, sizes[1])
    for number, (now, was) in enumerate(zip((*there.keys, *there.values), before, strict=True)):
        layer, kept = number % len(LAYERS), torch.ones(9 * sizes[1], dtype=torch.bool)
        if layer in SEVERAL:
            kept[touched] = False
            sent = (here.keys, here.values)[number // len(LAYERS)][layer].flatten(0, 1)[slots(ours, tokens, sizes[0])]
            got = now.flatten(0, 1)[touched].float()
            largest = sent.float().abs().amax(-1, keepdim=True)
            assert bool(((got - sent.float()).abs() <= largest * tolerance).all())
        assert torch.equal(now.flatten(0, 1)[kept], was.flatten(0, 1)[kept])


def test_bfloat16_of_a_bfloat16_pool_is_a_view_of_it() -> None:
    made = store("bfloat16", 4, 4)
    encoded = made.encoded("bfloat16")
    (plain, *_), (part, *_) = (kept.read(range(1), [1], range(4)) for kept in (made, encoded))
    assert np.shares_memory(np.frombuffer(part, np.uint8), np.frombuffer(plain, np.uint8))
    landing = encoded.landing(range(1), [1], range(4)).parts[0]
    assert np.shares_memory(np.frombuffer(landing, np.uint8), np.frombuffer(plain, np.uint8))


def test_no_encoding_is_the_store_itself() -> None:
    made = store("float32", 2, 4)
    assert made.encoded("") is made
    assert made.encoded("int8").encoded("") is made


def test_an_unknown_encoding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"encoding 'int4' is not one of \['bfloat16', 'float8', 'int8'\]"):
        store("float32", 2, 4).encoded("int4")


class Device:
    """A read that a device does by itself, in its own time."""

    def __init__(self) -> None:
        self.ready = False

    def done(self) -> bool:
        return self.ready

    def wait(self) -> None:
        self.ready = True


@pytest.mark.parametrize("waits", [True, False])
def test_what_a_device_reads_is_encoded_when_it_is_there(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made, device, released = store("float32", 4, 4), Device(), list[bool]()
    encoded, tokens = made.encoded("int8"), range(1, 9)
    expected = b"".join(encoded.read(SEVERAL, [1, 3, 2], tokens))
    assert b"".join(encoded.read_ahead(SEVERAL, [1, 3, 2], tokens).parts) == expected
    reading = Reading(made.read(SEVERAL, [1, 3, 2], tokens), device, lambda: released.append(device.ready))
    monkeypatch.setattr(made, "read_ahead", lambda *_: reading)
    ahead = encoded.read_ahead(SEVERAL, [1, 3, 2], tokens)
    assert ahead.pending is not None
    assert not ahead.pending.done()
    if waits:
        ahead.pending.wait()
    else:
        device.ready = True
    assert ahead.pending.done()
    assert b"".join(ahead.parts) == expected
    assert released == [True]
    ahead.release()


def test_what_is_encoded_is_not_shared_and_waits_as_its_memory_does() -> None:
    kept = FakeStore(KvGeometry(LAYERS, "float32"))
    kept.still_landing = Device()
    encoded = kept.encoded("int8")
    assert encoded.shared is None
    assert encoded.landed() is kept.still_landing
    assert encoded.written(SEVERAL) is None
    encoded.landings_follow_engine()
    encoded.engine_follows_landings()
    assert kept.fences == ["landings follow", "engine follows"]


@pytest.mark.parametrize("encoding", ["bfloat16", "int8"])
def test_a_checksum_is_that_of_the_encoded_payload(encoding: str) -> None:
    geometry = KvGeometry((LayerGeometry(2, 3, 2),), "bfloat16")
    memory = TorchKvStore(geometry, 3, 4, torch.device("cpu"))
    for tensor in [*memory.keys, *memory.values]:
        tensor.copy_(torch.randn(tensor.shape))
    store = memory.encoded(encoding)
    payload = b"".join(store.read(range(1), [2, 0], range(1, 7)))
    assert store.checksum(range(1), [2, 0], range(1, 7)) == crc32c(payload)
    with pytest.raises(UnavailableError, match="encoded on its way"):
        store.map_foreign(-1, memory.layout)
