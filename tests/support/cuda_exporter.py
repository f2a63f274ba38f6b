"""A process of its own with a pool on the GPU, which it exports and fills: the sending side of cuda_ipc."""

import multiprocessing
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from kvbaton.engine.geometry import KvGeometry
from kvbaton.model.store import TorchKvStore
from kvbaton.v1 import kv_transfer_pb2 as pb
from kvbaton.worker.cuda_sharing import cuda_shared_pool

PATIENCE = 120.0
"""Seconds: another process has to import torch and make a CUDA context."""


class Exporter:
    """Commands for the other process. Ends it when the block ends."""

    def __init__(self, geometry: KvGeometry, num_blocks: int, block_size: int) -> None:
        self._connection, self._theirs = multiprocessing.Pipe()
        arguments = self._theirs, geometry, num_blocks, block_size
        self.process = multiprocessing.get_context("spawn").Process(target=_serve, args=arguments, daemon=True)

    def __enter__(self) -> "Exporter":
        self.process.start()
        # Or nobody would notice that the process has ended.
        self._theirs.close()
        self.hello = pb.LinkHello.FromString(self._answer())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    def ask(self, *command: Any) -> Any:
        """Do `command` there: ("read", layers, blocks, tokens), ("probe", pattern) or ("fill", byte)."""
        self._connection.send(command)
        return self._answer()

    def kill(self) -> None:
        """End it as the kernel does when memory is out."""
        self.process.kill()
        self.process.join(PATIENCE)
        assert self.process.exitcode == -signal.SIGKILL

    def _answer(self) -> Any:
        assert self._connection.poll(PATIENCE), "the exporting process does not answer"
        return self._connection.recv()


def _serve(connection: Connection, geometry: KvGeometry, num_blocks: int, block_size: int) -> None:
    store = TorchKvStore(geometry, num_blocks, block_size, torch.device("cuda"), shared=True)
    generator = torch.Generator("cuda").manual_seed(1)
    store.memory.tensor.random_(0, 256, generator=generator)
    torch.cuda.synchronize()
    pool = cuda_shared_pool(store)
    assert pool is not None
    hello = pb.LinkHello(incarnation="exporter", transports=["cuda_ipc"])
    pool.describe(hello)
    connection.send(hello.SerializeToString())
    while True:
        try:
            name, *arguments = connection.recv()
        except EOFError:
            return
        if name == "read":
            connection.send(read(store, *arguments))
        elif name == "probe":
            pool.write_probe(*arguments)
            connection.send(None)
        else:
            store.memory.tensor.fill_(*arguments)
            torch.cuda.synchronize()
            connection.send(None)


def read(store: TorchKvStore, layers: range, blocks: Sequence[int], tokens: range) -> bytes:
    """A payload."""
    return b"".join(store.read(layers, blocks, tokens))
