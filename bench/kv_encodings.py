"""What encodings of KV cost and save: bytes on the way, time of the conversion, and how far answers move.

    taskset -c 1 python bench/kv_encodings.py

For each prompt a prefill worker's pool is filled by the forward pass, its KV goes through the encoding into another
pool, and an answer (the model's own, sampled at temperature 1) is forced through the model on either pool. The
difference of each of its tokens' log-probabilities, but for the first, which the prefill worker samples, is the loss.
Half a minute.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

import machine
import random_models
from kvbaton.engine.geometry import ENCODING_BYTES
from kvbaton.engine.request import Milestones, Phase, Request, Route
from kvbaton.engine.sampling import SamplingParams
from kvbaton.engine.scheduler import Batch, Slice
from kvbaton.handoff.landing import fill
from kvbaton.model import ragged
from kvbaton.model.loader import LoadedModel, load_model
from kvbaton.model.store import TorchKvStore
from kvbaton.text.bundled import DEFAULT_MODEL, resolve_model
from kvbaton.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
BLOCK, NUM_BLOCKS = 16, 64
NUM_PROMPTS, NUM_TOKENS, NUM_ANSWER = 16, 448, 64
FRAME_TOKENS = 64
REPEATS = 30
RANDOM_MODEL = "30m"


@dataclass(frozen=True, slots=True)
class Case:
    """A model in a dtype, with prompts that it can make something of."""

    name: str
    loaded: LoadedModel
    prompts: list[list[int]]


def cases(folder: Path) -> Iterator[Case]:
    """The bundled model on stories like those it was trained on, and a larger one with random weights."""
    path = resolve_model(DEFAULT_MODEL)
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    rng = random.Random(1)
    stories = [tokenizer.encode(story(rng))[:NUM_TOKENS] for _ in range(NUM_PROMPTS)]
    for dtype in ("float32", "bfloat16"):
        yield Case(f"{DEFAULT_MODEL}, {dtype}", load_model(path, dtype, "cpu"), stories)
    random_models.save_random_model(RANDOM_MODEL, folder, seed=1)
    loaded = load_model(str(folder), "bfloat16", "cpu")
    prompts = [[rng.randrange(3, loaded.vocab_size) for _ in range(NUM_TOKENS)] for _ in range(NUM_PROMPTS)]
    yield Case(f"{RANDOM_MODEL}, bfloat16", loaded, prompts)


def story(rng: random.Random) -> str:
    """Facts of the kind that baton-tiny knows, more than a prompt takes."""
    names, places = ["Ann", "Tom", "Mia", "Ben", "Eva"], ["kitchen", "garden", "attic", "cellar", "garage"]
    things = [f"{colour} {noun}" for colour in ("red", "blue", "green") for noun in ("lamp", "key", "book", "cup")]
    facts = [f"The {rng.choice(things)} is with {rng.choice(names)}." for _ in range(60)]
    facts += [f"The {rng.choice(things)} is in the {rng.choice(places)}." for _ in range(60)]
    rng.shuffle(facts)
    return " ".join(facts)


class Pools:
    """A prompt's KV as it was computed, and as it arrives."""

    def __init__(self, case: Case) -> None:
        self._loaded = case.loaded
        sizes = case.loaded.geometry, NUM_BLOCKS, BLOCK, case.loaded.device
        self.computed, self.arrived = TorchKvStore(*sizes), TorchKvStore(*sizes)
        self._blocks = list(range(NUM_BLOCKS))
        self.layers = range(case.loaded.geometry.num_layers)

    def forward(self, store: TorchKvStore, tokens: list[int], start: int) -> torch.Tensor:
        """Log-probabilities after each of `tokens` from `start` on, [tokens, vocabulary]; `store` has what precedes."""
        sampling = SamplingParams(max_tokens=1, seed=0)
        request = Request("r", tokens, sampling, Route.LOCAL, Milestones(0.0), Phase.PREFILLING, self._blocks)
        batch = ragged.build(Batch([Slice(request, start, len(tokens) - start, True)]), BLOCK, self._loaded.device)
        self._loaded.attention.store, self._loaded.attention.batch = store, batch
        rows = torch.arange(len(tokens) - start)
        return self._loaded.forward(batch.token_ids, batch.positions, rows).float().log_softmax(-1)

    def answer(self, prompt: list[int], generator: torch.Generator) -> list[int]:
        """The model's own, at temperature 1."""
        tokens, start = list(prompt), 0
        for _ in range(NUM_ANSWER):
            last = self.forward(self.computed, tokens, start)[-1]
            start = len(tokens)
            tokens.append(int(torch.multinomial(last.exp(), 1, generator=generator)))
        return tokens[len(prompt) :]

    def send(self, encoding: str) -> int:
        """Move the prompt's KV in `encoding`; the bytes that travel."""
        source, target = self.computed.encoded(encoding), self.arrived.encoded(encoding)
        size = 0
        for start in range(0, NUM_TOKENS, FRAME_TOKENS):
            tokens = range(start, start + FRAME_TOKENS)
            payload = b"".join(source.read(self.layers, self._blocks, tokens))
            fill(target.landing(self.layers, self._blocks, tokens), payload)
            size += len(payload)
        return size

    def rates(self, encoding: str) -> tuple[float, float]:
        """GB/s of KV in memory that are encoded, and decoded, best of several frames."""
        source, target = self.computed.encoded(encoding), self.arrived.encoded(encoding)
        tokens = range(FRAME_TOKENS)
        size = self.computed.geometry.span_bytes(0, len(self.layers), FRAME_TOKENS)
        there, back = [], []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            payload = source.read(self.layers, self._blocks, tokens)
            there.append(time.perf_counter() - begin)
            landing = target.landing(self.layers, self._blocks, tokens)
            for part, sent in zip(landing.parts, payload, strict=True):
                part[:] = sent
            begin = time.perf_counter()
            landing.finish()
            back.append(time.perf_counter() - begin)
        return size / min(there) / 1e9, size / min(back) / 1e9


@torch.inference_mode()
def measure(case: Case) -> dict[str, dict[str, float]]:
    """By encoding: the figures of one case."""
    pools, generator = Pools(case), torch.Generator().manual_seed(1)
    dtype = case.loaded.geometry.dtype
    encodings = [encoding for encoding in ENCODING_BYTES if encoding != dtype]
    moved: dict[str, list[torch.Tensor]] = {encoding: [] for encoding in encodings}
    sizes = dict.fromkeys(["", *encodings], 0)
    for prompt in case.prompts:
        answer = pools.answer(prompt, generator)
        tokens, wanted = [*prompt, *answer[:-1]], torch.tensor(answer[1:])[:, None]
        exact = pools.forward(pools.computed, tokens, NUM_TOKENS).gather(1, wanted)
        for encoding in encodings:
            sizes[encoding] = pools.send(encoding)
            moved[encoding].append((pools.forward(pools.arrived, tokens, NUM_TOKENS).gather(1, wanted) - exact).abs())
    figures: dict[str, dict[str, float]] = {
        dtype: {"bytes per token": case.loaded.geometry.token_bytes},
    }
    for encoding in encodings:
        differences = torch.cat(moved[encoding]).flatten()
        encode, decode = pools.rates(encoding)
        figures[encoding] = {
            "bytes per token": sizes[encoding] / NUM_TOKENS,
            "mean": float(differences.mean()),
            "p99": float(differences.quantile(0.99)),
            "max": float(differences.max()),
            "encode": encode,
            "decode": decode,
        }
    return figures


UNITS = {"bytes per token": "B", "encode": "GB/s", "decode": "GB/s"}


def main() -> None:
    """Measure, print and write build/bench/kv_encodings.json."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder)):
            for encoding, figures in measure(case).items():
                rows += [
                    {"case": case.name, "system": encoding, "metric": name, "value": value, "unit": UNITS.get(name, "")}
                    for name, value in figures.items()
                ]
                shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
                sys.stdout.write(f"{case.name}: {encoding}: {shown}\n")
    header = machine.describe(
        command="make bench-encodings",
        num_prompts=NUM_PROMPTS,
        num_tokens=NUM_TOKENS,
        num_answer=NUM_ANSWER,
    )
    path = ROOT / "build" / "bench" / "kv_encodings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"header": header, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
