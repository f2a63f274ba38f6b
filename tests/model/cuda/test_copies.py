"""KV gathered for a copy and scattered after one is what a store on the host reads and writes."""

import numpy as np
import torch

from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.handoff.landing import fill
from kvbaton.model.cuda.copies import gather, scatter
from kvbaton.model.store import TorchKvStore


def test_gather_and_scatter_are_the_stores_layout() -> None:
    geometry = KvGeometry((LayerGeometry(2, 3, 2), LayerGeometry(1, 4, 4)), "bfloat16")
    store = TorchKvStore(geometry, 5, 4, torch.device("cpu"))
    blocks, tokens = [3, 1], range(2, 7)
    payload = np.random.default_rng(0).bytes(geometry.span_bytes(0, 2, len(tokens)))
    fill(store.landing(range(2), blocks, tokens), payload)
    rows = [
        tensor.view(torch.int16).flatten(0, 1).flatten(1)
        for pair in zip(store.keys, store.values, strict=True)
        for tensor in pair
    ]
    slots = torch.tensor([blocks[token // 4] * 4 + token % 4 for token in tokens])
    gathered = gather(rows, slots)
    assert gathered.numpy().tobytes() == payload
    scatter(rows, torch.tensor([0, 8, 1, 16, 19]), gathered.flip(0))
    assert gather(rows, torch.tensor([0, 8, 1, 16, 19])).equal(gathered.flip(0))
