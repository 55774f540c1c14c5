"""The attacks of docs/developers/numerics_attack.py still run, and their first cases hold."""

from itertools import islice

import numerics_attack
import pytest

ATTACKS = [a for a in numerics_attack.ATTACKS if a[1] != "NumPy"]


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack[0])
def test_first_cases_hold(attack: tuple) -> None:
    _, _, allowed, cases = attack
    misses = [miss for miss, _ in islice(cases(), 12)]
    assert len(misses) == 12
    assert max(misses) <= allowed
