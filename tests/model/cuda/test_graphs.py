"""Decode steps by graphs, with a fake graph whose replay calls the step again: what is static must really be."""

import logging
from pathlib import Path

import pytest
import torch

from kvbaton.engine.core import Engine
from kvbaton.engine.output import StepOutput
from kvbaton.engine.pool import BlockPool
from kvbaton.engine.request import Phase
from kvbaton.engine.sampling import SamplingParams
from kvbaton.engine.scheduler import Batch, Limits, Scheduler
from kvbaton.model.cuda.attention import CudaAttention
from kvbaton.model.cuda.graphs import SIZES, DecodeGraphs, Step
from kvbaton.model.loader import LoadedModel, load_model
from kvbaton.model.runner import ModelRunner
from kvbaton.model.step_output import step_output
from kvbaton.model.store import TorchKvStore
from support import tiny_models
from support.requests import new_request
from support.varlen import LenientKernel, varlen_attn

NUM_BLOCKS, BLOCK, MAX_TOKENS = 64, 8, 12
PROMPTS = tiny_models.random_prompts([1, 7, 8, 9, 33, 40, 2])
CPU = torch.device("cpu")


class GraphRunner:
    """As ModelRunner is on a GPU, with another way to capture."""

    def __init__(self, loaded: LoadedModel, capture: type["Captures"]) -> None:
        # The last block is the graphs' own: the pool has one less.
        self.store = TorchKvStore(loaded.geometry, NUM_BLOCKS + 1, BLOCK, CPU)
        self.store.scratch_block = NUM_BLOCKS
        self.runner = ModelRunner(loaded, self.store, self.heard)
        self.captures = capture()
        self.attention = loaded.attention
        self.graphs = DecodeGraphs(loaded.forward, loaded.attention, self.store, loaded.max_model_len, self.captures)
        self.replayed: list[int] = []
        self.prompts_heard: list[int] = []

    def heard(self, batch: Batch, _: int) -> None:
        self.prompts_heard.append(batch.num_prefill_tokens)

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepOutput:
        logits = self.graphs.logits(batch)
        if logits is None:
            return self.runner.run(batch)
        self.replayed.append(len(batch.slices))
        return step_output(batch, logits, frozenset())


class Captures:
    """Captures a step as CUDA does: it runs once before; the second run is recorded, here as the function itself."""

    def __call__(self, step: Step) -> Step:
        step()
        return step


class FailingCaptures(Captures):
    """A model that does what cannot be captured."""

    def __call__(self, step: Step) -> Step:
        step()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def run(folder: Path, captures: type[Captures], kernel: bool = True) -> tuple[GraphRunner, list[list[int]]]:
    loaded = load_model(str(folder), "float32", "cpu")
    if kernel:
        loaded.attention.backend = CudaAttention(LenientKernel(varlen_attn))
    runner = GraphRunner(loaded, captures)
    for blocks in (*runner.store.keys, *runner.store.values):
        blocks.fill_(float("nan"))
    limits = Limits(max_prefill_tokens=512, max_decode_seqs=len(PROMPTS), max_waiting=100)
    scheduler = Scheduler(BlockPool(NUM_BLOCKS, BLOCK), limits, frozenset(), loaded.max_model_len)
    engine = Engine(scheduler, runner)
    requests = []
    for number, prompt in enumerate(PROMPTS):
        # Ever fewer go on to the end, so that batches of several sizes come.
        sampling = SamplingParams(max_tokens=MAX_TOKENS - number, seed=0, ignore_eos=True)
        requests.append(scheduler.add(new_request(str(number), prompt, sampling), 0.0))
    while any(request.phase is not Phase.FINISHED for request in requests):
        assert not engine.step(lambda: 0.0).failed
    return runner, [request.output for request in requests]


def expected(folder: Path) -> list[list[int]]:
    outputs = tiny_models.reference_greedy(folder, PROMPTS, MAX_TOKENS, ignore_eos=True)
    return [output[: MAX_TOKENS - number] for number, output in enumerate(outputs)]


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_padded_batches_give_the_same_answers(architecture: str, kernel: bool, tmp_path: Path) -> None:
    folder = tiny_models.save_tiny_model(architecture, tmp_path)
    runner, outputs = run(folder, Captures, kernel)
    assert outputs == expected(folder)
    assert {1, 3, 5, 7} <= set(runner.replayed) <= {1, 2, 3, 4, 5, 6, 7}
    backend = runner.attention.backend
    assert not isinstance(backend, CudaAttention) or backend.may_be_captured


def test_nobody_hears_of_layers_in_a_replayed_step(tmp_path: Path) -> None:
    runner, _ = run(tiny_models.save_tiny_model("llama", tmp_path), Captures)
    assert runner.replayed
    assert runner.prompts_heard
    assert all(runner.prompts_heard)


def test_a_model_that_cannot_be_captured_goes_on_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_models.save_tiny_model("llama", tmp_path)
    with caplog.at_level(logging.WARNING, "kvbaton.model.cuda.graphs"):
        runner, outputs = run(folder, FailingCaptures)
    assert outputs == expected(folder)
    assert not runner.replayed
    assert [record.getMessage() for record in caplog.records] == [
        "decode steps run without CUDA graphs: operation not permitted when stream is capturing"
    ]


def test_sizes_double_and_then_grow_by_eight() -> None:
    assert SIZES[:7] == (1, 2, 4, 8, 16, 24, 32)
    assert SIZES[-1] == 256
