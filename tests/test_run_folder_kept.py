"""What a run leaves alone: folders with content, earlier results, other runs."""

import shutil
from pathlib import Path

import pytest
from run_contents import FILES, below, contents
from small_runs import tiny, tree

from training.config import Experiment, read_experiment
from training.train import train
from training.run_dir import RunFolder, choose_folder
from training.train import prepare


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path, run: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "notes.txt").write_text("mine")
    before = contents(copy)
    experiment = read_experiment(run / "config.yaml")
    experiment.out = str(copy)
    with pytest.raises(FileExistsError, match=r"is not empty.*--overwrite true"):
        train(experiment, quiet=True)
    assert contents(copy) == before


def test_a_hidden_file_is_content_too(tmp_path: Path) -> None:
    (tmp_path / ".keep").write_text("")
    with pytest.raises(FileExistsError, match="not empty"):
        choose_folder(Experiment(out=str(tmp_path)))


def test_overwriting_leaves_nothing_of_the_old_run(
    tmp_path: Path, run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "notes.txt").write_text("mine")
    before = contents(copy)
    (copy / ".model.safetensors.123.tmp").write_text("half of a file, left by a crash")
    experiment = tiny(tree(tmp_path_factory), copy, overwrite=True, data={"tasks": 1}, seed=5)
    train(experiment, quiet=True)
    assert below(copy) == FILES | {"notes.txt"}  # a file that is not ours stays
    after = contents(copy)
    assert after.pop("notes.txt") == b"mine"
    assert {name for name, content in after.items() if content == before[name]} == set()


def test_overwriting_removes_results_before_training_begins(tmp_path: Path, run: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    experiment = read_experiment(run / "config.yaml")
    experiment.out, experiment.overwrite = str(copy), True
    prepare(experiment)
    assert below(copy) == {"config.yaml", "classes.json", "environment.json"}


def test_bad_settings_leave_the_old_run_whole_even_with_overwrite(
    tmp_path: Path, run: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    before = contents(copy)
    experiment = read_experiment(run / "config.yaml")
    experiment.out, experiment.overwrite = str(copy), True
    experiment.method.target = "*.nothing"
    with pytest.raises(ValueError, match="matches no linear layer"):
        prepare(experiment)
    assert contents(copy) == before


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="which is a file"):
        choose_folder(Experiment(out=str(tmp_path / "out"), overwrite=True))
    assert (tmp_path / "out").read_text() == "mine"


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choose_folder(Experiment(out="~/run")) == tmp_path / "run"


def test_runs_that_begin_in_the_same_second_do_not_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Both ask before either has made its folder, as two processes would.
    wanted = [choose_folder(Experiment()) for _ in range(2)]
    made = [RunFolder(path, fresh=True).path for path in (wanted[0], wanted[0])]
    assert len(set(made)) == 2
    assert all(path.is_dir() and path.parent.name == "runs" for path in made)
    assert wanted[0].name.startswith("digits-loda-seed1993-")


def test_unnamed_runs_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tree(tmp_path_factory)
    monkeypatch.chdir(tmp_path)
    made = [prepare(tiny(root, None)).folder.path for _ in range(3)]
    assert len(set(made)) == 3
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {p.name for p in made}
