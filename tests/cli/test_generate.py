"""`kvbaton generate` against a fake router: what it asks, what it prints where, and its exit codes."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvbaton.cli.main import main
from kvbaton.engine.errors import InvalidArgumentError, OverloadedError
from kvbaton.v1 import inference_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from support.fakes import PATIENCE, FakeRouter, Script, forever, served, token_event


async def hello(request: Any, context: Any) -> None:
    await context.write(pb.GenerateResponse(tokens=token_event(0, 10, text="Grü")))
    await context.write(pb.GenerateResponse(tokens=token_event(1, 11, 12, text="ße [red]")))
    finished = pb.GenerateFinished(
        request_id="r",
        model="fake",
        finish_reason=types.FINISH_REASON_STOP,
        usage=types.Usage(prompt_tokens=5, completion_tokens=3, cached_tokens=1),
        timings=types.Timings(
            time_to_first_token_seconds=0.25,
            total_seconds=0.5,
            transfer=types.TransferStats(payload_bytes=3 << 20),
        ),
        seed=9,
        prefill_worker="p:1",
        decode_worker="d:1",
    )
    await context.write(pb.GenerateResponse(finished=finished))


class Terminal:
    def __init__(self, router: FakeRouter, address: str) -> None:
        self.router, self.address = router, address

    async def run(self, *arguments: str, stdin: str | bytes = "") -> Result:
        """The command with its own event loop, in a thread."""
        command = ["generate", "--router", self.address, *arguments]
        return await asyncio.to_thread(CliRunner().invoke, main, command, stdin)


@asynccontextmanager
async def terminal(script: Script = hello) -> AsyncIterator[Terminal]:
    router = FakeRouter(script)
    async with asyncio.timeout(PATIENCE), served(router) as address:
        yield Terminal(router, address)


async def test_text_goes_to_standard_output_and_the_summary_to_standard_error() -> None:
    async with terminal() as shell:
        result = await shell.run("Who", "is", "it?")
    assert result.exit_code == 0
    assert result.stdout == "Grüße [red]\n"
    assert result.stderr == (
        "[5 prompt + 3 generated tokens, stop; first token 250 ms, total 500 ms; KV 3.00 MiB p:1 -> d:1]\n"
    )
    message = pb.ChatMessage(role="user", content="Who is it?")
    assert shell.router.requests == [pb.GenerateRequest(prompt={"chat": {"messages": [message]}}, sampling={})]


async def test_json_is_one_object_and_nothing_else() -> None:
    async with terminal() as shell:
        result = await shell.run("--json", "hi")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "Grüße" in result.stdout
    assert json.loads(result.stdout) == {
        "text": "Grüße [red]",
        "token_ids": [10, 11, 12],
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "cached_tokens": 1},
        "request_id": "r",
        "model": "fake",
        "seed": 9,
        "time_to_first_token_seconds": 0.25,
        "total_seconds": 0.5,
    }


async def test_options_are_sent_and_what_is_left_out_is_not() -> None:
    options = ["--max-tokens", "3", "--temperature", "0.5", "--top-k", "4", "--top-p", "0.25", "--seed", "0"]
    async with terminal() as shell:
        await shell.run("--raw", *options, "hi")
    sampling = {"max_tokens": 3, "temperature": 0.5, "top_k": 4, "top_p": 0.25, "seed": 0}
    assert shell.router.requests == [pb.GenerateRequest(prompt={"text": "hi"}, sampling=sampling)]


async def test_what_an_answer_must_look_like_is_sent(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"title": "Grüße"}', encoding="utf-8")
    options = ["--min-p", "0.5", "--repetition-penalty", "1.5", "--n", "2", "--stop", "a", "--stop", "b"]
    async with terminal() as shell:
        await shell.run("--raw", *options, "--json-schema", str(schema), "hi")
        await shell.run("--raw", "--json", "--logprobs", "0", "--regex", "a+", "hi")
    first, second = (request.sampling for request in shell.router.requests)
    form = {"json_schema": '{"title": "Grüße"}'}
    assert first == types.SamplingParams(
        min_p=0.5, repetition_penalty=1.5, n=2, stop=["a", "b"], structured_output=form
    )
    assert second == types.SamplingParams(logprobs=0, structured_output={"regex": "a+"})


async def two_answers(request: Any, context: Any) -> None:
    likely = types.TokenLogprobs(token_id=10, logprob=-0.5, rank=1, top_token_ids=[10], top_logprobs=[-0.5])
    for number, text in ((1, "no"), (0, "yes")):
        event = types.TokenEvent(token_ids=[10], text=text, sequence=number, logprobs=[likely], stop="END" * number)
        event.finish_reason = types.FINISH_REASON_STOP
        await context.write(pb.GenerateResponse(tokens=event))
    await context.write(pb.GenerateResponse(finished=pb.GenerateFinished(finish_reason=types.FINISH_REASON_STOP)))


async def test_several_answers_are_printed_one_after_the_other() -> None:
    async with terminal(two_answers) as shell:
        plain = await shell.run("--n", "2", "hi")
        as_json = await shell.run("--n", "2", "--json", "--logprobs", "1", "hi")
    assert plain.stdout == "yes\n\nno\n"
    answer = json.loads(as_json.stdout)
    logprobs = [{"token_id": 10, "logprob": -0.5, "rank": 1, "top": [[10, -0.5]]}]
    first = {"text": "yes", "token_ids": [10], "finish_reason": "stop", "logprobs": logprobs}
    assert answer["sequences"] == [first, {**first, "text": "no", "stop": "END"}]
    assert {name: answer[name] for name in first} == first


@pytest.mark.parametrize("content", [None, b"\xff"])
async def test_a_schema_that_cannot_be_read_is_a_usage_error(tmp_path: Path, content: bytes | None) -> None:
    schema = tmp_path / "schema.json"
    if content is not None:
        schema.write_bytes(content)
    async with terminal() as shell:
        assert (await shell.run("--json-schema", str(schema), "hi")).exit_code == 2
        assert shell.router.requests == []


async def test_logprobs_are_for_scripts() -> None:
    async with terminal() as shell:
        result = await shell.run("--logprobs", "1", "hi")
    assert result.exit_code == 2
    assert "--logprobs needs --json" in result.stderr


async def test_a_prompt_comes_from_standard_input() -> None:
    async with terminal() as shell:
        await shell.run("--raw", "-", stdin="two\nlines\n")
    assert shell.router.requests[0].prompt.text == "two\nlines"


async def test_standard_input_that_is_no_text_is_a_usage_error() -> None:
    async with terminal() as shell:
        result = await shell.run("-", stdin=b"\xff\xfe")
    assert result.exit_code == 2
    assert "standard input is no text" in result.stderr
    assert shell.router.requests == []


async def test_a_worker_that_did_it_all_is_named_alone() -> None:
    async def locally(request: Any, context: Any) -> None:
        await context.write(pb.GenerateResponse(tokens=token_event(0, 10, text="a")))
        await context.write(
            pb.GenerateResponse(finished=pb.GenerateFinished(prefill_worker="u:1", decode_worker="u:1"))
        )

    async with terminal(locally) as shell:
        result = await shell.run("hi")
    assert result.stderr.endswith("; all by u:1]\n")


@pytest.mark.parametrize("error", [InvalidArgumentError("top_p", "is odd"), OverloadedError("full")])
@pytest.mark.parametrize("flags", [[], ["--json"]])
async def test_a_refusal_is_one_line_and_exit_code_1(error: Exception, flags: list[str]) -> None:
    async def refuse(request: Any, context: Any) -> None:
        raise error

    async with terminal(refuse) as shell:
        result = await shell.run(*flags, "hi")
    assert result.exit_code == 1
    assert (result.stdout, result.stderr) == ("", f"Error: {error}\n")


async def test_a_timeout_is_exit_code_1() -> None:
    async with terminal(forever) as shell:
        result = await shell.run("--timeout", "0.2", "hi")
        await shell.router.cancelled.wait()
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")


async def test_a_value_that_cannot_be_sent_is_exit_code_1() -> None:
    async with terminal() as shell:
        result = await shell.run("--seed", "-1", "hi")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert shell.router.requests == []


async def test_nobody_listening_is_exit_code_1() -> None:
    async with terminal() as shell:
        pass
    result = await shell.run("hi")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.output


async def test_no_prompt_is_a_usage_error() -> None:
    async with terminal() as shell:
        assert (await shell.run()).exit_code == 2
        assert shell.router.requests == []
