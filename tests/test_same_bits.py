"""Same seed, same machine: processes of the command line give the same bits, run twice."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interrupted import differences
from small_runs import READOUTS, flags, tiny, tree


def trained(root: Path, out: Path, workers: int, hash_seed: int) -> Path:
    """A run in a fresh interpreter, with all read-outs and all that can be kept."""
    keep = [f"--keep.{name}=true" for name in ("branches", "moments", "heads", "statistics")]
    also = f"--head.also={list(READOUTS[1:])}".replace("'", '"')
    settings = [*flags(tiny(root, out)), "--data.tasks=2", also, "--head.alignment_epochs=1"]
    # The order of sets and the like differs from one of these seeds to another.
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "training.cli", "train", f"--data.workers={workers}"]
    subprocess.run([*command, *settings, *keep], env=environment, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tree(tmp_path_factory), tmp_path_factory.mktemp("first") / "run", 0, 0)


@pytest.mark.parametrize(
    ("workers", "hash_seed"), [(2, 1), pytest.param(0, 4711, marks=pytest.mark.slow)]
)
def test_a_second_process_gives_the_same_bits(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    first: Path,
    workers: int,
    hash_seed: int,
) -> None:
    again = trained(tree(tmp_path_factory), tmp_path / "run", workers, hash_seed)
    assert differences(again, first) == []
