"""Train the bundled model from nothing, on one CPU core, in less than half an hour.

    python scripts/train_tiny.py

The model must be too small to know anything and still answer from its prompt, so that its answers depend on its KV
cache (gross faults there show as wrong answers; the card says which faults do not). It is trained in three phases:
copying random tokens, which forms the attention heads that look back at what followed; stories of facts with
questions, longer whenever the answers have become right; and stories of mixed lengths while the learning rate falls.
Every choice follows from the seed and from the training itself, none from the clock.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_batches import Batch, Batches
from tiny_card import write_card
from tiny_eval import answers_right, evaluate, evaluate_plain, grade, predict, table
from tiny_stories import KINDS, held_out_example
from tiny_tokenizer import BEGIN, END, MAX_TOKENS, PAD, train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

LOG = logging.getLogger("train_tiny")
OUT = Path(__file__).resolve().parent.parent / "services/kvbaton/model/bundled/baton-tiny"

LEVELS = (6, 16, 32, 64, 100)
"""Most facts of a story, level by level."""
LEARNING_RATE, LAST_RATE = 2e-3, 5e-5
WARMUP_STEPS = 100
LOOK_BACK_SCALE = 6.0
COPY_STEPS, LEVEL_STEPS = 2000, 600
"""Most steps of copying, and of one level; more would mean that training is stuck."""
COPIED, ANSWERED = 0.93, 0.94
"""The copied tokens' and the answers' share right that ends copying, and that ends a level."""
COPY_SHARE = 0.1
WINDOW = 20
LOG_EVERY = 50


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run of this script was asked for."""

    seed: int
    out: Path
    threads: int
    final_steps: int
    budget: int
    per_cell: int


def new_model(tokenizer: Any) -> Any:
    """The untrained model: a Llama with grouped-query attention and tied embeddings."""
    bos, eos, pad = (tokenizer.convert_tokens_to_ids(token) for token in (BEGIN, END, PAD))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        attention_bias=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    look_back(model)
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)
    return model


def look_back(model: Any) -> None:
    """Let the first layer's heads begin by looking one, two, three and four tokens back.

    Every query and every key of that layer starts with the same large part, its bias; the query's is turned by as many
    positions as the head is to look back, so that the rotary embedding makes their product largest exactly there. It is
    only a start, which training is free to leave, but it spares the part of an induction head that a model of this size
    takes longest to find.
    """
    layer = model.model.layers[0].self_attn
    angles = model.model.rotary_emb.inv_freq
    half, width = len(angles), 2 * len(angles)
    with torch.no_grad():
        for head in range(model.config.num_key_value_heads):
            layer.k_proj.bias[head * width : head * width + half] = LOOK_BACK_SCALE
        for head in range(model.config.num_attention_heads):
            turn, query = -(head + 1) * angles, layer.q_proj.bias[head * width : (head + 1) * width]
            query[:half] = LOOK_BACK_SCALE * torch.cos(turn)
            query[half:] = LOOK_BACK_SCALE * torch.sin(turn)


class Trainer:
    """One model, one optimiser, one source of batches; runs the phases."""

    def __init__(self, model: Any, tokenizer: Any, plan: Plan) -> None:
        self.model, self._tokenizer, self._plan = model, tokenizer, plan
        self._batches = Batches(tokenizer, plan.seed, plan.budget)
        self._choices = torch.Generator().manual_seed(plan.seed)
        self._optimiser = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
        self._end = tokenizer.convert_tokens_to_ids(END)
        self._step, self._tokens, self._started = 0, 0, time.monotonic()

    def _learn(self, batch: Batch, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One step; the detached logits and targets of what was learnt."""
        warm = min(1.0, (self._step + 1) / WARMUP_STEPS)
        for group in self._optimiser.param_groups:
            group["lr"] = rate * warm
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets = predict(self.model, batch)
        loss = torch.nn.functional.cross_entropy(logits.float(), targets)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self._step += 1
        self._tokens += batch.ids.numel()
        return logits.detach(), targets

    def _log(self, phase: str, right: Sequence[float]) -> None:
        if self._step % LOG_EVERY == 0:
            seconds = time.monotonic() - self._started
            mean = sum(right) / max(1, len(right))
            LOG.info("%6.0f s  step %5d  %5.1f M tokens  %s  right %.3f",
                     seconds, self._step, self._tokens / 1e6, phase, mean)  # fmt: skip

    def _copy(self, most: int, rate: float) -> float:
        logits, targets = self._learn(self._batches.copying(most), rate)
        return (logits.argmax(-1) == targets).float().mean().item()

    def _answer(self, least: int, most: int, rate: float) -> float:
        questions = max(2, min(12, most // 2))
        logits, targets = self._learn(self._batches.stories(least, most, questions), rate)
        return answers_right(logits, targets, self._end).float().mean().item()

    def _chance(self, share: float) -> bool:
        return torch.rand((), generator=self._choices).item() < share

    def copying(self) -> None:
        """The first phase: copy random tokens until nearly all are right."""
        right: deque[float] = deque(maxlen=WINDOW)
        for _ in range(COPY_STEPS):
            right.append(self._copy(48, LEARNING_RATE))
            self._log("copying", right)
            if len(right) == WINDOW and sum(right) / WINDOW >= COPIED:
                return

    def level(self, most: int) -> None:
        """The second phase, once for each level: stories of up to so many facts."""
        right: deque[float] = deque(maxlen=WINDOW)
        for _ in range(LEVEL_STEPS):
            if self._chance(COPY_SHARE):
                self._copy(48, LEARNING_RATE)
            else:
                right.append(self._answer(max(1, most // 2), most, LEARNING_RATE))
            self._log(f"stories to {most} facts", right)
            if self._step % 200 == 0:
                self._held_out(most)
            if len(right) == WINDOW and sum(right) / WINDOW >= ANSWERED:
                break
        self._held_out(most)

    def _held_out(self, facts: int) -> None:
        self.model.eval()
        for kind in KINDS:
            examples = [held_out_example(seed, facts, kind) for seed in range(2_000_000, 2_000_040)]
            right = grade(self.model, self._tokenizer, examples)
            LOG.info("held out, %d facts, %s: %.3f", facts, kind, sum(right) / len(right))
        self.model.train()

    def mixed(self) -> None:
        """The last phase: stories of all lengths while the learning rate falls."""
        right: deque[float] = deque(maxlen=WINDOW)
        for step in range(self._plan.final_steps):
            left = 1 - step / self._plan.final_steps
            rate = LAST_RATE + (LEARNING_RATE - LAST_RATE) * left
            if self._chance(COPY_SHARE):
                self._copy(256, rate)
            else:
                # One batch in four is of the longest stories, which only these steps see.
                span = (100, 160) if self._chance(0.25) else (2, 100)
                right.append(self._answer(*span, rate))
            self._log("stories of all lengths", right)


def train(plan: Plan) -> str:
    """Train and save the model and its tokenizer; the time it took, in words."""
    tokenizer = train_tokenizer(plan.out)
    trainer = Trainer(new_model(tokenizer), tokenizer, plan)
    LOG.info("%d parameters", trainer.model.num_parameters())
    started = time.monotonic()
    trainer.copying()
    for most in LEVELS:
        trainer.level(most)
        save(trainer.model, plan.out)
    trainer.mixed()
    save(trainer.model, plan.out)
    return f"{(time.monotonic() - started) / 60:.0f} minutes on {plan.threads} thread(s)"


def save(model: Any, out: Path) -> None:
    """Write config, generation config and weights in float32."""
    model.save_pretrained(out)
    # Weights are written through a private temporary file; a bundled file is for everyone to read.
    (out / "model.safetensors").chmod(0o644)
    LOG.info("saved to %s", out)


def report(plan: Plan, took: str | None) -> str:
    """Evaluate what is in the folder, as a user would load it, write its card and return the table."""
    tokenizer = AutoTokenizer.from_pretrained(plan.out)
    model = AutoModelForCausalLM.from_pretrained(plan.out).eval()
    scores = evaluate(model, tokenizer, plan.per_cell)
    command = f"python scripts/train_tiny.py --seed {plan.seed} --threads {plan.threads}"
    plain = evaluate_plain(model, tokenizer, plan.per_cell)
    write_card(plan.out, model, scores, plain, command, took)
    return table(scores)


def arguments(argv: Sequence[str] | None = None) -> tuple[Plan, bool]:
    """The plan, and whether only to evaluate what is there."""
    parser = argparse.ArgumentParser(description="Train and evaluate the bundled model.")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and data")
    parser.add_argument("--out", type=Path, default=OUT, help="model folder")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--final-steps", type=int, default=800, help="steps of the last phase")
    parser.add_argument("--budget", type=int, default=8192, help="tokens of a batch")
    parser.add_argument("--per-cell", type=int, default=100, help="questions for each length and kind")
    parser.add_argument("--eval-only", action="store_true", help="evaluate the model in --out")
    known = parser.parse_args(argv)
    plan = Plan(known.seed, known.out, known.threads, known.final_steps, known.budget, known.per_cell)
    return plan, known.eval_only


def main() -> None:
    """The command line."""
    plan, eval_only = arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(plan.threads)
    torch.manual_seed(plan.seed)
    took = None if eval_only else train(plan)
    sys.stdout.write(report(plan, took) + "\n")


if __name__ == "__main__":
    main()
