"""Text to tokens and back; what a model's folder lacks, or has broken, is told as such."""

from pathlib import Path

import pytest

from kvbaton.engine.errors import InvalidArgumentError, StartupError
from kvbaton.text.tokenizer import Tokenizer, load_tokenizer
from text_support import train


def test_placeholder() -> None:
    assert train
