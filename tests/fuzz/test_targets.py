"""The targets hold for their seeds and for small changes of these; coverage takes it from there: `make fuzz`."""

import random

import pytest
from fuzz.sides import Sides
from fuzz.targets import TARGETS, receiver

CHANGES = 300


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_holds_for_its_seeds_and_what_is_near(name: str) -> None:
    target, rng = TARGETS[name], random.Random(name)
    seeds = target.seeds()
    for seed in seeds:
        target.run(seed)
    for _ in range(CHANGES):
        changed = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            match rng.randrange(3):
                case 0 if changed:
                    changed[rng.randrange(len(changed))] = rng.randrange(256)
                case 1:
                    del changed[rng.randrange(len(changed) + 1) :]
                case _:
                    changed += rng.randbytes(rng.randrange(8))
        target.run(bytes(changed))


def test_the_seeds_reach_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[int] = []
    monkeypatch.setattr(Sides, "check", lambda sides: applied.append(len(sides.applied)))
    for seed in TARGETS["receiver"].seeds():
        receiver(seed)
    assert set(applied) == {1}
