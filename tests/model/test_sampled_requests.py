"""Sampling through the whole engine: what a request gets does not depend on what is beside it, before it, or cached."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvbaton.engine.errors import NotANumberError
from kvbaton.engine.new_request import NewRequest
from kvbaton.engine.sampling import SamplingParams
from kvbaton.model import sampler
from support import tiny_models
from support.requests import new_request
from support.worker import LocalWorker

NUM, MAX_TOKENS = 32, 12
PROMPTS = tiny_models.random_prompts([1 + 5 * n % 37 for n in range(NUM)])

CHANGES: list[dict[str, Any]] = [
    {},
    {"temperature": 3.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 2.0, "presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    {"temperature": 4.0, "min_tokens": 9, "stop_token_ids": frozenset(range(30, 60)), "ignore_eos": False},
]


def asked(n: int, output: tuple[int, ...] = (), **changes: Any) -> NewRequest:
    defaults = {"max_tokens": MAX_TOKENS, "seed": 1000 + n, "temperature": 1.0, "ignore_eos": True}
    params = SamplingParams(**{**defaults, **CHANGES[n % len(CHANGES)], **changes})
    return new_request(str(n), PROMPTS[n], params, output=output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_tiny_model("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def together(folder: Path) -> list[list[int]]:
    """The answers of all requests in one batch."""
    return [request.output for request in LocalWorker(folder).run([asked(n) for n in range(NUM)])]


def test_a_sampled_request_is_the_same_alone_and_in_a_batch_of_32(folder: Path, together: list[list[int]]) -> None:
    assert len({tuple(output) for output in together}) > NUM // 2
    worker = LocalWorker(folder, max_prefill_tokens=7)
    alone = [worker.run([asked(n)])[0].output for n in range(NUM)]
    assert alone == together


def test_a_sampled_request_is_the_same_when_it_is_resumed_half_way(folder: Path, together: list[list[int]]) -> None:
    worker = LocalWorker(folder)
    requests = worker.run([asked(n, tuple(output[: len(output) // 2])) for n, output in enumerate(together)])
    assert [request.output for request in requests] == together
    assert all(request.num_resumed for request in requests)


def test_no_ending_comes_before_min_tokens(together: list[list[int]]) -> None:
    endings = [output for n, output in enumerate(together) if n % len(CHANGES) == 3]
    assert all(len(output) >= 9 for output in endings)
    assert any(len(output) < MAX_TOKENS for output in endings)
    assert not any(2 in output[:8] or set(output[:8]) & set(range(30, 60)) for output in endings)


def exact_logprobs(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """What `transformers` gives each token after the ones before it, [tokens - 1, vocabulary]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logprobs: torch.Tensor = model(torch.tensor([token_ids])).logits[0].double().log_softmax(-1)[:-1]
    return logprobs


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_logprobs_of_prompt_and_answer_are_those_of_transformers(folder: Path, chunk: int) -> None:
    worker = LocalWorker(folder, max_prefill_tokens=chunk)
    # Truncation, which 13 asks for, comes after logprobs.
    numbers = {4: 4, 5: None, 8: 0, 13: 20}
    news = [asked(n, logprobs=num, prompt_logprobs=num) for n, num in numbers.items()]
    requests = worker.run(news)
    for request, num in zip(requests, numbers.values(), strict=True):
        if num is None:
            assert request.request_id not in worker.prompt_logprobs
            continue
        found = worker.prompt_logprobs[request.request_id]
        assert len(found) == request.num_prompt - 1
        told = [*found, *worker.logprobs[request.request_id]]
        expected = exact_logprobs(folder, [*request.prompt, *request.output])
        assert len(told) == len(expected)
        for row, one, token_id in zip(expected, told, [*request.prompt, *request.output][1:], strict=True):
            assert one is not None
            assert one.token_id == token_id
            assert one.logprob == pytest.approx(float(row[token_id]), abs=1e-3)
            assert len(one.top) == num
            likeliest = row.sort(descending=True).values[:num].tolist()
            assert [value for _, value in one.top] == pytest.approx(likeliest, abs=1e-3)


def test_a_prompts_logprobs_are_told_once_and_of_one_token_there_are_none(folder: Path) -> None:
    worker = LocalWorker(folder)
    worker.run([asked(0, prompt_logprobs=2), asked(1, output=(5, 6), prompt_logprobs=2)])
    assert len(PROMPTS[0]) == 1
    assert not any(worker.prompt_logprobs.values())


def test_penalties_are_for_the_answer_and_not_for_its_prompts_logprobs(folder: Path) -> None:
    plain, penalised = LocalWorker(folder), LocalWorker(folder)
    plain.run([asked(4, prompt_logprobs=2)])
    penalised.run([asked(4, prompt_logprobs=2, repetition_penalty=5.0, logit_bias={5: 50.0})])
    assert penalised.prompt_logprobs == plain.prompt_logprobs


def test_logits_that_are_no_numbers_end_their_request_alone(
    folder: Path, together: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = sampler.sample

    def poisoned(logits: torch.Tensor, rows: Any, eos_token_ids: frozenset[int]) -> Any:
        for line, row in enumerate(rows):
            if row.params.seed == 1001 and len(row.output) == 3:
                logits[line, 5] = float("nan")
        return sample(logits, rows, eos_token_ids)

    monkeypatch.setattr(sampler, "sample", poisoned)
    worker = LocalWorker(folder)
    requests = worker.run([asked(n) for n in range(4)])
    assert [request.output for request in requests] == [together[0], together[1][:3], *together[2:4]]
    assert {name: type(error) for name, error in worker.failures.items()} == {"1": NotANumberError}
