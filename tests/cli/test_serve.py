"""How a service's process starts, fails to start, and ends."""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvbaton.cli import serve as module
from kvbaton.cli.serve import CannotStart, run_service
from kvbaton.engine.errors import InvalidArgumentError, StartupError
from kvbaton.router.config import RouterConfig
from kvbaton.rpc.serving import Server, serving


@pytest.fixture(autouse=True)
def _logging_and_tracing_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest's own handlers must stay, and the test process is no traced service.
    monkeypatch.setattr(module, "set_up_logging", lambda: None)
    monkeypatch.setattr(module, "setup_tracing", lambda *_, **__: lambda: None)


def run_it(serve: Any, supervised: bool = False) -> None:
    run_service("router", RouterConfig(), serve, supervised)


def kvbaton(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "kvbaton.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False)


def test_a_missing_model_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = kvbaton("prefill", "--model", str(tmp_path / "nowhere"), "--port", "0")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == f"Error: model directory '{tmp_path}/nowhere' does not exist"
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        workers = ["--prefill", "127.0.0.1:1", "--decode", "127.0.0.1:2"]
        # An empty folder: a model without a tokenizer is a router's model, too.
        done = kvbaton("router", *workers, "--port", str(port), "--model", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"Error: cannot listen on 127.0.0.1:{port}: address already in use"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("nested", [False, True])
def test_a_startup_error_is_for_the_operator_even_within_a_group(nested: bool) -> None:
    async def serve(*_: Any) -> None:
        error = StartupError("the pool is too small")
        if nested:
            raise ExceptionGroup("tasks", [ExceptionGroup("inner", [error])])
        raise error

    with pytest.raises(CannotStart) as caught:
        run_it(serve)
    assert (caught.value.message, caught.value.exit_code) == ("the pool is too small", 2)


@pytest.mark.parametrize("error", [ValueError("a bug"), InvalidArgumentError("field", "a bug")])
def test_any_other_error_keeps_its_traceback(error: Exception) -> None:
    async def serve(*_: Any) -> None:
        raise error

    with pytest.RaisesGroup(pytest.RaisesExc(type(error), match="a bug")):
        run_it(serve)


def test_tracing_is_shut_down_however_the_service_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    def setup(service: str, instance: str, *, enabled: bool) -> Any:
        log.append(f"{service} {instance == str(os.getpid())} {enabled}")
        return lambda: log.append("shut down")

    async def serve(*_: Any) -> None:
        raise StartupError("no")

    monkeypatch.setattr(module, "setup_tracing", setup)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    with pytest.raises(CannotStart):
        run_it(serve)
    assert log == ["kvbaton-router True False", "shut down"]


def test_sigterm_sets_the_stop_event_and_the_service_returns() -> None:
    ended: list[RouterConfig] = []

    async def serve(config: RouterConfig, stop: asyncio.Event, started: "asyncio.Future[Server]") -> None:
        async with serving([], "127.0.0.1", 0, grace_seconds=0) as server:
            started.set_result(server)
            os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(10):
                await stop.wait()
        ended.append(config)

    run_it(serve)
    assert ended == [RouterConfig()]


def test_a_supervised_service_tells_its_address_and_ends_with_its_standard_input(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    addresses: list[str] = []

    async def serve(config: RouterConfig, stop: asyncio.Event, started: "asyncio.Future[Server]") -> None:
        async with asyncio.timeout(10), serving([], "127.0.0.1", 0, grace_seconds=0) as server:
            assert not started.done()
            started.set_result(server)
            addresses.append(server.address)
            assert not stop.is_set()
            os.close(write)
            await stop.wait()

    # The loop closes the pipe.
    with os.fdopen(read, closefd=False) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        run_it(serve, supervised=True)
    assert capfd.readouterr().out == f"{addresses[0]}\n"


def test_a_supervised_service_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()

    async def serve(*_: Any) -> None:
        await asyncio.sleep(0)
        raise StartupError("no memory")

    with os.fdopen(read, closefd=False) as stdin, os.fdopen(write, "w"):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(CannotStart, match="no memory"):
            run_it(serve, supervised=True)


def test_libraries_log_their_errors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    levels = {name: logging.getLogger(name).level for name in ("httpx", "huggingface_hub", "transformers")}
    try:
        module.set_up_logging()
        assert {logging.getLogger(name).level for name in levels} == {logging.ERROR}
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
