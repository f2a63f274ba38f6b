"""In bfloat16 every token's log-probability is that of the same weights in float32 within 0.05.

How it is measured: the engine generates in bfloat16 at temperature 1, so that unlikely tokens come too, and the
log-probability that it reports for each token it chose is noted. Then `transformers`, with the same weights in
float32, is given prompt and output whole, in one forward pass (teacher forcing), so that a draw which the two decide
differently does not turn into another text. (`transformers` in bfloat16 is no yardstick: it is itself up to 0.054 from
float32 here.) Rounding grows with the logits: weights of standard deviation 0.15 make them about as wide as a trained
model's (log-probabilities from -6 to -2), where random ones of 0.3 and more would be all or nothing.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvbaton.engine.core import Engine
from kvbaton.engine.pool import BlockPool
from kvbaton.engine.request import Phase, Request
from kvbaton.engine.sampling import SamplingParams
from kvbaton.engine.scheduler import Limits, Scheduler
from kvbaton.model.loader import load_model
from kvbaton.model.runner import ModelRunner
from kvbaton.model.store import TorchKvStore
from support import tiny_models
from support.requests import new_request

TOLERANCE = 0.05
PROMPTS = [1, 9, 40, 61]


@pytest.fixture(params=["own", "without the unit", "without oneDNN's bfloat16"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine has, and what others have."""
    if request.param != "own":
        monkeypatch.setattr("kvbaton.model.cpu.numeric.has_bfloat16_unit", lambda: False)
    if request.param == "without oneDNN's bfloat16":
        for module in ("linear", "optimize"):
            monkeypatch.setattr(f"kvbaton.model.cpu.{module}.can_pack", lambda dtype: False)


def save(architecture: str, folder: Path, **overrides: Any) -> Path:
    torch.manual_seed(13)
    config = tiny_models.ARCHITECTURES[architecture].config()
    for name, value in overrides.items():
        setattr(config, name, value)
    if hasattr(config, "num_experts_per_tok"):
        # All of them: between two experts that are nearly as good, rounding may choose either, and the answers differ.
        config.num_experts_per_tok = 4
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    return folder


def generate(folder: Path) -> list[tuple[Request, list[float]]]:
    """Each request with the log-probabilities of its output."""
    loaded = load_model(str(folder), "bfloat16", "cpu")
    store = TorchKvStore(loaded.geometry, 64, 8, torch.device("cpu"))
    limits = Limits(max_prefill_tokens=13, max_decode_seqs=8, max_waiting=8)
    scheduler = Scheduler(BlockPool(64, 8), limits, frozenset(), loaded.max_model_len)
    engine = Engine(scheduler, ModelRunner(loaded, store))
    noted: dict[Request, list[float]] = {}
    for n, prompt in enumerate(tiny_models.random_prompts(PROMPTS)):
        params = SamplingParams(max_tokens=16, seed=n, temperature=1.0, logprobs=0)
        noted[scheduler.add(new_request(str(n), prompt, params), 0.0)] = []
    while any(request.phase is not Phase.FINISHED for request in noted):
        result = engine.step(lambda: 0.0)
        assert not result.failed
        for token in result.sampled:
            assert token.logprobs is not None
            noted[token.request].append(token.logprobs.logprob)
    return list(noted.items())


@torch.inference_mode()
def teacher_forced(folder: Path, request: Request) -> list[float]:
    """What `transformers` gives each token of the output, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(torch.tensor([[*request.prompt, *request.output]])).logits[0].float()
    logprobs = logits.log_softmax(-1)[request.num_prompt - 1 : -1]
    return [float(row[token]) for row, token in zip(logprobs, request.output, strict=True)]


def check(folder: Path) -> None:
    spread = []
    for request, ours in generate(folder):
        theirs = teacher_forced(folder, request)
        assert len(ours) == len(theirs) == 16
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= TOLERANCE
        spread += theirs
    # The tolerance means something: tokens differ by far more than it.
    assert max(spread) - min(spread) > 40 * TOLERANCE


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("architecture", list(tiny_models.ARCHITECTURES))
def test_log_probabilities(architecture: str, tmp_path: Path) -> None:
    check(save(architecture, tmp_path))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gpt_oss"])
def test_heads_of_a_width_that_the_unit_takes(architecture: str, num_kv_heads: int, tmp_path: Path) -> None:
    check(save(architecture, tmp_path, head_dim=32, num_key_value_heads=num_kv_heads))
