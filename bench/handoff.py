"""KV from one process's pool to another's: kvbaton's transports beside what the machine allows, NIXL and Mooncake.

    make bench-handoff          (or: python bench/handoff.py --mib 1 8 64 512 --rounds 5 --cores 0 1)

Every system is a pair of processes, the prefill side on one core and the decode side on another; they take turns, and
of those that do not move KV nothing runs. The pools have the shape of the 0.6b model of `random_models`. What is not
installed (bench/peers/setup_nixl.sh, setup_mooncake.sh) is left out, and that is said. Prints a table and writes
build/bench/handoff.json; bench/report.py makes a section of docs/benchmarks.md of it.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import machine
from handoff_pairs import ROOT, SYSTEMS, Pair, System, Times, programs, started
from peers.handoff_load import BLOCK_SIZE, TOKEN_BYTES, Load

TURN_BYTES = 64 << 20
"""A turn of small transfers takes as many as come to this."""
MOST_REPEATS = 32
SLACK = 1.04
"""Pools are so much larger than what is moved, so that shuffled blocks leave gaps."""

Samples = dict[tuple[str, str, str], list[Times]]
"""By case, system and way."""


def loads(mib: Iterable[int], seed: int) -> dict[str, Load]:
    """Each size with its blocks in order, and shuffled, in a pool that has room for any; the way is filled in later."""
    sizes = [size << 20 for size in mib]
    num_blocks = math.ceil(max(TURN_BYTES, *sizes) / TOKEN_BYTES / BLOCK_SIZE * SLACK)
    found = {}
    for size in sizes:
        num_tokens = max(1, round(size / TOKEN_BYTES))
        repeats = min(MOST_REPEATS, max(1, TURN_BYTES // size))
        for shuffled in (False, True):
            case = f"{size >> 20} MiB, {'shuffled' if shuffled else 'in order'}"
            found[case] = Load("", num_tokens, repeats, shuffled, num_blocks, seed)
    return found


def measure(pairs: Mapping[str, Pair], mib: Sequence[int], rounds: int) -> Samples:
    """All cases of all systems that are there, in turns. A round to warm up comes first, and checks every byte."""
    samples: Samples = {}
    turns = [(system, way) for system in SYSTEMS if system.program in pairs for way in system.ways]
    for number in range(rounds + 1):
        for case, load in loads(mib, seed=number).items():
            for system, way in turns:
                mine = dataclasses.replace(load, way=way)
                times = pairs[system.program].move(mine, alone=system.alone)
                if number:
                    samples.setdefault((case, system.name, way), []).append(times)
                elif system.name != "CRC32C":
                    pairs[system.program].check(mine)
            # Who comes after whom changes from case to case.
            turns.append(turns.pop(0))
        sys.stderr.write(f"round {number} of {rounds}\n")
    return samples


def rows_of(samples: Samples, cases: Iterable[str]) -> list[dict[str, Any]]:
    """Medians over the rounds, of each system's best way in each case; a system that is not there has none."""
    rows = []
    for case in cases:
        for system in SYSTEMS:
            ways = {way: samples[case, system.name, way] for way in system.ways if (case, system.name, way) in samples}
            rows += _rows(case, system, ways)
    return rows


def _rows(case: str, system: System, ways: Mapping[str, Sequence[Times]]) -> list[dict[str, Any]]:
    row: dict[str, Any] = {"case": case, "system": system.name}
    if not ways:
        return [{**row, "metric": "rate", "value": None, "unit": "GB/s", "note": "not installed"}]
    # A round's own median: small transfers are many in a round.
    rates = {way: [statistics.median(times.rates) / 1e9 for times in turns] for way, turns in ways.items()}
    best = max(rates, key=lambda way: statistics.median(rates[way]))
    row["way"] = best
    values = {"rate": (rates[best], "GB/s"), "decode CPU": ([1e9 * times.decode_cpu for times in ways[best]], "s/GB")}
    if not system.alone:
        values["prefill CPU"] = [1e9 * times.prefill_cpu for times in ways[best]], "s/GB"
    return [
        {**row, "metric": metric, "value": statistics.median(samples), "unit": unit, "samples": samples}
        for metric, (samples, unit) in values.items()
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", nargs="+", type=int, default=[0, 1], help="the prefill side's and the decode side's")
    parser.add_argument("--peers", type=Path, default=ROOT / "build" / "peers")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench" / "handoff.json")
    options = parser.parse_args()
    everyone = programs(options.peers)
    cases = loads(options.mib, seed=0)
    num_blocks = next(iter(cases.values())).num_blocks
    with started(everyone, options.cores, num_blocks) as pairs:
        samples = measure(pairs, options.mib, options.rounds)
    rows = rows_of(samples, cases)
    by_name = {program.name: program for program in everyone}
    header = machine.describe(
        command="make bench-handoff",
        rounds=options.rounds,
        seed=1,
        cores=options.cores,
        nixl=by_name["nixl"].version("nixl"),
        mooncake=by_name["mooncake"].version("mooncake-transfer-engine-non-cuda"),
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"header": header, "rows": rows}, indent=1))
    for row in rows:
        value = f"{row['value']:8.2f} {row['unit']:5} {row['way']}" if "way" in row else f"{row['note']:>8}"
        sys.stdout.write(f"{row['case']:18} {row['system']:22} {row['metric']:12} {value}\n")


if __name__ == "__main__":
    main()
