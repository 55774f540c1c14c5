"""A finished run learns further tasks, and ends with the bits of one that saw all from the start.

`squares` has six colours. The runs begin with four of them, two a task, and are extended by others.
"""

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from interrupted import CutOff, at_step, differences, end
from run_contents import contents, events
from safetensors.torch import load_file
from small_runs import COLOURS, READOUTS, VIT, changed, plain, squares, tiny

import training
from training import cli
from training.analysis.predict import load
from training.config import Experiment, begun_experiment
from training.data import DataConfig
from training.data.stream import require_outside
from training.extension import FinishedRun, extended_experiment
from training.methods import METHODS
from training.run_dir import SUMMARY, read_json
from training.train import prepare, resume, run_to_end, train

NAMES = sorted(COLOURS)
FIRST, LATER = NAMES[:4], NAMES[4:]
ALL = {"head": {"also": list(READOUTS[1:]), "alignment.epochs": 1, "compensated.epochs": 1}}


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


# --- images of known classes ----------------------------------------------------------------------


@pytest.fixture
def more(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other squares: of two colours that the first folder has, and of two that it lacks."""
    made = squares(tmp_path_factory.mktemp("more"), train=4, test=2, seed=1)
    return part(made, tmp_path / "more", [*FIRST[:2], *LATER])


def test_new_images_of_known_classes_update_their_statistics(
    tmp_path: Path, photos: tuple[Path, Path], more: Path
) -> None:
    run = begun(tmp_path, photos[0], **ALL)
    longer = training.extend(run, more, quiet=True)
    assert differences(longer, uninterrupted(longer, tmp_path / "whole")) == []
    names = read_json(longer / "classes.json")["class_names"]
    old, new = (load_file(x / "state.safetensors") for x in (run, longer))
    counts = "readouts/gathered/statistics/count"
    grown = [names[n] for n in range(4) if new[counts][n] != old[counts][n]]
    assert sorted(grown) == FIRST[:2]
    assert new[counts].tolist() == [10 if x in FIRST[:2] else 6 if x in FIRST else 4 for x in names]
    (known,) = (e for e in events(longer) if e["event"] == "known")
    assert (known["task"], known["images"]) == (2, 8)
    # The images that are evaluated on have grown too.
    total = read_json(longer / SUMMARY)["counts"]["nearest_mean"]["total"]
    assert sorted(zip(names, total[-1], strict=True)) == [
        *((name, 5) for name in FIRST[:2]),
        *((name, 3) for name in FIRST[2:]),
        *((name, 2) for name in LATER),
    ]


def test_images_of_known_classes_alone_leave_the_model_and_the_heads(
    tmp_path: Path, photos: tuple[Path, Path], more: Path
) -> None:
    run = begun(tmp_path, photos[0], **ALL)
    only = part(more, tmp_path / "only", FIRST[:2])
    longer = training.extend(run, only, quiet=True)
    assert differences(longer, uninterrupted(longer, tmp_path / "whole")) == []
    assert (longer / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    before, after = (load_file(x / "readouts.safetensors") for x in (run, longer))
    changed_by = {name for name in before if not before[name].equal(after[name])}
    assert changed_by == {f"{name}/weight" for name in READOUTS if name != "heads"}
    assert len(read_json(longer / SUMMARY)["counts"]["heads"]["sizes"]) == 2
    third = training.extend(longer, part(more, tmp_path / "rest", LATER), quiet=True)
    assert differences(third, uninterrupted(third, tmp_path / "all")) == []
    with pytest.raises(ValueError, match="nothing to learn"):
        training.extend(third, only, quiet=True)


@pytest.mark.parametrize("images", [1, 7])
def test_images_of_known_classes_leave_the_temperature_as_it_was(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    photos: tuple[Path, Path],
    images: int,
) -> None:
    run = begun(tmp_path, photos[0], **ALL)
    made = squares(tmp_path_factory.mktemp("more"), train=images, test=2, seed=1)
    longer = training.extend(run, part(made, tmp_path / "only", FIRST[:2]), quiet=True)
    before, after = (read_json(x / SUMMARY)["calibration"] for x in (run, longer))
    for name, entry in after.items():
        for key in ("temperature", "images"):
            assert entry[key] == before[name][key]


def test_a_folder_that_has_grown_extends_its_own_run(
    tmp_path: Path, root: Path, photos: tuple[Path, Path]
) -> None:
    folder = photos[0]
    run = begun(tmp_path, folder)
    with pytest.raises(ValueError, match="nothing to learn"):
        training.extend(run, folder, quiet=True)
    part(root, folder, LATER)
    longer = training.extend(run, folder, quiet=True)
    # What it holds of the old classes was learned before: no image counts twice.
    assert [e["event"] for e in events(longer)].count("known") == 0
    assert read_json(longer / "classes.json")["test"]["images"] == 18
    data = {"class_order": read_json(longer / "classes.json")["class_names"]}
    data |= {"task_sizes": [2, 2, 2], "root": str(root)}
    whole = train(tiny(folder, tmp_path / "whole", data=data), quiet=True)
    assert (longer / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


# --- what is no longer there ----------------------------------------------------------------------


def test_old_images_may_be_gone(
    tmp_path: Path, photos: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"keep": {"branches": True, "moments": True, "figure": True}}
    run = begun(tmp_path, photos[0], **settings)
    whole = training.extend(run, photos[1], out=tmp_path / "whole", quiet=True)
    photos[0].rename(tmp_path / "moved")
    longer = training.extend(run, photos[1], quiet=True)
    for name in ("model.safetensors", "readouts.safetensors"):
        assert (longer / name).read_bytes() == (whole / name).read_bytes()
    assert read_json(longer / "classes.json")["images"] == [12, 12, 12]
    counts = read_json(longer / SUMMARY)["counts"]["nearest_mean"]
    assert counts["total"][-1] == [0, 0, 0, 0, 3, 3]
    assert counts["total"][:2] == read_json(whole / SUMMARY)["counts"]["nearest_mean"]["total"][:2]
    (before,) = read_json(longer / "environment.json")["extends"]
    assert any("no test images" in note for note in before["notes"])
    with pytest.warns(RuntimeWarning, match="first"):
        assert cli.main(["eval", str(longer)]) == 0
    said = capsys.readouterr().out
    assert "by task (%): -  -  " in said
    assert "as recorded" in said
    assert cli.main(["verify", str(longer)]) == 0
    assert cli.main(["report", str(longer), "--out", str(tmp_path / "page")]) == 0


def flat(root: Path, to: Path, classes: dict[str, int]) -> Path:
    """Class folders without a split, with so many training images of each class."""
    for name, count in classes.items():
        (to / name).mkdir(parents=True)
        for path in sorted((root / "train" / name).iterdir())[:count]:
            shutil.copy(path, to / name)
    return to


@pytest.mark.parametrize("new", [[], LATER])
def test_one_image_of_a_known_class_is_enough_without_the_old_ones(
    tmp_path: Path, root: Path, new: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun(tmp_path, flat(root, tmp_path / "june", dict.fromkeys(FIRST, 5)), **ALL)
    july = flat(root, tmp_path / "july", {FIRST[0]: 6, **dict.fromkeys(new, 6)})
    for path in sorted((july / FIRST[0]).iterdir())[:5]:
        path.unlink()
    (tmp_path / "june").rename(tmp_path / "moved")
    longer = training.extend(run, july, quiet=True)
    before, after = (load_file(x / "state.safetensors") for x in (run, longer))
    counts = "readouts/gathered/statistics/count"
    assert int(after[counts][:4].sum()) == int(before[counts].sum()) + 1
    old, new_ones = (read_json(x / SUMMARY)["counts"]["ridge"] for x in (run, longer))
    assert new_ones["correct"][:2] == old["correct"]  # nothing measured before is lost
    assert load(longer).predict(list((july / FIRST[0]).iterdir()))
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that images are missing
        status = cli.main(["eval", str(longer)])
    assert status == (0 if new else 2)
    assert new or "no image to evaluate on" in capsys.readouterr().err


def test_copies_of_what_was_learned_do_not_count_twice(tmp_path: Path, root: Path) -> None:
    first = flat(root, tmp_path / "first", dict.fromkeys(FIRST, 5))
    run = begun(tmp_path, first, **ALL)
    again = flat(root, tmp_path / "again", {**dict.fromkeys(FIRST, 5), LATER[0]: 5})
    extra = again / FIRST[0] / "extra.png"
    shutil.copy(root / "train" / FIRST[0] / "5.png", extra)
    longer = training.extend(run, again, quiet=True)
    before, after = (load_file(x / "state.safetensors") for x in (run, longer))
    counts = "readouts/gathered/statistics/count"
    grown = int(after[counts][:4].sum()) - int(before[counts].sum())
    tested = [read_json(x / "classes.json")["test"]["images"] for x in (run, longer)]
    # The image that is new is learned or evaluated on; of the new class one of five is held out.
    assert grown + tested[1] - tested[0] == 1 + 1
    # Without the first folder nobody can know, and the run says so.
    first.rename(tmp_path / "moved")
    blind = training.extend(run, again, out=tmp_path / "blind", quiet=True)
    notes = read_json(blind / "environment.json")["extends"][0]["notes"]
    assert any("count twice" in note for note in notes)


@pytest.mark.parametrize("place", ["runs/mine", "red/run"])
def test_results_do_not_go_among_the_photos(tmp_path: Path, root: Path, place: str) -> None:
    folder = flat(root, tmp_path / "photos", dict.fromkeys(FIRST, 5))
    with pytest.raises(ValueError, match="out must not lie in the folder of the photos"):
        train(tiny(folder, folder / place), quiet=True)
    run = begun(tmp_path, folder)
    more = flat(root, tmp_path / "more", dict.fromkeys(LATER, 5))
    with pytest.raises(ValueError, match="out must not lie in the folder of the photos"):
        training.extend(run, more, out=more / place, quiet=True)
    assert sorted(x.name for x in folder.iterdir()) == FIRST
    assert sorted(x.name for x in more.iterdir()) == LATER


def test_other_data_sets_need_no_folder_for_the_results(tmp_path: Path, root: Path) -> None:
    gone = DataConfig("cub", {"root": str(tmp_path / "gone")})
    require_outside(tmp_path / "out", gone)  # its images may be gone
    more = flat(root, tmp_path / "more", dict.fromkeys(LATER, 5))
    names = {"class_order": LATER, "task_sizes": [1, 1]}
    extended = replace(gone, **names, extensions=[str(more)], extension_tasks=[1])
    require_outside(tmp_path / "out", extended)
    with pytest.raises(ValueError, match="folder of the photos"):
        require_outside(more / "out", extended)


def test_an_extension_needs_its_own_images(tmp_path: Path, photos: tuple[Path, Path]) -> None:
    run = begun(tmp_path, photos[0])
    with pytest.raises(FileNotFoundError, match="missing"):
        training.extend(run, tmp_path / "missing", quiet=True)
    longer = training.extend(run, photos[1], quiet=True)
    photos[0].rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="first"):  # from the beginning it needs them all
        uninterrupted(longer, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


# --- interrupted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_an_extension_that_was_cut_off_is_resumed(
    tmp_path: Path, photos: tuple[Path, Path], more: Path, steps: int
) -> None:
    run = begun(tmp_path, photos[0], checkpoint={"steps": 1}, **ALL)
    before = contents(run)
    whole = training.extend(run, more, out=tmp_path / "whole", quiet=True)
    longer = extended_experiment(run, more, experiment=begun_experiment(run))
    started = prepare(longer, origin=FinishedRun.read(run, longer))
    started.on_step = at_step(steps, end)
    with pytest.raises(CutOff):
        run_to_end(started, quiet=True)
    cut = started.folder.path
    assert differences(resume(cut, quiet=True), whole) == []
    assert contents(run) == before
    assert read_json(cut / "environment.json")["extends"][0]["tasks"] == 2


def test_an_extension_is_resumed_without_the_old_images(
    tmp_path: Path, photos: tuple[Path, Path]
) -> None:
    run = begun(tmp_path, photos[0], checkpoint={"steps": 1})
    photos[0].rename(tmp_path / "moved")
    longer = extended_experiment(run, photos[1], experiment=begun_experiment(run))
    started = prepare(longer, origin=FinishedRun.read(run, longer))
    started.on_step = at_step(2, end)
    with pytest.raises(CutOff):
        run_to_end(started, quiet=True)
    whole = training.extend(run, photos[1], out=tmp_path / "whole", quiet=True)
    assert differences(resume(started.folder.path, quiet=True), whole) == []


# --- refused --------------------------------------------------------------------------------------


def test_a_run_without_its_state_is_refused(tmp_path: Path, photos: tuple[Path, Path]) -> None:
    run = begun(tmp_path, photos[0], keep={"state": False})
    with pytest.raises(FileNotFoundError, match=r"keep\.state"):
        training.extend(run, photos[1], quiet=True)


def test_a_changed_state_is_refused(tmp_path: Path, photos: tuple[Path, Path]) -> None:
    run = begun(tmp_path, photos[0])
    with (run / "state.safetensors").open("ab") as file:
        file.write(b"0")
    with pytest.raises(ValueError, match="not the file"):
        training.extend(run, photos[1], quiet=True)


def test_the_command(
    tmp_path: Path, photos: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = begun(tmp_path, photos[0]), tmp_path / "out"
    command = ["extend", str(run), str(photos[1])]
    assert cli.main([*command, "--train.lr", "0.3"]) == 2
    assert "train.lr" in capsys.readouterr().err
    assert cli.main([*command, "--tasks", "2"]) == 2
    assert "increment" in capsys.readouterr().err
    assert cli.main(["extend", str(photos[1]), str(run)]) == 2
    assert "finished" in capsys.readouterr().err
    before = contents(run)
    assert cli.main([*command, "--out", str(run), "--overwrite"]) == 2
    assert "another folder" in capsys.readouterr().err
    assert contents(run) == before
    assert not out.exists()
    assert cli.main([*command, "--out", str(out), "--increment", "1", "--data.workers", "1"]) == 0
    said = capsys.readouterr()
    assert "come after the old ones" in said.out
    assert "task 4/4" in said.out
    assert begun_experiment(out).data.workers == 1
    assert cli.main([*command, "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main(["eval", str(out)]) == 0
    capsys.readouterr()
    image = photos[1] / "test" / LATER[0] / "0.png"
    assert cli.main(["predict", str(out), str(image)]) == 0
    assert LATER[0] in capsys.readouterr().out
    assert load(out).classes[:4] == load(run).classes
