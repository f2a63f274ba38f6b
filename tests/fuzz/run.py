"""Fuzz one target by coverage, with atheris, for a bounded time: `python -m fuzz.run NAME [SECONDS]`.

Inputs that found something new stay in build/fuzz/NAME and are the beginning of the next run. An input that broke a
promise is left beside them as crash-…; the exit code is then not 0.
"""

import hashlib
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kvbaton.handoff"]):
    from fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
MAX_INPUT_BYTES = 8192


def main(name: str, seconds: str = "60") -> None:
    """Does not return."""
    target = TARGETS[name]
    corpus = ROOT / "build" / "fuzz" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    options = [f"-max_total_time={seconds}", f"-max_len={MAX_INPUT_BYTES}", f"-artifact_prefix={corpus}/"]
    atheris.Setup([name, str(corpus), *options, "-timeout=20", "-rss_limit_mb=1024"], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
