"""Text to tokens and back: a thin, typed face on `transformers`' tokenizers."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from kvbaton.engine.errors import InvalidArgumentError, StartupError

logger = logging.getLogger(__name__)

_MAX_TOKEN_CHARS = 32

REPLACEMENT = "\ufffd"
"""What a decoder puts out for bytes that are no character, or not yet one."""


class Tokenizer:
    """One model's tokenizer and chat template."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a `transformers` PreTrainedTokenizerBase."""
        self._tokenizer = tokenizer
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        longest = max(map(len, vocabulary), default=1)
        # Some vocabularies have tokens of a hundred blanks, which would make the bound useless.
        self._max_token_chars = min(longest, _MAX_TOKEN_CHARS)
        self.special_token_ids: frozenset[int] = frozenset(tokenizer.all_special_ids)
        """Tokens without text."""
        self.digest = hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest()
        """Of the vocabulary: two tokenizers with the same one understand each other's token ids."""

    def max_chars(self, num_tokens: int) -> int:
        """Characters that `num_tokens` tokens stand for at the most: longer text need not be encoded to be refused."""
        return num_tokens * self._max_token_chars

    def definition(self) -> str | None:
        """All of it as JSON, in the format of `tokenizers`; None when it is a program in Python."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return None if backend is None else str(backend.to_str())

    def encode(self, text: str) -> list[int]:
        """Tokens of a plain prompt, with the special tokens that the model expects around it."""
        token_ids: list[int] = self._tokenizer(text)["input_ids"]
        return token_ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of a conversation, ready for the assistant's turn.

        Raises InvalidArgumentError when the model has no chat template or the template refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise InvalidArgumentError("prompt.chat", "the model has no chat template; send text or token ids")
        try:
            encoded = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except Exception as error:
            # Templates are the model's own programs and raise what they like; the messages are the caller's.
            raise InvalidArgumentError("prompt.chat", f"the model's chat template refused it: {error}") from error
        token_ids: list[int] = encoded["input_ids"]
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        # "Cleaning up" spaces would change text that was shown already: "do n" becomes "don't".
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def load_tokenizer(path: str) -> Tokenizer | None:
    """The tokenizer of a local directory or hub name; None when a local directory has none.

    Raises StartupError when there is one and it cannot be loaded.
    """
    folder = Path(path).expanduser()
    if folder.is_dir() and not any(folder.glob("*token*")):
        logger.warning("%s has no tokenizer: only token ids are served", path)
        return None
    try:
        return Tokenizer(AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else path))
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StartupError(f"tokenizer of {path!r} cannot be loaded: {first_line}") from error
