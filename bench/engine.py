"""kvbaton's engine beside vLLM's and plain `transformers`, one core each, in one run, taking turns.

    make bench-engine            (or: python bench/engine.py --models 30m 0.6b --rounds 5 --core 1)

Every system is a process of its own, pinned to the same core, of which one computes at a time. vLLM is left out, and
that is said, when its environment (bench/peers/setup_vllm.sh) is not there. Prints a table and writes
build/bench/engine.json; bench/report.py makes docs/benchmarks.md of it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

import machine
from peers.protocol import Steps, Work
from random_models import SHAPES

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(__file__).resolve().parent / "peers"
TCMALLOC = Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")

CASES: dict[str, Work] = {
    "512 tokens": Work(512, 1, 16, 0),
    "2048 tokens": Work(2048, 1, 8, 0),
    "8 x 512 tokens": Work(512, 8, 8, 0),
}


class System:
    """One engine in its process, waiting for work."""

    def __init__(self, name: str, process: "subprocess.Popen[str]") -> None:
        self.name = name
        self._process = process
        self._answer()

    def measure(self, work: Work) -> Steps:
        """Give it work and wait for its times."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(vars(work)) + "\n")
        self._process.stdin.flush()
        return Steps(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("#{"):
                answer: dict[str, Any] = json.loads(line[1:])
                return answer
        raise SystemExit(f"{self.name} ended with {self._process.wait()}; see its output above")


@contextmanager
def started(name: str, python: Path, model: Path, core: int) -> Iterator[System]:
    """Start a system pinned to `core`; it ends with the block."""
    variables = [f"PYTHONPATH={PEERS.parent}", "OMP_NUM_THREADS=1"]
    if name == "vllm":
        variables += [
            "VLLM_CPU_KVCACHE_SPACE=2",
            f"VLLM_CPU_OMP_THREADS_BIND={core}",
            "VLLM_ENABLE_V1_MULTIPROCESSING=0",
            "VLLM_LOGGING_LEVEL=ERROR",
            f"LD_PRELOAD={':'.join(str(path) for path in _preloads(python))}",
        ]
    affinity = ["taskset", "-c", str(core)]
    command = ["env", *variables, *affinity, str(python), str(PEERS / f"engine_{name}.py"), str(model)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield System(name, process)
        finally:
            process.kill()


def _preloads(python: Path) -> list[Path]:
    """Libraries that vLLM's guide asks to load first, those of them that are there."""
    openmp = sorted(python.parent.parent.glob("lib/libiomp5.so"))
    return [path for path in (TCMALLOC, *openmp) if path.exists()]


def pythons(vllm: Path) -> dict[str, Path]:
    """The interpreter of each system that can run here."""
    found = {"kvbaton": Path(sys.executable), "transformers": Path(sys.executable)}
    if (vllm / "bin" / "python").exists():
        found["vllm"] = vllm / "bin" / "python"
    else:
        sys.stderr.write(f"vLLM is left out: no environment at {vllm} (bench/peers/setup_vllm.sh makes one)\n")
    return found


def run_model(name: str, model: Path, systems: dict[str, Path], rounds: int, core: int) -> list[dict[str, Any]]:
    """All cases of one model on all systems, in turns; medians over rounds, as rows."""
    times: dict[tuple[str, str], list[Steps]] = {}
    with ExitStack() as stack:
        running = [stack.enter_context(started(each, python, model, core)) for each, python in systems.items()]
        for round_number in range(rounds + 1):
            for case, work in CASES.items():
                for system in running:
                    steps = system.measure(Work(work.num_tokens, work.batch, work.steps, seed=round_number))
                    # The first round warms up: compilation, caches, memory.
                    if round_number:
                        times.setdefault((case, system.name), []).append(steps)
                running.append(running.pop(0))
            sys.stderr.write(f"{name}: round {round_number} of {rounds}\n")
    return [row for key, steps in sorted(times.items()) for row in _rows(name, *key, steps)]


def _rows(model: str, case: str, system: str, steps: Sequence[Steps]) -> list[dict[str, Any]]:
    work = CASES[case]
    rates = [work.num_tokens * work.batch / step.prefill_seconds for step in steps]
    # The first step after prefill pays for what prefill left in the caches.
    decode = [1e3 * statistics.median(step.decode_seconds[1:]) for step in steps]
    values = {"prefill": (rates, "tok/s"), "decode step": (decode, "ms")}
    return [
        {
            "case": f"{model}, {case}",
            "system": system,
            "metric": metric,
            "value": statistics.median(samples),
            "unit": unit,
            "samples": samples,
        }
        for metric, (samples, unit) in values.items()
    ]


def roofline(name: str, read: float, gemm: float) -> list[dict[str, Any]]:
    """What the machine would allow: bytes a decode step reads at `read`, operations of prefill at `gemm`."""
    config = SHAPES[name]
    rows = []
    for case, work in CASES.items():
        weights, kv_token, macs = _sizes(config)
        seconds = (2 * weights + work.batch * work.num_tokens * kv_token) / read
        attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * work.num_tokens
        operations = 2 * macs + attention
        for metric, value, unit in (
            ("decode step", 1e3 * seconds, "ms"),
            ("prefill", gemm / operations, "tok/s"),
        ):
            rows.append(
                {"case": f"{name}, {case}", "system": "roofline", "metric": metric, "value": value, "unit": unit}
            )
    return rows


def _sizes(config: Any) -> tuple[int, int, int]:
    """Weights that a step reads, bytes of KV a token, and multiplications of a prompt token in the layers."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    layer = config.hidden_size * dim * (2 * heads + 2 * kv_heads) + 3 * config.hidden_size * config.intermediate_size
    layers = config.num_hidden_layers * layer
    kv_token = config.num_hidden_layers * kv_heads * dim * 2 * 2
    return layers + config.vocab_size * config.hidden_size, kv_token, layers


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["30m", "0.6b"], choices=["30m", "0.6b"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--core", type=int, default=1)
    parser.add_argument("--vllm", type=Path, default=ROOT / "build" / "peers" / "vllm")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "models")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench" / "engine.json")
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.core})
    torch.set_num_threads(1)
    systems = pythons(options.vllm)
    rows: list[dict[str, Any]] = []
    rates = {"read": machine.read_rate(), "copy": machine.copy_rate(), "gemm": machine.gemm_rate()}
    for name in options.models:
        model = options.folder / name
        if not model.exists():
            subprocess.run([sys.executable, PEERS.parent / "random_models.py", name, model, "--seed", "1"], check=True)
        rows += run_model(name, model, systems, options.rounds, options.core)
    again = {"read": machine.read_rate(), "copy": machine.copy_rate(), "gemm": machine.gemm_rate()}
    best = {rate: max(rates[rate], again[rate]) for rate in rates}
    for name in options.models:
        rows += roofline(name, best["read"], best["gemm"])
    header = machine.describe(
        command="make bench-engine",
        rounds=options.rounds,
        seed=1,
        vllm=_version(systems.get("vllm")),
        **{f"{rate}_rate": value for rate, value in best.items()},
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"header": header, "rows": rows}, indent=1))
    for row in rows:
        sys.stdout.write(
            f"{row['case']:24} {row['metric']:12} {row['system']:13} {row['value']:10,.1f} {row['unit']}\n"
        )


def _version(python: Path | None) -> str:
    if python is None:
        return "not measured"
    code = "from importlib.metadata import version; print(version('vllm-cpu'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
