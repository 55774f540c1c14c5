"""What a run shows and tells: printed tables, trackers, peak memory."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from small_runs import squares, tiny

from training.logging import (
    Clock,
    accuracy_table,
    aligned,
    peak_memory,
    plain_table,
    reset_peak,
)
from training.metrics import AccuracyMatrix
from training.train import prepare, train


def test_the_table_and_the_folder_are_printed_whole(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    out = tmp_path / "run [red] with a rather long name so that it would be wrapped"
    settings: dict[str, Any] = {
        "data": {"init_cls": 1, "increment": 1},
        "train": {"epochs": 0},
        "keep": {"figure": True},
    }
    train(tiny(root, out, **settings))
    printed = capsys.readouterr().out
    assert f"results: {out}\n" in printed
    assert f"figure:  {out / 'accuracy.png'}\n" in printed
    assert " ".join(f"task {n}" for n in range(1, 7)) in " ".join(printed.split())
    assert "task 6/6: accuracy over all classes so far" in printed
    train(tiny(root, tmp_path / "second", train={"epochs": 0}))
    assert "figure:" not in capsys.readouterr().out
    train(tiny(root, tmp_path / "third", train={"epochs": 0}), quiet=True)
    assert capsys.readouterr().out == ""


def test_tables_show_every_number() -> None:
    matrix = AccuracyMatrix((1, 1), ((9,), (6, 4)), ((10,), (10, 5)))
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(accuracy_table(matrix))
    for text in (console.export_text(), plain_table(matrix)):
        for number in ("90.0", "60.0", "80.0", "66.7", "66.67", "78.33", "-30.00"):
            assert number in text


def test_columns_are_aligned() -> None:
    assert aligned([["a", "1", ""], ["bc", "23", "4"]], left=1) == "a    1\nbc  23  4"


def test_the_time_left_grows_with_the_images_of_the_tasks() -> None:
    now = [0.0]
    clock = Clock([100, 300, 100], now=lambda: now[0])
    now[0] = 10.0
    clock.begin_training(1, steps=100, done=0)
    left = []
    for _ in range(100):
        now[0] += 1.0
        left.append(clock.step())
    said = [seconds for seconds in left if seconds is not None]
    # 10 s before and after 100 s of training, for 500 images.
    assert said == [pytest.approx(95 + 10 + 4 * 120)]
    now[0] = 120.0
    assert clock.end_task(1) == pytest.approx(480)
    clock.begin_training(2, steps=300, done=0)
    assert clock.step() is None  # it is said once
    now[0] = 480.0
    assert clock.end_task(2) == pytest.approx(120)
    assert clock.end_task(3) == 0


# Trackers


def logged(run: Path) -> Any:
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (scalars,) = {path.parent for path in (run / "loda").glob("events.out.*")}
    return EventAccumulator(str(scalars)).Reload()


@pytest.mark.parametrize(("method", "steps"), [("loda", [2, 4, 6]), ("ncm", [1, 2, 3])])
def test_tensorboard_receives_losses_accuracies_and_settings(
    tmp_path: Path, method: str, steps: list[int]
) -> None:
    # Where nothing is trained, tasks are told apart all the same.
    settings: dict[str, Any] = {"tracker": "tensorboard", "method": {"name": method}}
    run = train(tiny(squares(tmp_path / "data"), tmp_path / "run", **settings), quiet=True)
    events = logged(run)
    assert [event.step for event in events.Scalars("accuracy/nearest_mean")] == steps
    if method == "loda":
        assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
        settings_seen = [path.read_text() for path in (run / "loda").rglob("hparams.yml")]
        assert any("method.rank: 4" in text for text in settings_seen)


def test_no_tracker_leaves_nothing_behind(run: Path) -> None:
    assert not list(run.rglob("*tfevents*"))


@pytest.mark.parametrize(
    ("name", "message"), [("tensorbord", "tensorboard, trackio"), ("aim", "pip install aim")]
)
def test_a_tracker_that_is_not_there_is_named_before_training(
    name: str, message: str, tmp_path: Path, root: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(tiny(root, tmp_path / "run", tracker=name))
    assert not (tmp_path / "run").exists()


# Memory

CPU = torch.device("cpu")
SIZE = 200 * 2**20


def test_the_peak_is_seen_after_it_is_gone() -> None:
    reset_peak(CPU)
    before = peak_memory(CPU)["process"]
    held = np.ones(SIZE, dtype=np.uint8)
    del held
    high = peak_memory(CPU)["process"]
    assert SIZE // 2 < high - before < 4 * SIZE
    if sys.platform == "linux":  # no other system can start anew
        reset_peak(CPU)
        assert peak_memory(CPU)["process"] < high - SIZE // 2


@pytest.mark.gpu
def test_memory_of_a_gpu() -> None:
    device = torch.device("cuda")
    reset_peak(device)
    before = peak_memory(device)["device"]
    held = torch.ones(SIZE, dtype=torch.uint8, device=device)
    del held
    assert peak_memory(device)["device"] >= before + SIZE
    reset_peak(device)
    assert peak_memory(device)["device"] < before + SIZE
