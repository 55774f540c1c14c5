"""A finished run learns further tasks, and ends with the bits of one that saw all from the start.

`squares` has six colours. The runs begin with four of them, two a task, and are extended by others.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import at_step, differences, end
from run_contents import contents
from small_runs import COLOURS, READOUTS, VIT, changed, plain, tiny

import training
from training import cli
from training.analysis.predict import evaluate_run, load
from training.config import Experiment, begun_experiment
from training.extension import FinishedRun, extended_experiment
from training.methods import METHODS
from training.run_dir import SUMMARY, read_json
from training.train import prepare, resume, run_to_end, train

NAMES = sorted(COLOURS)
FIRST, LATER = NAMES[:4], NAMES[4:]
ALL = {"head": {"also": list(READOUTS[1:]), "alignment.epochs": 1}}


def part(root: Path, to: Path, names: list[str], *, files: slice = slice(None)) -> Path:
    """Some classes of a tree, or some of their files."""
    for split in ("train", "test"):
        for name in names:
            (to / split / name).mkdir(parents=True, exist_ok=True)
            for path in sorted((root / split / name).iterdir())[files]:
                shutil.copy(path, to / split / name)
    return to


@pytest.fixture
def photos(tmp_path: Path, root: Path) -> tuple[Path, Path]:
    """The folder of the first four colours, and that of the other two."""
    return part(root, tmp_path / "first", FIRST), part(root, tmp_path / "later", LATER)


def begun(tmp_path: Path, first: Path, **changes: Any) -> Path:
    """A finished run on the first folder."""
    return train(tiny(first, tmp_path / "run", **changes), quiet=True)


def uninterrupted(run: Path, out: Path, **changes: Any) -> Path:
    """The run that the configuration of an extended one gives from the beginning."""
    experiment = begun_experiment(run)
    return train(changed(experiment, out=str(out), **changes), quiet=True)


@pytest.mark.parametrize("method", [name for name in METHODS.paths if name != "joint"])
def test_every_method_goes_on_with_the_same_bits(
    tmp_path: Path, photos: tuple[Path, Path], method: str
) -> None:
    run = begun(tmp_path, photos[0], method={"name": method}, **ALL)
    before = contents(run)
    longer = training.extend(run, photos[1], increment=1, quiet=True)
    assert longer == tmp_path / "run-extended-1"
    assert contents(run) == before
    assert differences(longer, uninterrupted(longer, tmp_path / "whole")) == []
    tasks = read_json(longer / "classes.json")["tasks"]
    assert tasks == [[0, 1], [2, 3], [4], [5]]


def test_a_method_that_learns_all_at_once_is_refused(
    tmp_path: Path, photos: tuple[Path, Path]
) -> None:
    run = begun(tmp_path, photos[0], method={"name": "joint"})
    with pytest.raises(ValueError, match="joint"):
        training.extend(run, photos[1], quiet=True)
    assert [path.name for path in tmp_path.glob("run*")] == ["run"]


def test_a_share_that_grows_with_the_tasks_is_said_to_differ(
    tmp_path: Path, photos: tuple[Path, Path]
) -> None:
    for name, lamb, differs in (("grows", 0.5, True), ("stays", 1.0, False)):
        method = {"name": "inflora", "lamb": lamb, "lame": 1.0}
        run = train(tiny(photos[0], tmp_path / name, method=method), quiet=True)
        longer = training.extend(run, photos[1], quiet=True)
        notes = read_json(longer / "environment.json")["extends"][0]["notes"]
        assert any("number of tasks" in note for note in notes) == differs


def test_the_bits_are_those_of_one_folder_in_the_same_class_order(
    tmp_path: Path, root: Path, photos: tuple[Path, Path]
) -> None:
    longer = training.extend(begun(tmp_path, photos[0]), photos[1], quiet=True)
    names = read_json(longer / "classes.json")["class_names"]
    data = {"class_order": names, "task_sizes": [2, 2, 2]}
    whole = train(tiny(root, tmp_path / "whole", data=data), quiet=True)
    for name in ("model.safetensors", "readouts.safetensors"):
        assert (longer / name).read_bytes() == (whole / name).read_bytes()
    assert read_json(longer / SUMMARY)["counts"] == read_json(whole / SUMMARY)["counts"]


def test_a_stream_that_was_cut_short_goes_on(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, root: Path
) -> None:
    run = train(tiny(root, tmp_path / "run", data={"tasks": 1}), quiet=True)
    second = training.extend(run, tasks=1, quiet=True)
    third = training.extend(second, quiet=True)
    assert (second.name, third.name) == ("run-extended-1", "run-extended-2")
    assert differences(third, plain(tmp_path_factory)) == []
    with pytest.raises(ValueError, match="all tasks"):
        training.extend(third, quiet=True)
    assert [x["tasks"] for x in read_json(third / "environment.json")["extends"]] == [1, 2]


def test_the_digits_go_on(tmp_path: Path) -> None:
    data = {"name": "digits", "init_cls": 2, "increment": 2}
    settings = {
        "backbone": {"options": {**VIT, "img_size": 8, "patch_size": 4, "in_chans": 1}},
        "train": {"epochs": 1, "batch_size": 200},
    }
    pixels = {"image_size": 8, "resize": None, "train_crop": "none", "pad": 0, "flip": False}

    def experiment(out: str, tasks: int) -> Experiment:
        return tiny(tmp_path, tmp_path / out, data={**data, **pixels, "tasks": tasks}, **settings)

    longer = training.extend(train(experiment("run", 2), quiet=True), tasks=1, quiet=True)
    assert differences(longer, train(experiment("whole", 3), quiet=True)) == []
