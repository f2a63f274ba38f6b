"""The bundled model's tokenizer: byte-level BPE in which every story word is one token.

Byte-level, so that it takes any text: words that the stories do not use fall back to smaller pieces, in the end to
bytes. It is trained on story text alone, which stops of itself when every story word is merged.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny_stories import COLOURS, NAMES, NOUNS, NUMBERS, PLACES, PLURALS, story_text, training_facts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"
SPECIAL_TOKENS = [PAD, BEGIN, END, SYSTEM, USER, ASSISTANT]
VOCAB_LIMIT = 2048
MAX_TOKENS = 2048

SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "Answer from the story.",
    "Read the story and answer the question.",
)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Only the roles system, user and assistant are supported.') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def render_chat(turns: list[tuple[str, str]]) -> str:
    """What the chat template makes of (role, content) turns; training text is rendered by this."""
    return BEGIN + "".join(f"<|{role}|>{content}{END if role == 'assistant' else ''}" for role, content in turns)


def _corpus() -> Iterator[str]:
    """Every word the training text can use, often enough to be merged into one token."""
    rng = random.Random(0)
    for _ in range(300):
        facts = training_facts(rng, 20)
        yield story_text(facts)
        yield from (f"{fact.question} {fact.question}" for fact in facts)
        yield from (fact.sentence for fact in facts)
    for words in (NAMES, COLOURS, NOUNS, NUMBERS, PLACES, PLURALS):
        for word in words:
            yield from (f"the {word}. The {word}.", word, word.capitalize()) * 3
    yield from SYSTEM_TEXTS * 3


def train_tokenizer(folder: Path) -> Any:
    """Train the tokenizer, save it to ``folder`` and return it as ``AutoTokenizer`` loads it from there."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_LIMIT,
        min_frequency=3,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BEGIN} $A",
                pair=f"{BEGIN} $A {BEGIN} $B",
                special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
            ),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)
