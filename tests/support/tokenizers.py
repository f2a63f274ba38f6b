"""Tokenizers of a few hundred tokens, trained or made here."""

from collections.abc import Sequence

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "The relay passes the baton, the baton passes the line.",
    "don't they say: he's late , isn't he ?",
    "Zoë's café serves crème brûlée à la carte",
    "接力棒传给下一位选手 バトンを渡す",
    "👩‍👩‍👧‍👦 runs 🏃🏽‍♀️ past 🎉🎉",
]
SPECIAL = ["<bos>", "<eos>"]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('no ' + m.role + ' here') }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def train(chat_template: str | None, lines: Sequence[str] = LINES, vocab_size: int = 340) -> PreTrainedTokenizerFast:
    """A byte-level BPE, the same every time; with spaces cleaned up on request, as many a published one asks."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=rust, bos_token="<bos>", eos_token="<eos>", chat_template=chat_template
    )


def byte_fallback() -> PreTrainedTokenizerFast:
    """Characters outside the vocabulary become tokens of one byte each, as in SentencePiece models."""
    letters = sorted(set("\u2581thebaonlis.'"))
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: number for number, token in enumerate([*SPECIAL, "<unk>", *byte_tokens, *letters])}
    rust = RustTokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    rust.normalizer = normalizers.Replace(" ", "\u2581")
    rust.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
