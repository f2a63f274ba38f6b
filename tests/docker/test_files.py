"""The Dockerfile and the compose file: what linters say of them, and what they promise."""

import json
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from kvbaton.router.config import RouterConfig
from kvbaton.text.bundled import DEFAULT_MODEL
from kvbaton.worker.config import WorkerConfig

Instructions = list[tuple[str, str]]
Image = Callable[[str, str], Instructions]

DEVICES = ("cpu", "cuda")
SERVICES = ("router", "prefill", "decode")
"""Those of the compose file."""
TARGETS = (*SERVICES, "worker")
PINNED = re.compile(r"[\w./-]+:\d+\.\d+\.\d+-[\w.-]+")


def _hadolint(text: str) -> subprocess.CompletedProcess[str]:
    program = Path(sysconfig.get_path("scripts")) / "hadolint"
    command = [str(program), "--no-color", "--failure-threshold", "style", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)


def _check_compose(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_hadolint_finds_nothing(root: Path) -> None:
    found = _hadolint((root / "docker/Dockerfile").read_text())
    assert found.returncode == 0, found.stdout + found.stderr


def test_hadolint_would_find_something() -> None:
    found = _hadolint("FROM python:latest\nRUN pip install torch\n")
    assert found.returncode == 1
    assert {"DL3007", "DL3013", "DL3042"} <= set(re.findall(r"DL\d{4}", found.stdout))


def test_compose_file_follows_the_specification(root: Path) -> None:
    found = _check_compose(root / "docker/compose.yaml")
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_specification_would_refuse_something(tmp_path: Path) -> None:
    file = tmp_path / "compose.yaml"
    file.write_text("services: {router: {image: kvbaton, health_check: {}}}\n")
    found = _check_compose(file)
    assert found.returncode == 1
    assert "health_check" in found.stdout


@pytest.mark.parametrize("device", DEVICES)
def test_each_device_has_a_target_with_packages_of_its_own(stages: dict[str, Instructions], device: str) -> None:
    assert ("COPY", f"--from={device}-packages /opt/kvbaton /opt/kvbaton") in stages[device]
    installs = [value for name, value in stages[f"{device}-packages"] if name == "RUN" and "pip install" in value]
    assert any("--constraint constraints.txt" in install for install in installs)


def test_an_image_is_for_cpus_unless_told_otherwise(stages: dict[str, Instructions]) -> None:
    assert ("ARG", "DEVICE=cpu") in stages[""]


def test_base_images_are_pinned(stages: dict[str, Instructions]) -> None:
    bases = {stage[0][1].partition(" AS ")[0] for name, stage in stages.items() if name}
    outside = bases - set(stages) - {"${DEVICE}"}
    assert outside
    assert all(PINNED.fullmatch(base) for base in outside), outside


def test_pip_leaves_no_cache(stages: dict[str, Instructions]) -> None:
    runs = [value for stage in stages.values() for name, value in stage if name == "RUN"]
    installs = [run for run in runs if re.search(r"pip (install|wheel)", run)]
    assert installs
    assert all("--no-cache-dir" in run for run in installs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("target", [*DEVICES, *TARGETS])
def test_nobody_is_root(image: Image, target: str, device: str) -> None:
    user = dict(image(target, device))["USER"].partition(":")[0]
    assert user.isdigit()
    assert int(user) > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("service", TARGETS)
def test_each_service_has_an_entry_point_and_a_probe(image: Image, service: str, device: str) -> None:
    last = dict(image(service, device))
    assert json.loads(last["ENTRYPOINT"]) == ["kvbaton", service]
    probe = json.loads(last["HEALTHCHECK"].partition(" CMD ")[2])
    assert probe == ["kvbaton", "health", f"127.0.0.1:{last['EXPOSE'].split()[0]}"]


def test_what_is_copied_is_there_and_is_let_in(root: Path, stages: dict[str, Instructions]) -> None:
    copies = [value.split() for stage in stages.values() for name, value in stage if name in ("COPY", "ADD")]
    sources = {source for copy in copies if not copy[0].startswith("--from=") for source in copy[:-1]}
    lines = (root / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    assert sources == {line[1:] for line in lines if line.startswith("!")}
    assert [source for source in sorted(sources) if not (root / source).exists()] == []


def test_copies_between_stages_name_stages(stages: dict[str, Instructions]) -> None:
    copies = [value for stage in stages.values() for name, value in stage if name == "COPY"]
    named = {match[1] for copy in copies if (match := re.match(r"--from=(\S+) ", copy))}
    assert named <= set(stages)


@pytest.mark.parametrize("service", SERVICES)
def test_compose_runs_the_images_as_they_are_built(compose: dict[str, Any], image: Image, service: str) -> None:
    assert set(compose["services"]) == set(SERVICES)
    settings = compose["services"][service]
    assert settings["build"] == {"context": "..", "dockerfile": "docker/Dockerfile", "target": service}
    assert settings["image"] == f"kvbaton-{service}:{metadata.version('kvbaton')}-cpu"
    assert f"--model={DEFAULT_MODEL}" in settings["command"]
    kind, *probe = settings["healthcheck"]["test"]
    assert kind == "CMD"
    assert probe == json.loads(dict(image(service, "cpu"))["HEALTHCHECK"].partition(" CMD ")[2])


def test_compose_starts_the_router_when_its_workers_serve(compose: dict[str, Any]) -> None:
    healthy = {"condition": "service_healthy"}
    assert compose["services"]["router"]["depends_on"] == {"prefill": healthy, "decode": healthy}


def test_compose_lets_running_requests_finish(compose: dict[str, Any]) -> None:
    grace_seconds = max(RouterConfig().grace_seconds, WorkerConfig().grace_seconds)
    periods = [settings["stop_grace_period"] for settings in compose["services"].values()]
    assert all(float(period.removesuffix("s")) > grace_seconds for period in periods)
