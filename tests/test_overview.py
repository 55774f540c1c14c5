"""What a run says of itself before it starts and after it has ended."""

from pathlib import Path

import pytest
import torch
from run_contents import events
from small_runs import plain, tiny
from torch import nn

from backends.torch import LoDA
from training.config import Experiment, KeepConfig
from training.overview import end, parameter_count, task_sizes
from training.train import train


def test_the_beginning_says_what_is_trained_on_what(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny(root, tmp_path / "run"))
    lines = capsys.readouterr().out.splitlines()
    said = {line.split()[0]: line for line in lines[:14] if line.strip()}
    assert any(line.startswith("note") and "random" in line for line in lines)
    assert str(root) in said["data"]
    assert "36 images to train on, 18 to evaluate on" in said["data"]
    assert "3 tasks of 2 classes" in said["tasks"]
    assert "16 x 16 pixels" in said["images"]
    assert "RGB" in said["images"]
    assert "loda: 2 epochs" in said["method"]
    assert "cpu" in said["device"]
    assert str(tmp_path / "run") in said["results"]
    assert "of the head" in said["trained"]
    assert lines.index(said["trained"]) < lines.index(next(x for x in lines if "task 1/3" in x))
    assert any(line.startswith(f"  loda predict {tmp_path / 'run'}") for line in lines)


def test_a_method_may_train_the_whole_backbone(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny(root, tmp_path / "run", method="own_methods.Whole", train={"epochs": 1}))
    assert "of the backbone (100 %)" in capsys.readouterr().out


def test_tasks_of_one_class_are_warned_of(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"init_cls": 2, "increment": 1, "tasks": 3}
    train(tiny(root, tmp_path / "run", data=sizes, train={"epochs": 1}))
    assert "warning: tasks 2, 3 with one class" in capsys.readouterr().out


def test_sizes_of_tasks_in_words() -> None:
    assert task_sizes([1]) == "1 task of 1 class"
    assert task_sizes([50, 10, 10, 5]) == "4 tasks: 1 of 50 classes, 2 of 10, 1 of 5"


def test_the_end_names_tasks_in_which_nothing_was_learned_or_all_was_lost() -> None:
    line = '{{"event": "task", "task": {}, "update": {}}}\n'
    losses = '{{"event": "epoch", "task": {}, "epoch": {}, "loss": {}}}\n'
    updates = (
        '{"changed": 0.0, "relative": 1e-6}',
        '{"changed": 0.1, "relative": 0.01}',
        "null",
        '{"changed": 0.9, "relative": 4.8}',
    )
    log = "".join(line.format(task, update) for task, update in enumerate(updates, 1)).encode()
    # A loss that rises from one task to the next says nothing.
    epochs = [(1, 1, 0.9), (1, 2, 0.4), (2, 1, 1.9), (2, 2, 1.3), (3, 1, 0.6), (3, 2, 1.1)]
    log += "".join(losses.format(*epoch) for epoch in epochs).encode()
    nothing, lost, rose, *_ = end(Experiment(), Path("run"), log)
    assert "in task 1:" in nothing
    assert "in task 4," in lost
    assert "rose in task 3:" in rose
    extended = end(Experiment(), Path("run"), log, before=4)  # all these are of the run before
    assert not any("warning" in x for x in extended)
    assert not any("warning" in x for x in end(Experiment(), Path("run"), b""))


@pytest.mark.parametrize(("error", "is_said"), [(0.38, True), (0.08, False)])
def test_probabilities_that_are_far_off_are_said(error: float, is_said: bool) -> None:
    calibration = {"temperature": 0.3, "images": 3, "error": error, "confidence": 0.62}
    first = end(Experiment(), Path("run"), b"", calibration=calibration)[0]
    assert ("38 %" in first and "62 %" in first and "3 images" in first) == is_said


@pytest.mark.parametrize("method", ["loda", "seq_lora"])
def test_a_task_that_overwrites_the_weights_is_warned_of_at_once(
    method: str, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rate = {"lr": 3.0, "epochs": 4}
    train(tiny(root, tmp_path / "run", method={"name": method}, train=rate, data={"tasks": 1}))
    printed = capsys.readouterr().out
    assert "warning: probably little is left" in printed.partition("after task")[0]
    assert "larger than the adapted weights in task 1" in printed


def test_a_training_loss_that_rises_is_warned_of_at_once(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"lr": 2.0, "epochs": 6, "schedule": "constant"}
    method = {"name": "seq_lora"}
    train(tiny(root, tmp_path / "run", method=method, train=settings, data={"tasks": 1}))
    losses = [x["loss"] for x in events(tmp_path / "run") if x["event"] == "epoch"]
    rises = [n for n in range(2, 7) if losses[n - 1] > losses[n - 2] + 0.2]
    assert rises  # as the settings are chosen
    printed, _, afterwards = capsys.readouterr().out.partition("after task")
    for epoch in range(1, 7):
        assert (f"in epoch {epoch}. Lower train.lr" in printed) == (epoch in rises)
    assert "the training loss rose in task 1:" in afterwards


def test_branches_of_an_open_task_are_no_parameters_of_the_backbone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with LoDA(model, target="*", rank=1, radius=0.3).task([torch.randn(8, 4)]):
        assert sum(p.numel() for p in model.parameters()) > 30
        assert parameter_count(model) == 30


def test_a_run_is_extended_only_with_its_state() -> None:
    with_state, without = (
        "\n".join(end(Experiment(keep=KeepConfig(state=state)), Path("my run"), b""))
        for state in (True, False)
    )
    assert "loda extend 'my run' " in with_state
    assert "extend" not in without


def test_a_finished_run_records_what_its_updates_did(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    from training.run_dir import read_json

    updates = read_json(plain(tmp_path_factory) / "summary.json")["updates"]
    assert len(updates) == 3
    assert all(0 < update["relative"] < 1 for update in updates)
