"""Trackers: what a run reports, and clear errors where one is not there."""

from pathlib import Path
from typing import Any

import pytest
from small_runs import squares, tiny

from training.train import train
from training.train import prepare


def logged(run: Path) -> Any:
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (scalars,) = {path.parent for path in (run / "loda").glob("events.out.*")}
    return EventAccumulator(str(scalars)).Reload()


def test_tensorboard_receives_losses_accuracies_and_settings(tmp_path: Path) -> None:
    experiment = tiny(squares(tmp_path / "data"), tmp_path / "run", tracker="tensorboard")
    run = train(experiment, quiet=True)
    events = logged(run)
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("accuracy/nearest_mean")] == [2, 4, 6]
    settings = (run / "loda").rglob("hparams.yml")
    assert any("method.rank: 4" in path.read_text() for path in settings)


def test_tasks_are_told_apart_where_nothing_is_trained(tmp_path: Path) -> None:
    experiment = tiny(
        squares(tmp_path / "data"), tmp_path / "run", tracker="tensorboard", method={"name": "ncm"}
    )
    run = train(experiment, quiet=True)
    events = logged(run)
    assert [event.step for event in events.Scalars("accuracy/nearest_mean")] == [1, 2, 3]


def test_no_tracker_leaves_nothing_behind(tmp_path: Path) -> None:
    run = train(tiny(squares(tmp_path / "data"), tmp_path / "run"), quiet=True)
    assert not list(run.rglob("*tfevents*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("tensorbord", "known: .*tensorboard, trackio, wandb"), ("aim", "pip install aim")],
)
def test_a_tracker_that_is_not_there_is_named_before_training(
    name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(tiny(squares(tmp_path / "data"), tmp_path / "run", tracker=name))
    assert not (tmp_path / "run").exists()
