"""The hand-off's benchmark: both ends compute the same blocks, the best way counts, and every byte is compared."""

import sys
from pathlib import Path
from typing import Any

import handoff
import pytest

import handoff_pairs
import report_handoff
from handoff_pairs import System, Times
from peers import handoff_plain
from peers.handoff_load import BLOCK_BYTES, BLOCK_SIZE, ROW_BYTES, TENSORS, TOKEN_BYTES, Load, Pool


def load(num_tokens: int, *, shuffled: bool = False, repeats: int = 1, num_blocks: int = 8) -> Load:
    return Load("", num_tokens, repeats, shuffled, num_blocks, seed=3)


def times(rate: float, cpu: float) -> Times:
    return Times([rate], prefill_cpu=cpu, decode_cpu=2 * cpu)


def test_no_block_is_used_twice_while_there_are_enough() -> None:
    for shuffled in (False, True):
        blocks = [block for table in load(2 * BLOCK_SIZE, shuffled=shuffled, repeats=4).tables("to") for block in table]
        assert sorted(blocks) == list(range(8))
    ours, theirs = (load(8 * BLOCK_SIZE, shuffled=True).tables(side) for side in ("from", "to"))
    assert ours != theirs


def test_more_repeats_than_blocks_begin_again() -> None:
    assert load(6 * BLOCK_SIZE, repeats=2).tables("to") == [[0, 1, 2, 3, 4, 5]] * 2


def test_runs_are_as_long_as_the_blocks_allow() -> None:
    whole = load(2 * BLOCK_SIZE + 1)
    runs = whole.runs([1, 2, 5])
    assert runs[:2] == [(BLOCK_BYTES, 2 * BLOCK_BYTES), (5 * BLOCK_BYTES, ROW_BYTES)]
    assert runs[2][0] == 8 * BLOCK_BYTES + BLOCK_BYTES
    assert sum(size for _, size in runs) == whole.num_bytes
    assert [size for _, size in whole.block_runs([1, 2, 5])] == [BLOCK_BYTES, BLOCK_BYTES, ROW_BYTES] * TENSORS


def test_both_sides_are_cut_in_the_same_places() -> None:
    moved = load(2 * BLOCK_SIZE)
    for theirs in ([4, 5], [4, 6]):
        source, target = moved.run_pairs([1, 2], theirs, merged=True)
        assert [size for _, size in source] == [size for _, size in target]
    assert len(moved.run_pairs([1, 2], [4, 5], merged=True)[0]) == TENSORS
    assert len(moved.run_pairs([1, 2], [4, 5], merged=False)[0]) == 2 * TENSORS


def test_pieces_hold_all_bytes_and_none_is_too_large() -> None:
    parts = [memoryview(bytes([number]) * number) for number in range(1, 9)]
    cut = list(handoff_plain.pieces(parts, 5))
    assert b"".join(bytes(view) for piece in cut for view in piece) == b"".join(map(bytes, parts))
    assert {sum(map(len, piece)) for piece in cut[:-1]} == {5}


def test_a_copy_between_pools_that_are_cut_differently() -> None:
    moved = load(3 * BLOCK_SIZE + 2, shuffled=True)
    source, target = Pool(8, seed=1), Pool(8, seed=None)
    handoff_plain.copy(source.parts(moved, "from"), target.parts(moved, "to"))
    both = source.parts(moved, "from")[0], target.parts(moved, "to")[0]
    assert b"".join(both[0]) == b"".join(both[1])


def test_loads_have_the_size_that_they_say() -> None:
    found = handoff.loads([1, 64, 512], seed=0)
    assert list(found)[:2] == ["1 MiB, in order", "1 MiB, shuffled"]
    assert found["512 MiB, shuffled"].num_bytes == pytest.approx(512 << 20, rel=0.001)
    assert [case.repeats for case in found.values()] == [32, 32, 1, 1, 1, 1]
    assert all(case.num_tokens <= case.num_blocks * BLOCK_SIZE for case in found.values())


def test_the_best_way_counts_and_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    systems = (System("two ways", "a", ("slow", "quick")), System("absent", "b", ("only",)))
    monkeypatch.setattr(handoff, "SYSTEMS", systems)
    samples = {
        ("case", "two ways", "slow"): [times(1e9, 1e-9)] * 3,
        ("case", "two ways", "quick"): [times(rate, 1e-10) for rate in (9e9, 2e9, 3e9)],
    }
    rows = handoff.rows_of(samples, ["case"])
    assert [(row["metric"], row["value"]) for row in rows[:3]] == [
        ("rate", 3.0),
        ("decode CPU", pytest.approx(0.2)),
        ("prefill CPU", pytest.approx(0.1)),
    ]
    assert {row["way"] for row in rows[:3]} == {"quick"}
    assert rows[3]["value"] is None
    assert rows[3]["note"] == "not installed"


def result() -> dict[str, Any]:
    rates = {"raw TCP": 4.0, "kvbaton grpc": 3.0, "NIXL TCP": 1.0, "memcpy": 8.0, "CRC32C": 12.0}
    rows = [
        {"case": "1 MiB, in order", "system": name, "metric": "rate", "value": rate} for name, rate in rates.items()
    ]
    rows.append({"case": "1 MiB, in order", "system": "kvbaton grpc", "metric": "prefill CPU", "value": 0.25})
    rows.append({"case": "1 MiB, in order", "system": "kvbaton grpc", "metric": "decode CPU", "value": 0.5})
    rows.append({"case": "1 MiB, in order", "system": "NIXL shared memory", "metric": "rate", "value": None})
    names = ("command", "date", "commit", "processor", "kernel", "nixl", "mooncake", "rounds")
    return {"header": {**dict.fromkeys(names, "x"), "cores": [0, 1]}, "rows": rows}


def test_the_section_says_how_many_times_another_ours_is() -> None:
    rows = result()["rows"]
    table = report_handoff.rate_table(rows, report_handoff.OVER_SOCKETS, ours="kvbaton grpc")
    assert table[2] == "| 1 MiB, in order | 4.00 | 3.00 | 1.00 | – | **0.75** | **3.00** | – |"
    table = report_handoff.rate_table(rows, report_handoff.IN_MEMORY, ours="kvbaton shared_memory", beside=["CRC32C"])
    assert table[2] == "| 1 MiB, in order | 8.00 | – | – | 12.00 | – | – |"
    assert report_handoff.cpu_table(rows)[2] == "| 1 MiB, in order | – | 0.25 + 0.50 | – | – | – | – |"
    assert "x" in report_handoff.section(result())


def test_the_chart_has_a_bar_for_what_was_measured() -> None:
    picture = report_handoff.chart(result())
    for rate in ("4.00", "3.00", "1.00", "8.00"):
        assert f">{rate}</text>" in picture
    assert picture.count(">–</text>") == 0


def test_a_mebibyte_goes_from_process_to_process(tmp_path: Path) -> None:
    num_tokens = (1 << 20) // TOKEN_BYTES
    here = [program for program in handoff_pairs.programs(tmp_path) if program.installed]
    assert [program.name for program in here] == ["kvbaton"]
    assert here[0].python == Path(sys.executable)
    with handoff_pairs.started(here, [0, 0], num_blocks=4) as pairs:
        for system in handoff_pairs.SYSTEMS:
            for way in system.ways if system.program == "kvbaton" else ():
                moved = Load(way, num_tokens, 2, shuffled=True, num_blocks=4, seed=1)
                done = pairs["kvbaton"].move(moved, alone=system.alone)
                assert len(done.rates) == 2
                assert min(done.rates) > 0
                if system.name != "CRC32C":
                    pairs["kvbaton"].check(moved)
