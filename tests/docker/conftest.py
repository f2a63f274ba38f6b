"""The files of docker/, parsed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[2]

Instructions = list[tuple[str, str]]
"""Instruction and arguments, in the order of the file."""


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository, which is the context of the build."""
    return ROOT


@pytest.fixture(scope="session")
def compose() -> dict[str, Any]:
    """The compose file, with its anchors resolved."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    return loaded


@pytest.fixture(scope="session")
def stages() -> dict[str, Instructions]:
    """The Dockerfile's stages by name, each with its FROM first; what stands before them all is under ""."""
    found: dict[str, Instructions] = {"": []}
    name = ""
    for item in DockerfileParser(path=str(ROOT / "docker/Dockerfile")).structure:
        instruction, value = item["instruction"], item["value"]
        if instruction == "COMMENT":
            continue
        if instruction == "FROM":
            _, _, name = value.partition(" AS ")
            assert name, f"a stage without a name: FROM {value}"
            found[name] = []
        found[name].append((instruction, value))
    return found


@pytest.fixture(scope="session")
def image(stages: dict[str, Instructions]) -> Callable[[str, str], Instructions]:
    """`image(target, device)`: all instructions that an image is made of, those of its base stages first."""

    def collect(target: str, device: str) -> Instructions:
        base = stages[target][0][1].partition(" AS ")[0].replace("${DEVICE}", device)
        return [*(collect(base, device) if base in stages else []), *stages[target]]

    return collect
