"""Who this process is to peers that might share memory with it."""

import os
from pathlib import Path

from kvbaton.v1 import types_pb2 as types

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SHARED_MEMORY = Path("/dev/shm")


def host_identity(gpu_uuids: tuple[str, ...] = ()) -> types.HostIdentity:
    """Boot id and shared-memory mount of this process; empty and 0 where the system has none."""
    boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    device = os.stat(_SHARED_MEMORY).st_dev if _SHARED_MEMORY.exists() else 0
    return types.HostIdentity(boot_id=boot_id, shared_memory_device=device, gpu_uuids=gpu_uuids)
