"""Running one service in this process: log, traces, event loop, signals, and how it ends."""

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click

from kvbaton.cli.options import check_environment
from kvbaton.engine.errors import StartupError
from kvbaton.rpc.errors import root_cause
from kvbaton.rpc.serving import Server, run, termination_event
from kvbaton.rpc.telemetry import setup_tracing, tracing_requested

C = TypeVar("C")
Serve = Callable[[C, asyncio.Event, "asyncio.Future[Server]"], Coroutine[Any, Any, None]]

EXIT_CANNOT_START = 2


class CannotStart(click.ClickException):
    """A start that failed for a reason that the operator can mend: one line, exit code 2."""

    exit_code = EXIT_CANNOT_START


def set_up_logging() -> None:
    """Lines that a person can read, on standard error."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)-7s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    for name in ("httpx", "huggingface_hub", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def limit_threads(threads: int) -> None:
    """Let libraries start `threads` threads of computation and no more. Call it before torch and numpy are imported.

    torch's own setting holds for the thread that makes it: a product in another thread, if it is the first thing there,
    would still be shared among all cores. OpenMP and the BLAS libraries read these variables when they are loaded.
    """
    number = str(threads)
    os.environ.update(  # noqa: TID251
        OMP_NUM_THREADS=number,
        MKL_NUM_THREADS=number,
        RAYON_NUM_THREADS=number,
        # numpy multiplies nothing here, and would start its threads all the same.
        OPENBLAS_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        # transformers' four threads that read a checkpoint.
        HF_DEACTIVATE_ASYNC_LOAD="1",
    )


def run_service(name: str, config: C, serve: "Serve[C]", supervised: bool) -> None:
    """Serve until SIGTERM or SIGINT. Raises CannotStart, which click prints without a traceback.

    A supervised service prints its address to standard output when it is ready, and ends when its standard input does:
    it never outlives the `kvbaton up` that started it.
    """
    set_up_logging()
    try:
        check_environment(name, type(config), os.environ)  # noqa: TID251
        enabled = tracing_requested(os.environ)  # noqa: TID251
        shut_down_tracing = setup_tracing(f"kvbaton-{name}", str(os.getpid()), enabled=enabled)
        try:
            run(_serve(config, serve, supervised))
        finally:
            shut_down_tracing()
    except Exception as error:
        cause = root_cause(error)
        if not isinstance(cause, StartupError):
            raise
        raise CannotStart(str(cause)) from error


async def _serve(config: C, serve: "Serve[C]", supervised: bool) -> None:
    stop = termination_event()
    started: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        watching = [group.create_task(_leave_while_loading(stop, started))]
        if supervised:
            watching.append(group.create_task(_announce(started)))
            watching.append(group.create_task(_end_with_supervisor(stop)))
        await serve(config, stop, started)
        for task in watching:
            task.cancel()


async def _leave_while_loading(stop: asyncio.Event, started: "asyncio.Future[Server]") -> None:
    await stop.wait()
    if not started.done():
        # The thread that loads a model cannot be interrupted, the interpreter's end would wait for it, and nobody has
        # been served yet who could lose anything.
        logging.shutdown()
        os._exit(0)


async def _announce(started: "asyncio.Future[Server]") -> None:
    server = await started
    sys.stdout.write(f"{server.address}\n")
    sys.stdout.flush()


async def _end_with_supervisor(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        await reader.read()
        stop.set()
    finally:
        # uvloop leaves it open at the end of the file.
        transport.close()
