"""docs/models.md says what the tests go through."""

from support.models_page import PAGE, render


def test_the_page_is_the_one_that_the_registries_yield() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "docs/models.md is out of date: run `make models`"
