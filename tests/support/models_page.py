"""docs/models.md, written from what the tests go through: `make models`."""

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from support.modes import MODES
from support.refused_models import NOT_CAUSAL, REFUSED
from support.tiny_models import ARCHITECTURES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"

TEXT = """\
# Models

<!-- Written by `make models` from the tests' registries, tests/support: edit those. -->

A model is a directory or a hub name that `transformers`' `AutoModelForCausalLM` takes. Its layers call kvbaton's
attention through `transformers`' AttentionInterface, so that a decoder which uses it needs no code here. Whether one
can be served is found out when it is loaded: its configuration is looked at, and a few tokens are run to see that
every layer came through with arguments that are understood. One that would answer wrongly is refused, by name and
reason.

## Tested

For each of these, a tiny model with random weights gives in float32 the tokens that `transformers` generates, in each
of the modes below (`tests/model/test_parity.py`), and in bfloat16 their log-probabilities within 0.05
(`tests/model/test_bfloat16.py`).

{tested}

| mode | what happens |
|---|---|
{modes}

Other decoders on the same interface are likely to work, and are tried out at load as these are.

Position embeddings of the kinds `dynamic` and `longrope` change their frequencies once a sequence is longer than the
model was first trained for, and then for all sequences of a batch. Up to that length they are constant; the context
ends there, and the log says so.

Of layers with a sliding window a prefill worker sends what a decode worker will look at: the last tokens of the
prompt. Memory is held for all of them, in all layers (`docs/adr/0015-layers-with-windows-send-their-end.md`).

## Refused

{refused}
"""


def render() -> str:
    """The page."""
    tested = sorted(
        (
            MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__,
            f"`{config.model_type}`",
            architecture.needs or "–",
            architecture.note,
        )
        for architecture in ARCHITECTURES.values()
        for config in [architecture.config()]
    )
    refused = sorted((name, refused.reason) for name, refused in (REFUSED | NOT_CAUSAL).items())
    return TEXT.format(
        tested=table(("architecture", "`model_type`", "beyond plain causal attention", "note"), tested),
        modes="\n".join(row((f"`{name}`", inspect.getdoc(mode) or "")) for name, mode in MODES.items()),
        refused=table(("architecture", "reason"), refused),
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join([row(header), "|" + "---|" * len(header), *map(row, rows)])


def row(cells: Sequence[str]) -> str:
    """A line of one."""
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
