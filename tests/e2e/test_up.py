"""`kvbaton up` as a person runs it: 200 requests at once, each with the tokens that it has alone; Ctrl-C ends it."""

import asyncio
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from kvbaton.client import AsyncClient, GenerateOptions
from support import tiny_models

NUM_REQUESTS = 200
MAX_TOKENS = 16


@asynccontextmanager
async def kvbaton_up(*flags: str) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvbaton.cli.main", "up", "--port=0", *flags, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    log = []
    try:
        async with asyncio.timeout(120):
            async for line in process.stderr:
                log.append(line.decode())
                ready = re.search(r"Ready\. Ask: .* --router (\S+)", log[-1])
                if ready:
                    break
            else:
                raise AssertionError("kvbaton up ended:\n" + "".join(log))
        yield ready.group(1), process
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(30):
            await process.stderr.read()
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_200_requests_at_once(tmp_path: Path) -> None:
    folder = tiny_models.save_tiny_model("llama", tmp_path)
    prompts = tiny_models.random_prompts([1 + n % 120 for n in range(NUM_REQUESTS)], seed=11)
    async with kvbaton_up(f"--model={folder}", "--dtype=float32", "--kv-memory=8MiB") as (address, process):
        async with AsyncClient(address) as client:

            async def ask(number: int) -> tuple[int, ...]:
                options = GenerateOptions(max_tokens=MAX_TOKENS, ignore_eos=True, seed=number, timeout=120)
                if number % 2:
                    options |= {"temperature": 0.8, "top_p": 0.95}
                generation = client.generate(prompts[number], **options)
                return (await generation.result()).token_ids

            async with asyncio.TaskGroup() as group:
                together = [group.create_task(ask(number)) for number in range(NUM_REQUESTS)]
            alone = [await ask(number) for number in range(NUM_REQUESTS)]
        assert [task.result() for task in together] == alone
        assert all(len(tokens) == MAX_TOKENS for tokens in alone)
    assert process.returncode == 0
