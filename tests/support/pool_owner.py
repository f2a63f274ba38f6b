"""A process with a shared pool, for tests to kill.

    python -m support.pool_owner SOCKET LINK_ID_HEX

Writes a `LinkHello` that describes its pool as a line of hexadecimal digits, and another line once the receiver has
taken its memory. It then waits to be killed.
"""

import asyncio
import sys
import time

import torch

from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.handoff.shared_memory import SharedMemoryPool
from kvbaton.model.store import TorchKvStore
from kvbaton.v1 import kv_transfer_pb2 as pb

GEOMETRY = KvGeometry((LayerGeometry(2, 48, 16),) * 4, "bfloat16")
BLOCK_SIZE, NUM_BLOCKS = 16, 256


def fill(store: TorchKvStore) -> None:
    """The same numbers in every process."""
    generator = torch.Generator().manual_seed(5)
    for tensor in [*store.keys, *store.values]:
        tensor.copy_(torch.randn(tensor.shape, generator=generator))


def main() -> None:
    """See above."""
    name, link_id = sys.argv[1], bytes.fromhex(sys.argv[2])
    store = TorchKvStore(GEOMETRY, NUM_BLOCKS, BLOCK_SIZE, torch.device("cpu"), shared=True)
    fill(store)
    assert store.shared is not None
    pool, hello = SharedMemoryPool(store.shared), pb.LinkHello()
    pool.describe(hello)
    sys.stdout.write(hello.SerializeToString().hex() + "\n")
    sys.stdout.flush()
    asyncio.run(pool.hand_over(pb.LinkWelcome(link_id=link_id, descriptor_socket=name)))
    sys.stdout.write("taken\n")
    sys.stdout.flush()
    time.sleep(600)


if __name__ == "__main__":
    main()
