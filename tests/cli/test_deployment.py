"""How a deployment starts and follows its processes, with stand-ins for the services."""

import asyncio
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from kvbaton.cli import deployment as module
from kvbaton.cli.deployment import Process, UpConfig, deployed
from kvbaton.engine.errors import StartupError
from kvbaton.rpc.errors import root_cause

LIVES = "import sys; print('127.0.0.1:1', flush=True); sys.stdin.read()"
DIES = "import sys; print('127.0.0.1:1', flush=True); sys.exit('out of memory')"
LOADS_FOR_EVER = "import sys; sys.stdin.read()"
FAILS = "import sys; sys.exit('no such model')"


async def start(name: str, script: str) -> Process:
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-S", "-c", script)
    return Process(name, await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe))


@pytest.mark.parametrize(
    ("scripts", "culprit", "word"),
    [
        ({"prefill": FAILS}, "prefill-1", "no such model"),
        ({"prefill": LOADS_FOR_EVER, "decode": FAILS}, "decode-1", "no such model"),
        ({"decode": DIES}, "decode-1", "out of memory"),
        ({"router": DIES}, "router", "out of memory"),
    ],
    ids=["before it is ready", "while another one loads", "before the router is healthy", "router"],
)
async def test_a_process_that_ends_before_all_are_ready_is_named_after_its_last_words(
    monkeypatch: pytest.MonkeyPatch, scripts: dict[str, str], culprit: str, word: str
) -> None:
    async def stand_in(kind: str, name: str, flags: Sequence[str], environment: Mapping[str, str]) -> Process:
        return await start(name, scripts.get(kind, LIVES))

    log: list[str] = []
    monkeypatch.setattr(module, "_start", stand_in)
    deployment = deployed(UpConfig(port=0, grace_seconds=0), lambda name, line: log.append(f"{name}: {line}"))
    async with asyncio.timeout(20):
        with pytest.raises(BaseExceptionGroup) as caught:
            await deployment.__aenter__()
    error = root_cause(caught.value)
    assert isinstance(error, StartupError)
    assert str(error) == f"{culprit} ended before the deployment was ready (exit code 1)"
    assert f"{culprit}: {word}" in log


async def test_a_router_port_in_use_is_found_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(*_: Any) -> Process:
        pytest.fail("it was started")

    monkeypatch.setattr(module, "_start", nothing)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{port}: address already in use"):
            await deployed(UpConfig(port=port), lambda *_: None).__aenter__()


async def test_each_kind_gets_its_options_and_the_router_their_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Sequence[str]] = {}

    async def stand_in(kind: str, name: str, flags: Sequence[str], environment: Mapping[str, str]) -> Process:
        started[name] = flags
        return await start(name, f"import sys; print('127.0.0.1:{len(started)}', flush=True); sys.stdin.read()")

    async def serving(address: str) -> None:
        assert address == "127.0.0.1:5"

    monkeypatch.setattr(module, "_start", stand_in)
    monkeypatch.setattr(module, "wait_until_serving", serving)
    config = UpConfig(
        port=0, prefill=1, decode=1, unified=2, max_prefill_tokens=64, max_decode_seqs=3, trust_remote_code=True
    )
    async with asyncio.timeout(20), deployed(config, lambda *_: None) as deployment:
        assert [process.name for process in deployment.processes] == list(started)[-1:] + list(started)[:-1]
    assert list(started) == ["prefill-1", "decode-1", "worker-1", "worker-2", "router"]
    both = {"--max-prefill-tokens=64", "--max-decode-seqs=3"}
    assert [both & set(flags) for flags in started.values()] == [
        {"--max-prefill-tokens=64"},
        {"--max-decode-seqs=3"},
        both,
        both,
        set(),
    ]
    # Four of them divide the machine's memory.
    shared = {"--memory-share=0.250", "--trust-remote-code"}
    assert [shared <= set(flags) for flags in started.values()] == [True, True, True, True, False]
    addresses = {"--prefill=127.0.0.1:1", "--decode=127.0.0.1:2", "--workers=127.0.0.1:3,127.0.0.1:4"}
    assert addresses <= set(started["router"])


@pytest.mark.parametrize("kinds", [{"prefill": 0}, {"decode": 0}, {"prefill": 0, "decode": 0}])
async def test_a_deployment_that_could_not_answer_is_refused(kinds: dict[str, Any]) -> None:
    with pytest.raises(StartupError, match="--prefill, --decode: one of each is needed, or --unified workers"):
        await deployed(UpConfig(port=0, **kinds), lambda *_: None).__aenter__()


async def followed(script: str) -> list[str]:
    lines: list[str] = []
    exits: asyncio.Queue[Any] = asyncio.Queue()
    process = await start("decode-1", script)
    async with asyncio.timeout(20):
        await module._follow(process, lambda name, line: lines.append(f"{name}: {line}"), exits)
        await process.process.communicate()
    assert exits.get_nowait() is process
    return lines


async def test_a_line_of_any_length_is_cut_and_the_next_one_is_whole() -> None:
    lines = await followed("import sys; sys.stderr.write('a' * (3 << 20) + '\\nnext\\n' + 'b' * (3 << 20))")
    assert lines == [
        "decode-1: " + "a" * module.MAX_LINE_BYTES + " …",
        "decode-1: next",
        "decode-1: " + "b" * module.MAX_LINE_BYTES + " …",
    ]


async def test_lines_are_shown_as_they_were_written() -> None:
    script = "import sys; sys.stderr.buffer.write(b'one \\r\\n\\n\\xff\\xc3\\xa4\\nlast')"
    assert await followed(script) == ["decode-1: one", "decode-1: ", "decode-1: \ufffdä", "decode-1: last"]
