"""The containers' start commands and health probes, run without containers."""

import graphlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvbaton.client import Client

Instructions = list[tuple[str, str]]
Image = Callable[[str, str], Instructions]

HEALTHY_WITHIN_SECONDS = 40.0
PROBE_SECONDS = 10.0
PROBE_EVERY_SECONDS = 0.5
STOPPED_WITHIN_SECONDS = 15.0


@dataclass(frozen=True)
class Machine:
    """This machine in the place of the containers: what of their settings has to be another here."""

    hosts: frozenset[str]
    """Names of services, which are host names in the containers' network."""
    ports: dict[str, str]
    """Free ports here by ports there."""

    def adapt(self, text: str) -> str:
        """A setting with this machine's addresses and ports."""
        text = re.sub(rf"\b({'|'.join(self.hosts)})(?=:\d)", "127.0.0.1", text.replace("0.0.0.0", "127.0.0.1"))
        return re.sub(rf"(?<!\d)({'|'.join(self.ports)})(?!\d)", lambda match: self.ports[match[0]], text)

    def command(self, words: Iterable[str]) -> list[str]:
        """A container's command line as one for this machine."""
        program, *arguments = words
        assert program == "kvbaton"
        return [sys.executable, "-m", "kvbaton.cli.main", *map(self.adapt, arguments)]

    def environment(self, instructions: Instructions, given: dict[str, str | None]) -> dict[str, str]:
        """A container's environment on top of this machine's; what is given without a value comes from outside."""
        outside = {name: value for name, value in os.environ.items() if not name.startswith("KVBATON_")}  # noqa: TID251
        words = [word for name, value in instructions if name == "ENV" for word in shlex.split(value)]
        inside = {name: value for name, _, value in (word.partition("=") for word in words) if name != "PATH"}
        inside.update({name: value for name, value in given.items() if value is not None})
        return {**outside, **{name: self.adapt(value) for name, value in inside.items()}}


@pytest.fixture
def machine(compose: dict[str, Any], image: Image) -> Machine:
    exposed = [port for service in compose["services"] for port in dict(image(service, "cpu"))["EXPOSE"].split()]
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in exposed]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        free = [str(listener.getsockname()[1]) for listener in sockets]
    return Machine(frozenset(compose["services"]), dict(zip(exposed, free, strict=True)))


@contextmanager
def _started(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        # pytest shows it when the test fails.
        sys.stderr.write(f"{log.name}\n{log.read_text()}\n")


def _wait_healthy(process: subprocess.Popen[bytes], probe: list[str], environment: dict[str, str]) -> None:
    deadline = time.monotonic() + HEALTHY_WITHIN_SECONDS
    while True:
        answer = subprocess.run(probe, env=environment, capture_output=True, timeout=PROBE_SECONDS, check=False)
        if answer.returncode == 0:
            return
        assert process.poll() is None, f"{process.args!r} has ended"
        assert time.monotonic() < deadline, f"{probe} says {answer.stdout.decode()!r}"
        time.sleep(PROBE_EVERY_SECONDS)


@pytest.mark.slow
def test_the_deployment_starts_answers_and_stops(
    compose: dict[str, Any], image: Image, machine: Machine, tmp_path: Path
) -> None:
    """In the order of `depends_on`, each service once those that it waits for are healthy."""
    services: dict[str, Any] = compose["services"]
    running: list[subprocess.Popen[bytes]] = []
    order = graphlib.TopologicalSorter({name: service.get("depends_on", {}) for name, service in services.items()})
    order.prepare()
    with ExitStack() as stack:
        while order.is_active():
            ready = order.get_ready()
            environments = {}
            for name in ready:
                instructions = image(name, "cpu")
                environments[name] = machine.environment(instructions, services[name]["environment"])
                words = [*json.loads(dict(instructions)["ENTRYPOINT"]), *services[name]["command"]]
                started = _started(machine.command(words), environments[name], tmp_path / name)
                running.append(stack.enter_context(started))
            for name, process in zip(ready, running[-len(ready) :], strict=True):
                probe = machine.command(services[name]["healthcheck"]["test"][1:])
                _wait_healthy(process, probe, environments[name])
                order.done(name)
        [published] = services["router"]["ports"]
        with Client(machine.adapt("127.0.0.1:" + published.rpartition(":")[2])) as client:
            answer = client.generate([5, 6, 7], max_tokens=4, ignore_eos=True, timeout=30).result()
        assert len(answer.token_ids) == 4
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.wait(STOPPED_WITHIN_SECONDS)
    assert [process.returncode for process in running] == [0, 0, 0]
