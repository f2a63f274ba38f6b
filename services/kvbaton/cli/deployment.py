"""A whole deployment on this machine: workers and a router as child processes, started and stopped together."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from kvbaton.cli.health import wait_until_serving
from kvbaton.engine.errors import StartupError
from kvbaton.rpc.config import grace_option, option, port_option
from kvbaton.rpc.serving import probe
from kvbaton.text.bundled import DEFAULT_MODEL
from kvbaton.worker.config import kv_encoding_option

MAX_LINE_BYTES = 8192
"""How much of a log line is shown."""

_CHUNK_BYTES = 1 << 16

LogLine = Callable[[str, str], None]
"""Told a process's name and one line of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpConfig:
    """Options of `kvbaton up`."""

    model: str = option(DEFAULT_MODEL, "Model: a local directory, a hub name, or the bundled baton-tiny.")
    prefill: int = option(1, "Prefill workers.", minimum=0)
    decode: int = option(1, "Decode workers.", minimum=0)
    unified: int = option(0, "Workers that do both, beside the others or instead of them.", minimum=0)
    host: str = option("127.0.0.1", "Address of the router.")
    port: int = port_option(7000, "Port of the router; 0 takes a free one.")
    dtype: str = option("auto", "Element type of weights and KV.", ("auto", "float32", "bfloat16"))
    device: str = option("cpu", "Where to compute: cpu, cuda or cuda:N.")
    threads: int = option(1, "Threads of computation of each worker on a CPU.", minimum=1, maximum=1024)
    block_size: int = option(
        0,
        "Tokens in one KV block. 0: 16 on a CPU, 256 on a GPU, whose kernel takes multiples of it.",
        minimum=0,
        maximum=4096,
    )
    kv_memory: str = option("auto", "Memory for each worker's KV pool; auto divides what the device has among them.")
    trust_remote_code: bool = option(False, "Run code that comes with the model, with all rights of the workers.")
    max_prefill_tokens: int = option(
        0, "Prompt tokens a worker computes in one step. 0: 2048 on prefill workers, 512 on unified ones.", minimum=0
    )
    max_decode_seqs: int = option(256, "Sequences a worker steps together.", minimum=1)
    kv_encoding: str = kv_encoding_option()
    grace_seconds: float = grace_option("After Ctrl-C: seconds for running requests to finish.")


@dataclass(slots=True)
class Process:
    """One running service."""

    name: str
    process: asyncio.subprocess.Process
    address: str = ""
    """host:port, once it is ready."""

    @property
    def pid(self) -> int:
        """Process id, for signals."""
        return self.process.pid


@dataclass(slots=True)
class Deployment:
    """Running services by kind."""

    prefill: list[Process] = field(default_factory=list)
    decode: list[Process] = field(default_factory=list)
    unified: list[Process] = field(default_factory=list)
    router: Process | None = None
    exits: "asyncio.Queue[Process]" = field(default_factory=asyncio.Queue)
    """Services that have ended, in order; as many as were started at the most."""

    @property
    def address(self) -> str:
        """The router's host:port."""
        assert self.router is not None
        return self.router.address

    @property
    def processes(self) -> list[Process]:
        """All of them, in the order in which they are stopped."""
        return [*([self.router] if self.router else []), *self.prefill, *self.decode, *self.unified]

    async def first_exit(self) -> Process:
        """Wait until any service ends, and return it."""
        return await self.exits.get()


@asynccontextmanager
async def deployed(
    config: UpConfig, on_line: LogLine, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Deployment]:
    """Start everything, wait until it is ready, and stop it when the block ends.

    `environment` is added to this process's own. Raises StartupError when nobody would prefill or decode, when the
    router's address cannot be listened on, or when a service ends before all of them are ready; its log lines have said
    why.
    """
    if not config.unified and not (config.prefill and config.decode):
        raise StartupError("--prefill, --decode: one of each is needed, or --unified workers")
    # The router comes last, when the workers have loaded their models.
    await probe(config.host, config.port)
    deployment = Deployment()
    async with asyncio.TaskGroup() as group:

        async def launch(kind: str, name: str, flags: Sequence[str]) -> Process:
            process = await _start(kind, name, flags, environment or {})
            group.create_task(_follow(process, on_line, deployment.exits))
            return process

        try:
            async with asyncio.TaskGroup() as starting:
                watching = starting.create_task(_fail_on_exit(deployment))
                await _start_all(config, deployment, launch)
                watching.cancel()
            yield deployment
        finally:
            await _stop(deployment, config.grace_seconds + 5)


async def _start_all(
    config: UpConfig, deployment: Deployment, launch: Callable[[str, str, Sequence[str]], Awaitable[Process]]
) -> None:
    """Start all workers, then the router, which is told their addresses, and return when it is healthy."""
    shared = _flags(config, "model", "dtype", "device", "threads", "block_size", "kv_memory", "grace_seconds")
    shared.append(f"--memory-share={1 / (config.prefill + config.decode + config.unified):.3f}")
    if config.trust_remote_code:
        shared.append("--trust-remote-code")
    prefill_flags = _flags(config, "kv_encoding")
    if config.max_prefill_tokens:
        prefill_flags += _flags(config, "max_prefill_tokens")
    decode_flags = _flags(config, "max_decode_seqs")
    for kind, number, flags, processes in (
        ("prefill", config.prefill, prefill_flags, deployment.prefill),
        ("decode", config.decode, decode_flags, deployment.decode),
        ("worker", config.unified, prefill_flags + decode_flags, deployment.unified),
    ):
        for serial in range(1, number + 1):
            processes.append(await launch(kind, f"{kind}-{serial}", [*shared, "--port=0", *flags]))
    for process in deployment.processes:
        await _read_address(process)
    router_flags = _flags(config, "model", "host", "port", "grace_seconds")
    for option_name, processes in (
        ("prefill", deployment.prefill),
        ("decode", deployment.decode),
        ("workers", deployment.unified),
    ):
        if processes:
            router_flags.append(f"--{option_name}=" + ",".join(process.address for process in processes))
    deployment.router = await launch("router", "router", router_flags)
    await _read_address(deployment.router)
    await wait_until_serving(deployment.router.address)


async def _fail_on_exit(deployment: Deployment) -> None:
    ended = await deployment.first_exit()
    raise StartupError(f"{ended.name} ended before the deployment was ready (exit code {ended.process.returncode})")


def _flags(config: UpConfig, *names: str) -> list[str]:
    return [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in names]


async def _start(kind: str, name: str, flags: Sequence[str], environment: Mapping[str, str]) -> Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "kvbaton.cli.main",
        kind,
        "--supervised",
        *flags,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},  # noqa: TID251
        # Ctrl-C in a terminal reaches a whole process group; here the parent decides who stops when.
        start_new_session=True,
    )
    return Process(name, process)


async def _follow(process: Process, on_line: LogLine, exits: "asyncio.Queue[Process]") -> None:
    assert process.process.stderr is not None
    # Not by the stream's own lines: one that is longer than its buffer would end the whole deployment.
    rest = b""
    while chunk := await process.process.stderr.read(_CHUNK_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            on_line(process.name, _shown(line))
        rest = rest[: MAX_LINE_BYTES + 1]
    if rest:
        on_line(process.name, _shown(rest))
    await process.process.wait()
    exits.put_nowait(process)


def _shown(line: bytes) -> str:
    text = line[:MAX_LINE_BYTES].decode(errors="replace").rstrip()
    return f"{text} …" if len(line) > MAX_LINE_BYTES else text


async def _read_address(process: Process) -> None:
    """Wait for the line by which a service says that it is ready; for ever if it ends before that."""
    assert process.process.stdout is not None
    line = await process.process.stdout.readline()
    if not line:
        # Whoever watches the exits says so, once the log has been shown to its end.
        await asyncio.get_running_loop().create_future()
    process.address = line.decode().strip()


async def _stop(deployment: Deployment, patience_seconds: float) -> None:
    """Router first, so that nothing new comes in; then workers. Whoever is not gone in time is killed."""
    for process in deployment.processes:
        if process.process.returncode is not None:
            continue
        process.process.send_signal(signal.SIGTERM)
        if process is deployment.router:
            await _wait_or_kill(process, patience_seconds)
    for process in deployment.processes:
        await _wait_or_kill(process, patience_seconds)


async def _wait_or_kill(process: Process, patience_seconds: float) -> None:
    try:
        async with asyncio.timeout(patience_seconds):
            await process.process.wait()
    except TimeoutError:
        process.process.kill()
        await process.process.wait()
