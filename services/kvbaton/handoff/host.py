"""Who this process is to peers that might share memory with it."""

import os
from pathlib import Path

from kvbaton.v1 import types_pb2 as types

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NETWORK_NAMESPACE = Path("/proc/self/ns/net")


def host_identity(gpu_uuids: tuple[str, ...] = ()) -> types.HostIdentity:
    """Boot id and network namespace of this process; empty and 0 where the system has none."""
    boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    namespace = os.stat(_NETWORK_NAMESPACE).st_ino if _NETWORK_NAMESPACE.exists() else 0
    return types.HostIdentity(boot_id=boot_id, network_namespace=namespace, gpu_uuids=gpu_uuids)
