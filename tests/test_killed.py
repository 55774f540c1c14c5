"""Real processes that are killed at any moment, and go on to the same bits."""

import json
import os
import random
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from forked import holds, loda, saves_itself, status, wait_until
from interrupted import differences
from small_runs import flags, tiny, tree

from training.config import Experiment
from training.train import train

EPOCHS = 8  # long enough to be hit inside


def hit(process: BaseProcess, run: Path, number: signal.Signals, delay: float) -> int:
    """Send a signal some time after the process has touched the run folder; its status."""
    # There is a moment in which nothing can be saved yet. SIGKILL may hit it like any other.
    ready = holds if number == signal.SIGKILL else saves_itself
    wait_until(process, lambda: ready(process, run), 300)
    process.join(delay)
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, number)
    return status(process)


def survives(experiment: Experiment, whole: Path, signals: list[signal.Signals], seed: int) -> int:
    """Kill, go on, and kill again; then all files are those of the whole run. How often it was."""
    draw, run = random.Random(seed), Path(str(experiment.out))
    # A machine that is fast, or busy with other work, must not be through before it is hit.
    seconds = sum(json.loads((whole / "summary.json").read_text())["seconds"].values())
    log, left, ends = run.with_suffix(".log"), -1, 0
    first = ["train", *flags(experiment), f"--train.epochs={EPOCHS}", "--checkpoint.steps=3"]
    for number in signals:
        begun = (run / "checkpoints").is_dir() and any((run / "checkpoints").glob("0*"))
        arguments = ["train", "--resume", str(run)] if begun else [*first, "--overwrite=true"]
        delay = draw.uniform(0.0, min(1.0, 0.4 * seconds))
        left = hit(loda(arguments, log), run, number, delay)
        expected = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
        if (run / "summary.json").is_file():  # it was through before, or just leaving
            assert left in (0, -number), log.read_text()
            break
        assert left == expected, log.read_text()
        ends += 1
    if left != 0:
        assert status(loda(["train", "--resume", str(run)], log)) == 0, log.read_text()
    assert differences(run, whole) == []
    return ends


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    experiment = tiny(tree(tmp_path_factory), out, train={"epochs": EPOCHS})
    return train(experiment, quiet=True)


def test_a_run_survives_two_ends(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, whole: Path
) -> None:
    experiment = tiny(tree(tmp_path_factory), tmp_path / "run")
    assert survives(experiment, whole, [signal.SIGKILL, signal.SIGTERM], seed=1) > 0


@pytest.mark.slow
def test_a_run_survives_a_dozen_ends(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, whole: Path
) -> None:
    ends = seed = 0
    while ends < 12 and seed < 12:  # a run may be through before all of its ends
        experiment = tiny(tree(tmp_path_factory), tmp_path / f"run{seed}")
        ends += survives(experiment, whole, [signal.SIGKILL] * 3, seed)
        seed += 1
    assert ends >= 12
