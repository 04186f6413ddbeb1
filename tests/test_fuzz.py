"""Inputs of all kinds, valid and broken: the output of the plain form, or an error that says what is wrong."""

import pytest
from fuzzing import TARGETS, run, table


def check(count: int, seed: int) -> None:
    outcomes, valid, faults = run(count, seed)
    print("\n" + table(outcomes, valid))
    assert outcomes.keys() == TARGETS.keys()
    assert sum(valid.values()) >= 0.3 * count and all(valid[name] for name in TARGETS)
    assert not faults, f"{len(faults)} of {count}, the first: " + "\n".join(faults[:10])


def test_a_thousand_inputs():
    check(1000, seed=0)


@pytest.mark.slow
def test_ten_thousand_inputs():
    check(10_000, seed=1)
