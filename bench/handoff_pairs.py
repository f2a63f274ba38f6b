"""Pairs of processes between which KV moves, one for each system that bench/handoff.py compares."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.handoff_load import Answer, Load

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(__file__).resolve().parent / "peers"


@dataclass(frozen=True)
class Program:
    """What both processes of a pair run."""

    name: str
    python: Path
    script: str
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def installed(self) -> bool:
        """Whether its environment is there."""
        return self.python.exists()

    def version(self, distribution: str) -> str:
        """Of a package in its environment."""
        if not self.installed:
            return "not installed"
        code = f"from importlib.metadata import version; print(version({distribution!r}))"
        return subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=False).stdout.strip()


@dataclass(frozen=True)
class System:
    """One way to move KV, as the tables name it; of several `ways` the best counts."""

    name: str
    program: str
    ways: tuple[str, ...]
    alone: bool = False
    """Done by the decode side by itself."""


def programs(peers: Path) -> list[Program]:
    """All pairs, whether they can run here or not; the peers' environments are in `peers`."""
    nixl, mooncake = peers / "nixl", peers / "mooncake"
    quiet = {"NIXL_LOG_LEVEL": "ERROR", "UCX_LOG_LEVEL": "error"}
    pool = {"MC_TCP_ENABLE_CONNECTION_POOL": "true", "MC_TCP_SLICE_SIZE": str(1 << 20)}
    libraries = {"LD_LIBRARY_PATH": str(mooncake / "lib" / "verbs")}
    return [
        Program("kvbaton", Path(sys.executable), "handoff_kvbaton.py"),
        Program("nixl tcp", nixl / "bin" / "python", "handoff_nixl.py", {"UCX_TLS": "tcp", **quiet}),
        Program("nixl", nixl / "bin" / "python", "handoff_nixl.py", {"UCX_TLS": "all", **quiet}),
        Program("mooncake", mooncake / "bin" / "python", "handoff_mooncake.py", {**pool, **libraries}),
    ]


NIXL_WAYS = ("write per block", "write coalesced", "read per block", "read coalesced")
SYSTEMS = (
    System("raw TCP", "kvbaton", ("tcp", "tcp, 4 MiB")),
    System("kvbaton grpc", "kvbaton", ("grpc",)),
    System("NIXL TCP", "nixl tcp", NIXL_WAYS),
    System("Mooncake TCP", "mooncake", ("per block", "coalesced")),
    System("memcpy", "kvbaton", ("memcpy",), alone=True),
    System("kvbaton shared_memory", "", ("shared_memory",)),
    System("NIXL shared memory", "nixl", NIXL_WAYS),
    System("CRC32C", "kvbaton", ("crc32c",), alone=True),
)


@dataclass
class Times:
    """Where the time of one load's transfers went."""

    rates: list[float]
    """Bytes a second, of each."""
    prefill_cpu: float
    """Seconds of processor time for a byte, user's and kernel's, of all threads."""
    decode_cpu: float


class Process:
    """One end of a pair, waiting for requests."""

    def __init__(self, name: str, process: "subprocess.Popen[str]") -> None:
        self._name = name
        self._process = process
        self.answer()

    def ask(self, verb: str, arguments: Mapping[str, Any] | None = None) -> Answer:
        """Request and answer."""
        self.request(verb, arguments)
        return self.answer()

    def request(self, verb: str, arguments: Mapping[str, Any] | None = None) -> None:
        """Ask, and do not wait."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": verb, **(arguments or {})}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Answer:
        """The answer to the oldest request that has none yet."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("#{"):
                answer: Answer = json.loads(line[1:])
                return answer
        raise SystemExit(f"{self._name} ended with {self._process.wait()}; see its output above")


class Pair:
    """Both ends, connected."""

    def __init__(self, sender: Process, receiver: Process) -> None:
        self._sender, self._receiver = sender, receiver
        self._sender.request("connect", self._receiver.ask("open"))
        self._receiver.ask("peer", self._sender.answer())

    def move(self, load: Load, *, alone: bool = False) -> Times:
        """Do a load's transfers and say how long they took.

        A transfer ends when the decode side knows that all of it is in its pool; where the prefill side says when it
        knew that itself, which is later, that counts.
        """
        armed = self._receiver.ask("arm", vars(load))
        # It waits already when the first byte leaves.
        self._receiver.request("finish")
        nothing: Answer = {"begins": [], "ends": [], "cpu": 0.0}
        sent = nothing if alone else self._sender.ask("send", {**vars(load), **armed})
        received = self._receiver.answer()
        begins, ends = sent["begins"] or received["begins"], sent["ends"] or received["ends"]
        return Times(
            rates=[load.num_bytes / (end - begin) * 1e9 for begin, end in zip(begins, ends, strict=True)],
            prefill_cpu=sent["cpu"] / load.num_bytes / load.repeats,
            decode_cpu=received["cpu"] / load.num_bytes / load.repeats,
        )

    def check(self, load: Load) -> None:
        """Raises SystemExit when a load that was moved is not what the decode side has; wipes it there."""
        sent, received = self._sender.ask("check", vars(load)), self._receiver.ask("check", vars(load))
        if sent != received:
            raise SystemExit(f"{load}: the decode side's pool differs from the prefill side's")


@contextmanager
def started(programs: Sequence[Program], cores: Sequence[int], num_blocks: int) -> Iterator[dict[str, Pair]]:
    """The pairs that can run here, by name: prefill side on the first core, decode side on the last.

    Their pools have `num_blocks` blocks. They end with the block.
    """
    with ExitStack() as stack:
        pairs = {}
        for program in programs:
            if not program.installed:
                sys.stderr.write(f"{program.name} is left out: no environment at {program.python.parent.parent}\n")
                continue
            sender = stack.enter_context(_process(program, cores[0], "from", num_blocks))
            receiver = stack.enter_context(_process(program, cores[-1], "to", num_blocks))
            pairs[program.name] = Pair(sender, receiver)
        yield pairs


@contextmanager
def _process(program: Program, core: int, side: str, num_blocks: int) -> Iterator[Process]:
    paths = ":".join(str(path) for path in (PEERS.parent, ROOT / "services", ROOT / "gen"))
    variables = [f"PYTHONPATH={paths}", *(f"{name}={value}" for name, value in program.environment.items())]
    command = [str(program.python), str(PEERS / program.script), side, str(num_blocks)]
    pinned = ["env", *variables, "taskset", "-c", str(core), *command]
    # Mooncake's log is long, and the reason for an end is in the answers.
    errors = subprocess.DEVNULL if program.name == "mooncake" else None
    with subprocess.Popen(pinned, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        try:
            yield Process(f"{program.name}, {side}", process)
        finally:
            process.kill()
