"""The tokenizers of these tests."""

from pathlib import Path

import pytest

from kvbaton.text.tokenizer import Tokenizer
from support.tokenizers import CHAT_TEMPLATE, byte_fallback, train


@pytest.fixture(scope="session")
def byte_fallback_tokenizer() -> Tokenizer:
    """See `byte_fallback`."""
    return Tokenizer(byte_fallback())


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """With a chat template."""
    return Tokenizer(train(CHAT_TEMPLATE))


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, as the files of a model's folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train(CHAT_TEMPLATE).save_pretrained(folder)
    return folder
