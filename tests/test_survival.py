"""Real processes that cannot write, share a folder or are stopped: clear words, nothing lost."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from forked import holds, loda, members, status, wait_until
from interrupted import differences
from small_runs import flags, tiny

from training.train import resume, train
from training.checkpoint import newest_checkpoint

EPOCHS = 4  # long enough to be hit inside


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return train(tiny(root, out, train={"epochs": EPOCHS}), quiet=True)


def arguments(root: Path, run: Path, *more: str) -> list[str]:
    return ["train", *flags(tiny(root, run)), f"--train.epochs={EPOCHS}", *more]


def events(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def said(log: Path) -> str:
    """The output of a process that ended with a clear error: no traceback."""
    text = log.read_text()
    assert "Traceback" not in text, text
    return text


def test_a_full_disk_when_the_run_begins(tmp_path: Path, root: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    assert status(loda(arguments(root, run), log, file_size=1 << 10)) == 2
    assert said(log).startswith(f"loda train: cannot write {run / 'config.yaml'}: File too large")
    assert list(run.iterdir()) == []  # nothing half-written is left


def test_a_full_disk_at_the_first_checkpoint(tmp_path: Path, root: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    assert status(loda(arguments(root, run), log, file_size=1 << 14)) == 2
    text = said(log)
    assert "cannot write a checkpoint" in text
    assert "File too large" in text
    assert "there is none before it" in text
    assert list((run / "checkpoints").iterdir()) == []


def test_a_full_disk_after_the_last_task_is_mended_by_resuming(
    tmp_path: Path, root: Path, whole: Path
) -> None:
    # The figure is the largest file of a run as small as this one.
    run, log = tmp_path / "run", tmp_path / "log"
    size = (whole / "accuracy.png").stat().st_size
    assert status(loda(arguments(root, run), log, file_size=size - 1)) == 2
    assert f"cannot write {run / 'accuracy.png'}: File too large" in said(log)
    assert not (run / "summary.json").exists()
    assert newest_checkpoint(run / "checkpoints").record["run"]["tasks"] == 2
    assert differences(resume(run, quiet=True), whole) == []


def test_a_folder_without_the_right_to_write(tmp_path: Path, root: Path) -> None:
    log, locked = tmp_path / "log", tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    try:
        assert status(loda(arguments(root, locked / "run"), log, ordinary=True)) == 2
        assert "cannot write to the run folder" in said(log)
        assert "Permission denied" in said(log)
        log.unlink()
        assert status(loda(arguments(root, locked), log, ordinary=True)) == 2
        assert "Permission denied" in said(log)
    finally:
        locked.chmod(0o755)
    assert list(locked.iterdir()) == []


def test_checkpoints_that_can_no_longer_be_written(tmp_path: Path, root: Path, whole: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    process = loda(arguments(root, run, "--checkpoint.steps=3"), log, ordinary=True)
    wait_until(process, lambda: events(run) > 1)
    (run / "checkpoints").chmod(0o555)
    try:
        assert status(process) == 2
        assert "cannot write a checkpoint" in said(log)
        assert "Permission denied" in said(log)
    finally:
        (run / "checkpoints").chmod(0o755)
    assert differences(resume(run, quiet=True), whole) == []


def test_two_processes_on_one_folder(tmp_path: Path, root: Path, whole: Path) -> None:
    run, log, other = tmp_path / "run", tmp_path / "log", tmp_path / "other"
    first = loda(arguments(root, run, "--checkpoint.steps=3"), log)
    wait_until(first, lambda: events(run) > 0)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGSTOP)  # it would be done before them on a busy machine
    try:
        for attempt in (["train", "--resume", str(run)], arguments(root, run, "--overwrite=true")):
            assert status(loda(attempt, other)) == 2
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert said(other).count(f"in use by another run (process {first.pid})") == 2
    assert status(first) == 0, said(log)
    assert differences(run, whole) == []


def stop(
    root: Path, run: Path, log: Path, number: signal.Signals, more: Sequence[str], to: str
) -> int:
    process = loda(arguments(root, run, *more), log)
    wait_until(process, lambda: events(run) > 1 and holds(process, run))
    assert process.pid is not None
    if to == "group":  # the workers of the next epoch
        wait_until(process, lambda: len(members(process.pid or 0)) == 3)
    if to == "group":
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid, number)
    left = status(process)
    end = time.monotonic() + 10
    while members(process.pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert members(process.pid) == []
    return left


@pytest.mark.parametrize(
    ("number", "to", "workers"),
    [
        (signal.SIGINT, "process", 0),
        (signal.SIGTERM, "group", 2),
        pytest.param(signal.SIGINT, "group", 2, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_process_saves_itself_and_leaves_nobody_behind(
    tmp_path: Path, root: Path, whole: Path, number: signal.Signals, to: str, workers: int
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    more = [f"--data.workers={workers}", "--checkpoint.minutes=60"]
    wanted = {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert stop(root, run, log, number, more, to) == wanted, log.read_text()
    assert said(log).count("stopping as soon as the run is saved") == 1
    assert said(log).count("a checkpoint was written") == 1
    record = newest_checkpoint(run / "checkpoints").record
    assert record["open"] is not None or record["run"]["tasks"] > 0
    assert differences(resume(run, quiet=True), whole) == []
