"""Text to tokens and back; what a model's folder lacks, or has broken, is told as such."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from kvbaton.engine.errors import InvalidArgumentError, StartupError
from kvbaton.text.tokenizer import Tokenizer, load_tokenizer
from support.tokenizers import train


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "model"))


@pytest.mark.parametrize("text", ["", "the baton", "Zoë's café", "接力棒 🎉", "a , b n't .", "\n\t  "])
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_digest_tells_vocabularies_apart(tokenizer: Tokenizer, byte_fallback_tokenizer: Tokenizer) -> None:
    assert tokenizer.digest == Tokenizer(train(None)).digest
    assert tokenizer.digest != byte_fallback_tokenizer.digest


def test_a_configuration_that_cleans_up_spaces_changes_no_text(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["clean_up_tokenization_spaces"] = True
    config["clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"] = True
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("he 's late , is n't he ?")) == "he 's late , is n't he ?"


def test_a_chat_is_the_templates_text(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode_chat([{"role": "user", "content": "the baton?"}])
    assert token_ids == [0, *tokenizer.encode("user: the baton?\nassistant:")]


def test_a_template_that_refuses_is_the_callers_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        tokenizer.encode_chat([{"role": "system", "content": "x"}])
    assert caught.value.field == "prompt.chat"
    assert "no system here" in str(caught.value)


def test_a_model_without_a_template_says_what_to_send_instead(byte_fallback_tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidArgumentError, match=r"prompt\.chat: the model has no chat template; send text"):
        byte_fallback_tokenizer.encode_chat([{"role": "user", "content": "x"}])


def test_a_saved_tokenizer_is_loaded_whole(saved: Path, tokenizer: Tokenizer) -> None:
    loaded = load_tokenizer(str(saved))
    assert loaded is not None
    assert loaded.encode("the café 🎉") == tokenizer.encode("the café 🎉")
    chat = [{"role": "user", "content": "hi"}]
    assert loaded.encode_chat(chat) == tokenizer.encode_chat(chat)


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert load_tokenizer(str(tmp_path)) is None
    assert "only token ids are served" in caplog.text


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', "[]"])
def test_a_broken_tokenizer_is_no_start(saved: Path, tmp_path: Path, content: str) -> None:
    folder = copy_of(saved, tmp_path)
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(StartupError) as caught:
        load_tokenizer(str(folder))
    message = str(caught.value)
    assert message.startswith(f"tokenizer of {str(folder)!r} cannot be loaded: ")
    assert "\n" not in message
    assert "Traceback" not in message
