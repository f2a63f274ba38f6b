"""A leg's request before the engine hears of it: every field arrives, and grammars are compiled aside."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kvbaton.engine.errors import InvalidArgumentError, OverloadedError
from kvbaton.engine.new_request import NewRequest
from kvbaton.engine.request import Route
from kvbaton.engine.sampling import StructuredOutput
from kvbaton.engine.tokens import pack_token_ids
from kvbaton.grammar.compiler import GrammarCompiler
from kvbaton.text.tokenizer import Tokenizer
from kvbaton.v1 import decode_pb2, prefill_pb2
from kvbaton.v1 import types_pb2 as types
from kvbaton.worker import admission as module
from kvbaton.worker.admission import Admission
from support.fakes import PATIENCE, model_info
from support.tokenizers import train

EOS = 1
DIGITS = types.StructuredOutput(regex="[0-9]{3}")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train(None))


@pytest.fixture
def admission(tokenizer: Tokenizer) -> Iterator[Admission]:
    made = Admission(model_info(vocab_size=340, eos_token_ids=[EOS]), tokenizer)
    yield made
    made.close()


def leg(structured_output: types.StructuredOutput | None = None, **fields: Any) -> decode_pb2.DecodeRequest:
    sampling = types.SamplingParams(max_tokens=8, seed=3, structured_output=structured_output)
    return decode_pb2.DecodeRequest(prompt_token_ids=pack_token_ids([5, 6]), sampling=sampling, **fields)


async def test_every_field_reaches_the_engine(admission: Admission) -> None:
    fields: dict[str, Any] = {
        "request_id": "a",
        "output_token_ids": pack_token_ids([7]),
        "priority": -2,
        "cache_salt": "s",
    }
    decode = leg(**fields)
    prefill = prefill_pb2.PrefillRequest(prompt_token_ids=decode.prompt_token_ids, sampling=decode.sampling, **fields)
    first, second = await admission.read(decode, Route.LOCAL), await admission.read(prefill, Route.HAND_OFF)
    for number, (new, route) in enumerate(((first, Route.LOCAL), (second, Route.HAND_OFF))):
        assert new == NewRequest(
            # Two legs of one request may meet on one engine.
            request_id=f"a/{number}",
            prompt=[5, 6],
            sampling=new.sampling,
            route=route,
            output=[7],
            priority=-2,
            cache_salt="s",
        )
        assert (new.sampling.max_tokens, new.sampling.seed) == (8, 3)


def allowed(new: NewRequest, tokenizer: Tokenizer) -> set[str]:
    """What may come next."""
    import torch

    assert new.constraint is not None
    bitmask = torch.zeros(1, 11, dtype=torch.int32)
    new.constraint.fill(bitmask, 0)
    return {tokenizer.decode([at]) for at in range(340) if bitmask[0, at // 32] >> at % 32 & 1}


async def test_a_grammar_is_compiled_and_follows_the_tokens_so_far(admission: Admission, tokenizer: Tokenizer) -> None:
    digits = {str(digit) for digit in range(10)}
    assert digits <= allowed(await admission.read(leg(DIGITS), Route.LOCAL), tokenizer)
    three = pack_token_ids(tokenizer.encode("123"))
    # After the whole answer there is but its end, which has no text.
    assert allowed(await admission.read(leg(DIGITS, output_token_ids=three), Route.LOCAL), tokenizer) == {""}


@pytest.mark.parametrize(
    ("form", "output", "field"),
    [
        (types.StructuredOutput(regex="(["), "", "structured_output.regex"),
        (types.StructuredOutput(json_schema="{"), "", "structured_output.json_schema"),
        (DIGITS, "1x", "output_token_ids"),
    ],
)
async def test_what_no_answer_can_follow_is_refused_by_the_field(
    admission: Admission, tokenizer: Tokenizer, form: types.StructuredOutput, output: str, field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        await admission.read(leg(form, output_token_ids=pack_token_ids(tokenizer.encode(output))), Route.LOCAL)
    assert caught.value.field == field


async def test_without_a_tokenizer_there_is_no_form_and_no_stop_string() -> None:
    bare = Admission(model_info(eos_token_ids=[EOS]), None)
    with pytest.raises(InvalidArgumentError, match=r"structured_output.*no tokenizer"):
        await bare.read(leg(DIGITS), Route.LOCAL)
    request = leg()
    request.sampling.stop.append("x")
    with pytest.raises(InvalidArgumentError, match=r"stop.*no tokenizer"):
        await bare.read(request, Route.LOCAL)
    bare.close()


async def test_the_loop_goes_on_while_grammars_compile_and_only_so_many_wait(
    admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Semaphore(0), threading.Event()
    compile_really = GrammarCompiler.compile

    def slow(self: GrammarCompiler, spec: StructuredOutput) -> Any:
        begun.release()
        assert go_on.wait(PATIENCE)
        return compile_really(self, spec)

    monkeypatch.setattr(GrammarCompiler, "compile", slow)
    monkeypatch.setattr(module, "MAX_COMPILING", 3)
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        first, gone, last = [group.create_task(admission.read(leg(DIGITS), Route.LOCAL)) for _ in range(3)]
        assert await asyncio.to_thread(begun.acquire, timeout=PATIENCE)
        with pytest.raises(OverloadedError, match="3 grammars wait"):
            await admission.read(leg(DIGITS), Route.LOCAL)
        assert (await admission.read(leg(), Route.LOCAL)).constraint is None
        gone.cancel()
        await asyncio.wait([gone])
        another = group.create_task(admission.read(leg(DIGITS), Route.LOCAL))
        go_on.set()
    assert all(task.result().constraint is not None for task in (first, last, another))
