"""The page for other frameworks: its JAX example learns, keeps the old task and needs no torch."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")


def shares(text: str) -> list[list[float]]:
    """The numbers of each line."""
    return [[float(x) for x in re.findall(r"\d\.\d\d", line)] for line in text.splitlines()]


@pytest.mark.jax
def test_the_jax_example() -> None:
    pytest.importorskip("jax")
    code, printed = re.findall(r"^```\w*\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[:2]
    after = "import sys\nassert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}\n{after}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found, promised = shares(done.stdout), shares(printed)
    # Other versions round otherwise: a few of 512 labels may change sides.
    assert [len(x) for x in found] == [len(x) for x in promised] == [1, 2, 1, 2]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(promised), atol=0.03)
    (first,), alone, _, loda = found
    assert first - loda[0] <= 0.04
    assert loda[0] > alone[0]
    assert loda[1] > alone[1]
