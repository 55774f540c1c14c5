"""A run that is cut off anywhere and goes on ends with the same bits as one that is left alone."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import at_step, cut_off, differences, stopped
from run_contents import contents
from small_runs import READOUTS, changed, finished, tiny

from training import cli
from training.config import Experiment
from training.run_dir import read_json, write_json
from training.train import resume, train
from training.methods import METHODS
from training.train import prepare
from training.checkpoint import write_checkpoint

pytestmark = pytest.mark.usefixtures("no_figure")


def compared(experiment: Experiment, tmp_path: Path, steps: list[int]) -> list[str]:
    """What differs between a run that was cut off after these steps and one that was not."""
    whole = train(changed(experiment, out=str(tmp_path / "whole")), quiet=True)
    cut = cut_off(changed(experiment, out=str(tmp_path / "cut")), steps)
    assert not (cut / "checkpoints").exists()
    return differences(cut, whole)


def everything(root: Path, **changes: Any) -> Experiment:
    """All read-outs, all that can be kept, a checkpoint after every second step."""
    settings: dict[str, Any] = {
        "head": {"also": list(READOUTS[1:]), "alignment_epochs": 1},
        "keep": dict.fromkeys(("branches", "moments", "heads", "statistics"), True),
        "checkpoint": {"steps": 2},
        "data": {"tasks": 2},
        **changes,
    }
    return tiny(root, "unused", **settings)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("ncm", "ranpac_frozen")])
def test_every_method_goes_on_inside_a_task(tmp_path: Path, root: Path, method: str) -> None:
    # 12 steps (10 of joint), 6 a task: cut off inside both tasks.
    steps = [5, 6] if method != "joint" else [5]
    assert compared(everything(root, method={"name": method}), tmp_path, steps) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"heldout": True, "history": "both"}, "train": {"optimizer": "adam"}},
        {"method": {"name": "sd_lora", "options": {"parts": "qv"}}},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {"method": {"name": "loda", "options": {"directions": "random"}}},
                {"method": {"name": "seq_lora", "gao": True}},
                {"method": {"name": "o_lora", "options": {"parts": "qv", "alpha": 8.0}}},
                {"method": {"name": "inflora", "options": {"parts": "kv"}}},
                {"data": {"workers": 1, "tasks": 2}},
                {"precision": "bf16"},
            )
        ),
    ],
    ids=lambda changes: str(next(iter(changes.values()))),
)
def test_other_settings_go_on_too(tmp_path: Path, root: Path, changes: dict[str, Any]) -> None:
    assert compared(everything(root, **changes), tmp_path, [8]) == []


def test_drop_out_goes_on_where_it_was(tmp_path: Path, root: Path) -> None:
    experiment = everything(root)
    experiment.backbone.options["proj_drop_rate"] = 0.3
    torch.manual_seed(3)
    assert compared(experiment, tmp_path, [8]) == []


_wholes: dict[Path, Path] = {}


@pytest.fixture
def whole(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A run of `tiny` that nothing interrupted."""
    if root not in _wholes:
        _wholes[root] = train(tiny(root, tmp_path_factory.mktemp("whole") / "run"), quiet=True)
    return _wholes[root]


@pytest.mark.parametrize("limit", [1, 6, 18])
def test_a_run_goes_on_from_every_kind_of_place(
    tmp_path: Path, root: Path, whole: Path, limit: int
) -> None:
    # After the first step, at the end of the last epoch of a task, and after the very last step.
    experiment = tiny(root, tmp_path / "cut", checkpoint={"steps": 1})
    assert differences(cut_off(experiment, [limit]), whole) == []


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_saves_the_run_and_ends_it(
    tmp_path: Path, root: Path, whole: Path, number: signal.Signals, status: type[BaseException]
) -> None:
    experiment, before = tiny(root, tmp_path / "cut"), signal.getsignal(number)
    with (
        at_step(8, lambda: os.kill(os.getpid(), number)),
        pytest.raises(status) as left,
    ):
        train(experiment, quiet=True)
    assert signal.getsignal(number) == before
    if number == signal.SIGTERM:
        assert left.value.args == (143,)
    path = tmp_path / "cut"
    with at_step(1, lambda: pytest.fail("steps are left")), pytest.raises(pytest.fail.Exception):
        resume(path, quiet=True)
    (newest,) = sorted(p.name for p in (path / "checkpoints").iterdir())[-1:]
    found = read_json(path / "checkpoints" / newest / "checkpoint.json")["record"]
    at = found["run"]["tasks"], found["open"]["epoch"], found["open"]["batch"]
    assert at == (1, 0, 2)  # six steps a task, three an epoch
    assert differences(resume(path, quiet=True), whole) == []


def test_a_method_that_cannot_save_an_open_task_goes_on_from_the_last_one(
    tmp_path: Path, root: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.methods.loda.LoDAMethod.saves_open_task", False)
    experiment = tiny(root, tmp_path / "cut", checkpoint={"steps": 1})
    stopped(experiment, 8)
    newest = sorted((tmp_path / "cut" / "checkpoints").iterdir())[-1]
    record = read_json(newest / "checkpoint.json")["record"]
    assert (record["open"], record["run"]["tasks"]) == (None, 1)
    assert differences(resume(tmp_path / "cut", quiet=True), whole) == []


def test_without_checkpoints_nothing_can_go_on(tmp_path: Path, root: Path) -> None:
    stopped(tiny(root, tmp_path / "cut", checkpoint={"keep": 0}), 8)
    assert not (tmp_path / "cut" / "checkpoints").exists()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        resume(tmp_path / "cut", quiet=True)
    with pytest.raises(FileNotFoundError, match=r"no config\.yaml"):
        resume(tmp_path, quiet=True)


def test_other_settings_are_refused(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stopped(tiny(root, tmp_path / "cut"), 8)
    assert cli.main(["train", "--resume", str(path), "--train.lr=0.3", "--seed=5"]) == 2
    said = capsys.readouterr().err
    assert "other settings (train.lr, seed differ)" in said
    assert cli.main(["train", f"--resume={path}", "--train.lr=0.05"]) == 0  # as it was begun
    assert "task 3/3" in capsys.readouterr().out


def test_a_run_goes_on_with_moved_data_and_other_workers(
    tmp_path: Path, root: Path, whole: Path
) -> None:
    shutil.copytree(root, tmp_path / "moved")
    path = stopped(tiny(tmp_path / "moved", tmp_path / "cut"), 8)
    (tmp_path / "moved").rename(tmp_path / "there")
    moved = [f"--data.root={tmp_path / 'there'}", "--data.workers=1", "--checkpoint.steps=2"]
    assert cli.main(["train", "--resume", str(path)]) == 2
    assert cli.main(["train", "--resume", str(path), *moved]) == 0
    assert differences(path, whole) == []


def test_other_data_are_refused(tmp_path: Path, root: Path) -> None:
    path = stopped(tiny(root, tmp_path / "cut"), 8)
    classes = read_json(path / "classes.json")
    write_json(path / "classes.json", {**classes, "order": classes["order"][::-1]})
    with pytest.raises(ValueError, match="data have changed"):
        resume(path, quiet=True)


def test_a_finished_run_says_so(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished(tmp_path_factory)
    assert cli.main(["train", "--resume", str(path)]) == 0
    assert capsys.readouterr().out == f"the run in {path} is finished\n"
    with pytest.raises(ValueError, match="is finished"):
        resume(path)


def test_checkpoints_that_a_finished_run_left_are_removed(copy: Path) -> None:
    # Its process was killed after the results were written.
    write_checkpoint(copy / "checkpoints", {}, {}, b"", keep=2)
    before = contents(copy)
    assert cli.main(["train", "--resume", str(copy)]) == 0
    assert contents(copy) == {k: v for k, v in before.items() if not k.startswith("checkpoints")}


def test_one_process_at_a_time(tmp_path: Path, root: Path, whole: Path) -> None:
    path = stopped(tiny(root, tmp_path / "cut"), 8)
    (path / ".lock").write_text("999999\n")  # of a process that is gone
    held = prepare(tiny(root, path), path)
    before = sorted(path.rglob("*"))
    for attempt in (
        lambda: resume(path, quiet=True),
        lambda: train(tiny(root, path, overwrite=True), quiet=True),
    ):
        with pytest.raises(BlockingIOError, match=rf"in use .*process {os.getpid()}"):
            attempt()
    assert sorted(path.rglob("*")) == before
    held.folder.close()
    assert differences(resume(path, quiet=True), whole) == []
    assert not (path / ".lock").exists()
