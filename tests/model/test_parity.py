"""The engine's greedy output in float32 is `transformers`' own, for every architecture and in every mode in which a
request can be served. The table of both is docs/models.md.
"""

from pathlib import Path

import pytest

from support import tiny_models
from support.modes import MAX_TOKENS, MODES, PROMPTS, Outputs


@pytest.fixture(scope="module", params=list(tiny_models.ARCHITECTURES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outputs]:
    """A tiny model, and what `transformers` generates with it."""
    folder = tiny_models.save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    return folder, tiny_models.reference_greedy(folder, PROMPTS, MAX_TOKENS, ignore_eos=True)


@pytest.mark.parametrize("mode", list(MODES))
def test_greedy_output(model: tuple[Path, Outputs], mode: str) -> None:
    folder, expected = model
    assert MODES[mode](folder) == expected
    # Weights under which any answer is the same would hide every mistake.
    assert len({token for output in expected for token in output}) > 3
