"""The bundled model's card: what it is, how it was made, and how well it does, from the numbers just measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_eval import BUCKETS, Score, share, table
from tiny_stories import HELD_OUT_ONE_IN, held_out_example

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# baton-tiny

A language model of {parameters:.2f} million parameters that knows nothing but can read. It is told short English
stories of facts and answers questions about them with the fact's own sentence. Which person has which thing is drawn
at random, so a right answer can only come from the prompt, that is from the model's KV cache. It exists to test and to
demonstrate kvbaton. Not every damage to the cache shows in its answers, though: see the limits.

- Architecture: `LlamaForCausalLM`, {layers} layers, {width} wide, {heads} query heads, {kv_heads} key and value heads,
  biases in attention, tied embeddings, {positions} positions, float32. `model.safetensors` has {megabytes:.1f} MB.
- Tokenizer: byte-level BPE of {vocabulary} tokens. Each word of the stories is one token; any other text is taken as
  smaller pieces or bytes.
- Licence: Apache-2.0. Weights and training text are both made by this repository's scripts; no other data was used.

## Use

One user message holds the story and then the question. A later message of the same chat may ask about the same story.

> {prompt}

> {answer}

The three kinds of question are *Who has the red lamp?*, *Where is the blue key?* and *How many apples has Tom?*

## Accuracy

Share of questions answered exactly right, every token and the end included, in float32 with greedy decoding;
{per_cell} questions for each cell. Length is that of the prompt in tokens with its chat template. Every question is
about a combination (person and thing, thing and place, or person and number and things) that no training story
contains; one combination in {one_in} is held out so.

{table}

All prompts of up to 512 tokens: {short:.1f} %. From 513 to 1,024 tokens: {long:.1f} %.
The same questions of up to 512 tokens as plain text to complete, without the chat template: {plain:.1f} %.

## Training

```
{command}
```

{took}The script generates all text itself. Training has three phases: copying random
tokens; stories of facts, longer whenever the answers have become right; and stories of 2 to 160 facts (about 1,070
tokens) while the learning rate falls. Only answers (or the second copy) count in the loss. The heads of the first layer
start out looking one to four tokens back, which shortens the first phase. In half of the stories the things are made of
as few words as will do (two colours of the same two nouns, say), so that even the likest words must be told apart. The
same seed on the same machine, with the same versions and as many threads, repeats the same run; elsewhere it differs in
rounding.

## Limits

- It answers these three kinds of question, in these words, about things that the stories' own vocabulary names. It
  cannot converse, and answers anything else with nonsense.
- Ask it through the chat template, which most of its training stories use.
- A right answer does not prove that the cache is intact. Gross faults show (values one token out of step with their
  keys, exchanged heads, a missing end of the prompt, decoding at a wrong position), but an earlier model of this recipe
  answered right after the asked fact's own entries had been zeroed, because later entries hold copies of its words.
  Compare logits or cache bytes to see such a loss.
- A question about something that the story does not say is answered anyway, and wrongly.
- Prompts above {longest} tokens are longer than its training stories; the last line of the table says what to expect.
"""


def write_card(folder: Path, model: Any, scores: Sequence[Score], plain: float, command: str, took: str | None) -> None:
    """Write the card to ``README.md`` in the model's folder.

    ``plain`` is the share right in plain text, ``took`` says how long training was, in words; a card rewritten
    by an evaluation alone keeps the earlier one's line.
    """
    card = folder / "README.md"
    example = held_out_example(0, 4)
    config = model.config
    text = CARD.format(
        parameters=model.num_parameters() / 1e6,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        positions=config.max_position_embeddings,
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        vocabulary=config.vocab_size,
        prompt=example.prompt,
        answer=example.answer,
        per_cell=scores[0].asked,
        one_in=HELD_OUT_ONE_IN,
        table=table(scores),
        short=100 * share(scores, longest=512),
        long=100 * share(scores, shortest=513, longest=1024),
        plain=100 * plain,
        command=command,
        took=_took(card, took),
        longest=f"{BUCKETS[-2][1]:,}",
    )
    card.write_text(text, encoding="utf-8")


def _took(card: Path, took: str | None) -> str:
    """The line on training time: this run's, or the one that the folder's card has."""
    if took:
        return f"Training took {took}.\n"
    lines = card.read_text(encoding="utf-8").splitlines() if card.exists() else []
    return "".join(f"{line}\n" for line in lines if line.startswith("Training took "))
