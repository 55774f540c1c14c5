"""Real processes that are killed at any moment, and go on to the same bits."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from interrupted import differences
from small_runs import flags, tiny, tree

from training.config import Experiment
from training.loop import train

EPOCHS = 8  # long enough to be hit inside


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "training.cli", "train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def hit(process: subprocess.Popen[bytes], run: Path, number: signal.Signals, delay: float) -> int:
    """Send a signal some time after the process has touched the run folder; its status."""
    # Only a process that is inside has the lock; a killed one leaves the file, not its number.
    while process.poll() is None and not _holds(process.pid, run / ".lock"):
        time.sleep(0.02)
    time.sleep(delay)
    process.send_signal(number)
    return process.wait(timeout=120)


def _holds(pid: int, lock: Path) -> bool:
    return lock.is_file() and lock.read_text() == f"{pid}\n"


def survives(experiment: Experiment, whole: Path, signals: list[signal.Signals], seed: int) -> None:
    """Kill, go on, and kill again; then all files are those of the whole run."""
    draw, run = random.Random(seed), Path(str(experiment.out))
    log = run.with_suffix(".log")
    first = [*flags(experiment), f"--train.epochs={EPOCHS}", "--checkpoint.steps=3"]
    for number in signals:
        begun = (run / "checkpoints").is_dir() and any((run / "checkpoints").glob("0*"))
        arguments = ["--resume", str(run)] if begun else [*first, "--overwrite=true"]
        status = hit(start(arguments, log), run, number, draw.uniform(0.0, 1.0))
        expected = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
        if status == 0:  # it was through before
            break
        assert status == expected, log.read_text()
    else:
        assert start(["--resume", str(run)], log).wait(timeout=300) == 0, log.read_text()
    assert differences(run, whole) == []


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    experiment = tiny(tree(tmp_path_factory), out, train={"epochs": EPOCHS})
    return train(experiment, quiet=True)


def test_a_run_survives_two_ends(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, whole: Path
) -> None:
    experiment = tiny(tree(tmp_path_factory), tmp_path / "run")
    survives(experiment, whole, [signal.SIGKILL, signal.SIGTERM], seed=1)


@pytest.mark.slow
def test_a_run_survives_a_dozen_ends(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, whole: Path
) -> None:
    for seed in range(4):
        experiment = tiny(tree(tmp_path_factory), tmp_path / f"run{seed}")
        survives(experiment, whole, [signal.SIGKILL] * 3, seed)
