"""How much memory there is to be had: a CUDA device's, or the host's within the limits of its control groups."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kvbaton.engine.errors import StartupError


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a memory, and those that a process can still have."""

    total: int
    available: int


def memory_of(device: torch.device) -> Memory:
    """What `device` has now; for a CPU, the host's."""
    if device.type == "cuda":
        # What torch keeps of what was freed is to be had, by others than torch too.
        torch.cuda.empty_cache()
        available, total = torch.cuda.mem_get_info(device)
        return Memory(total, available)
    return host_memory()


def host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Memory:
    """The host's memory, or what the tightest control group around this process leaves of it.

    Caches of files count as available, by the kernel's own estimate (MemAvailable). Where there is no /proc all of the
    physical memory is said to be available.
    """
    memory = _whole_host(proc)
    for folder, limit_file, usage_file, prefix in _control_groups(proc, cgroups):
        limit = _number(folder / limit_file)
        usage = _number(folder / usage_file)
        if limit is None or usage is None or limit >= memory.total:
            continue
        cached = _fields(folder / "memory.stat")
        usage -= cached.get(f"{prefix}active_file", 0) + cached.get(f"{prefix}inactive_file", 0)
        memory = Memory(limit, max(0, min(memory.available, limit - usage)))
    return memory


def check_fits(purpose: str, needed: int, memory: Memory, device: torch.device) -> None:
    """Raise StartupError, beginning with `purpose`, when `needed` bytes are more than `memory` has available.

    Linux grants memory that it does not have, and kills the process when it is used: better to ask before.
    """
    if needed > memory.available:
        raise StartupError(
            f"{purpose} {readable(needed)}, and {device} has {readable(memory.available)} available of "
            f"{readable(memory.total)}"
        )


def readable(num_bytes: int) -> str:
    """For people: "1.88 GiB", "64.0 MiB"."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _whole_host(proc: Path) -> Memory:
    fields = {name: kilobytes * 1024 for name, kilobytes in _fields(proc / "meminfo").items()}
    if "MemTotal:" not in fields:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Memory(physical, physical)
    return Memory(fields["MemTotal:"], fields.get("MemAvailable:", fields["MemTotal:"]))


def _control_groups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Folder, limit file, usage file and prefix in memory.stat of each group around this process, version 2 and 1.

    In a container the path that the kernel tells may be the host's, and only its end, or the root alone, exist here.
    """
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = cgroups, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            root, files = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            yield (group, *files)
            if group == root:
                break


def _number(path: Path) -> int | None:
    """The file's number; None without a file, or for "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _fields(path: Path) -> dict[str, int]:
    """Lines of "name number [unit]"."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
