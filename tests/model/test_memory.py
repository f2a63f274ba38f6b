"""What memory there is, as the kernel's files tell it."""

from pathlib import Path

import pytest
import torch

from kvbaton.engine.errors import StartupError
from kvbaton.model.memory import Memory, check_fits, host_memory, memory_of

MIB = 1 << 20


class Machine:
    """The files of a made-up machine with 8000 MiB, 6000 of them available."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "meminfo").write_text(
            f"MemTotal: {8000 * 1024} kB\nMemFree: 1 kB\nMemAvailable: {6000 * 1024} kB\nHugePages_Total: 0\n"
        )

    def belongs_to(self, line: str) -> None:
        (self.proc / "self" / "cgroup").write_text(f"12:cpu,cpuacct:/elsewhere\n{line}\n")

    def group(self, path: str, **files: str) -> None:
        folder = self.cgroups / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text + "\n")

    def version_2(self, path: str, limit: str, usage: int, cached: int) -> None:
        stat = f"anon 5\ninactive_file {cached * MIB // 2}\nactive_file {cached * MIB // 2}\nworkingset_refault_anon 0"
        self.group(path, memory__max=limit, memory__current=str(usage * MIB), memory__stat=stat)

    def memory(self) -> tuple[int, int]:
        memory = host_memory(self.proc, self.cgroups)
        return memory.total // MIB, memory.available // MIB


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_control_groups_it_is_the_hosts(machine: Machine) -> None:
    assert machine.memory() == (8000, 6000)


def test_a_group_s_limit_holds_and_its_file_cache_counts_as_available(machine: Machine) -> None:
    machine.belongs_to("0::/pod/worker")
    machine.version_2("pod/worker", str(1000 * MIB), usage=700, cached=400)
    assert machine.memory() == (1000, 700)


def test_of_nested_groups_the_tightest_counts(machine: Machine) -> None:
    machine.belongs_to("0::/pod/worker")
    machine.version_2("pod/worker", "max", usage=700, cached=0)
    machine.version_2("pod", str(2000 * MIB), usage=1950, cached=0)
    machine.version_2("", str(4000 * MIB), usage=2000, cached=0)
    assert machine.memory() == (2000, 50)


def test_a_limit_beyond_the_host_is_none(machine: Machine) -> None:
    machine.belongs_to("4:memory:/pod")
    machine.group("memory/pod", memory__limit_in_bytes=str(2**63 - 4096), memory__usage_in_bytes="1")
    assert machine.memory() == (8000, 6000)


def test_version_1(machine: Machine) -> None:
    machine.belongs_to("4:memory:/pod")
    machine.group(
        "memory/pod",
        memory__limit_in_bytes=str(1000 * MIB),
        memory__usage_in_bytes=str(900 * MIB),
        memory__stat=f"total_inactive_file {300 * MIB}\ntotal_active_file 0\ninactive_file 7",
    )
    assert machine.memory() == (1000, 400)


def test_in_a_container_the_host_s_path_does_not_exist_and_the_root_is_the_group(machine: Machine) -> None:
    machine.belongs_to("0::/system.slice/docker-123.scope")
    machine.version_2("", str(1000 * MIB), usage=100, cached=0)
    assert machine.memory() == (1000, 900)


def test_more_used_than_allowed_is_nothing_available(machine: Machine) -> None:
    machine.belongs_to("0::/pod")
    machine.version_2("pod", str(1000 * MIB), usage=1100, cached=0)
    assert machine.memory() == (1000, 0)


def test_a_machine_without_proc_has_its_physical_memory(tmp_path: Path) -> None:
    memory = host_memory(tmp_path, tmp_path)
    assert memory.total == memory.available > 0


def test_this_machine() -> None:
    memory = memory_of(torch.device("cpu"))
    assert 0 < memory.available < memory.total


def test_a_gpu_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 7))
    assert memory_of(torch.device("cuda")) == Memory(total=7, available=3)


def test_what_fits_passes_and_what_does_not_is_refused() -> None:
    memory = Memory(4 << 30, 1 << 30)
    check_fits("it takes", 1 << 30, memory, torch.device("cpu"))
    with pytest.raises(StartupError, match="^it takes 1.50 GiB, and cpu has 1.00 GiB available of 4.00 GiB$"):
        check_fits("it takes", 3 << 29, memory, torch.device("cpu"))
