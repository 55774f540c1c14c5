"""Every requirement of the project has one lower bound, which the pinned versions are not below."""

import re
from pathlib import Path

from minimum import PROJECT, pins

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def numbers(version: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", version)]


def test_every_requirement_has_one_lower_bound() -> None:
    lowest = pins(*PROJECT["optional-dependencies"])
    assert {"array-api-compat", "numpy", "torch", "jax", "mlx", "pytest"} <= set(lowest)


def test_the_pinned_versions_are_not_below() -> None:
    lines = CONSTRAINTS.read_text("utf-8").split()
    pinned = {
        name.lower().replace("_", "-"): v for name, _, v in (x.partition("==") for x in lines)
    }
    lowest = pins(*PROJECT["optional-dependencies"])
    compared = [name for name in lowest if name.lower() in pinned]
    assert len(compared) > 20
    for name in compared:
        assert numbers(pinned[name.lower()]) >= numbers(lowest[name]), name
