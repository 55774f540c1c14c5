"""Sweeps: what is planned, what is run, what is left alone."""

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from interrupted import at_step, stopped
from small_runs import flags, squares, tiny

from training.config import read_experiment
from training.files import read_json
from training.loop import resume, train
from training.sweeps import (
    Job,
    Sweep,
    finished,
    packaged_sweeps,
    plan,
    read_sweep,
    run_job,
    run_sweep,
)
from training.sweeps.jobs import can_go_on

Write = Callable[[object], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(content: object) -> Path:
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def short(root: Path) -> list[str]:
    """Settings of runs of about a second."""
    return [*[f for f in flags(tiny(root, "x")) if not f.startswith("--out")], "--data.tasks=1"]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in this process: a fresh one spends seconds on imports. One test below does it."""

    def run(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        try:
            if "--resume" in command:
                resume(Path(command[-1]), quiet=True)
            else:
                train(read_experiment(command[-1]), quiet=True)
        except ValueError:
            return subprocess.CompletedProcess(command, 2)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("training.sweeps.run.subprocess.run", run)
    monkeypatch.setattr("training.loop.accuracy_figure", lambda *_, **__: None)


SWEEP = Sweep({"loda": {}, "plain": {"method": {"name": "seq_lora"}}}, [3, 4])


def test_every_variant_runs_with_every_seed(tmp_path: Path) -> None:
    jobs = plan(SWEEP, tmp_path, short(tmp_path))
    found = [(j.experiment.method.name, j.experiment.seed, j.folder) for j in jobs]
    assert found == [
        ("loda", 3, tmp_path / "loda" / "seed3"),
        ("seq_lora", 3, tmp_path / "plain" / "seed3"),
        ("loda", 4, tmp_path / "loda" / "seed4"),
        ("seq_lora", 4, tmp_path / "plain" / "seed4"),
    ]
    assert {j.experiment.method.rank for j in jobs} == {4}


def test_a_part_of_the_variants_can_be_chosen(tmp_path: Path) -> None:
    jobs = plan(SWEEP, tmp_path, short(tmp_path), only=["plain"])
    assert [job.name for job in jobs] == ["plain, seed 3", "plain, seed 4"]
    with pytest.raises(ValueError, match=r"\['other'\]; it has loda, plain"):
        plan(SWEEP, tmp_path, only=["other"])


def test_the_command_line_wins_over_the_file_and_the_variant_over_both(tmp_path: Path) -> None:
    sweep = Sweep(
        {"a": {}, "b": {"train.lr": 0.5, "method.options": {"parts": "kv"}}},
        [0],
        ["digits"],
        {"train": {"lr": 0.3, "epochs": 4}},
    )
    a, b = plan(sweep, tmp_path, ["--train.lr=0.4"])
    assert (a.experiment.train.lr, b.experiment.train.lr) == (0.4, 0.5)
    assert a.experiment.train.epochs == 4
    assert b.experiment.method.options == {"parts": "kv"}


def test_runs_have_processes_of_their_own_and_logs(tmp_path: Path) -> None:
    root, out = squares(tmp_path / "data"), tmp_path / "out"
    bad = {"method.target": "nowhere"}
    jobs = plan(Sweep({"good": {}, "bad": bad}, [0]), out, short(root))
    lines: list[str] = []
    found = run_sweep(jobs, out, workers=2, tell=lines.append)
    assert [o.status for o in found] == ["finished", "failed"]
    (said,) = [line for line in lines if "failed" in line]
    assert "matches no linear layer" in said
    assert str(out / "logs" / "bad-seed0.log") in said
    assert "task 1/1" in found[0].log.read_text()


@pytest.mark.usefixtures("in_process")
def test_a_sweep_skips_what_is_done_and_goes_on_after_a_failure(tmp_path: Path) -> None:
    root, out = squares(tmp_path / "data"), tmp_path / "out"
    variants = {
        "good": {},
        "bad": {"method.target": "nowhere"},
        "frozen": {"method.name": "frozen"},
    }
    jobs = plan(Sweep(variants, [0]), out, short(root))
    first = run_sweep(jobs, out, tell=lambda _: None)
    assert [o.status for o in first] == ["finished", "failed", "finished"]
    stamp = (jobs[0].folder / "summary.json").stat().st_mtime_ns
    again = run_sweep(plan(Sweep(variants, [0]), out, short(root)), out, tell=lambda _: None)
    assert [o.status for o in again] == ["done before", "failed", "done before"]
    assert (jobs[0].folder / "summary.json").stat().st_mtime_ns == stamp


@pytest.mark.usefixtures("in_process")
def test_runs_of_one_seed_see_the_same_classes_and_start(tmp_path: Path) -> None:
    root, out = squares(tmp_path / "data"), tmp_path / "out"
    sweep = Sweep({"loda": {}, "frozen": {"method.name": "frozen"}}, [5])
    run_sweep(plan(sweep, out, short(root)), out, tell=lambda _: None)
    found = [read_json(out / name / "seed5" / "classes.json") for name in ("loda", "frozen")]
    assert found[0] == found[1]


@pytest.mark.usefixtures("in_process")
def test_an_unfinished_run_starts_again(tmp_path: Path) -> None:
    root, out = squares(tmp_path / "data"), tmp_path / "out"
    (job,) = plan(Sweep({"loda": {}}, [0]), out, short(root))
    assert run_job(job, out).status == "finished"
    (job.folder / "summary.json").unlink()
    assert not finished(job)
    assert run_job(job, out).status == "finished"
    assert finished(job)
    assert not read_experiment(job.folder / "config.yaml").overwrite


@pytest.mark.usefixtures("in_process")
def test_an_interrupted_run_goes_on_unless_its_settings_are_others(tmp_path: Path) -> None:
    root, out = squares(tmp_path / "data"), tmp_path / "out"
    (job,) = plan(Sweep({"loda": {"checkpoint.steps": 2}}, [0]), out, short(root))
    stopped(job.experiment, 5)
    assert can_go_on(job)
    (other,) = plan(
        Sweep({"loda": {"checkpoint.steps": 2, "train.lr": 0.7}}, [0]), out, short(root)
    )
    assert not can_go_on(other)
    with at_step(3, lambda: pytest.fail("it began anew")):  # two steps of six are left
        assert run_job(job, out).status == "finished"
    assert finished(job)
    assert not can_go_on(job)


@pytest.mark.usefixtures("in_process")
def test_a_folder_with_another_run_is_left_alone(tmp_path: Path) -> None:
    root, out = squares(tmp_path / "data"), tmp_path / "out"
    (job,) = plan(Sweep({"loda": {}}, [0]), out, short(root))
    run_job(job, out)
    with pytest.raises(ValueError, match=r"other settings \(train.lr differ\)"):
        plan(Sweep({"loda": {"train.lr": 0.7}}, [0]), out, short(root))
    # What does not decide what is learned may differ.
    assert finished(plan(Sweep({"loda": {"method.heldout": False}}, [0]), out, short(root))[0])


def test_submitit_runs_a_sweep(tmp_path: Path) -> None:
    jobs = plan(Sweep({"bad": {"method.target": "nowhere"}}, [0]), tmp_path / "out")
    found = run_sweep(jobs, tmp_path / "out", engine="local", slurm={"timeout_min": 5})
    assert [o.status for o in found] == ["failed"]
    assert "matches no linear layer" in found[0].log.read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "found list"),
        ({"variants": ["loda"]}, "has variants and seeds"),
        ({"variants": ["loda"], "seeds": [1], "seed": 1}, "found"),
        ({"variants": {}, "seeds": [1]}, "variants is"),
        ({"variants": {"../up": {}}, "seeds": [1]}, "letters, digits"),
        ({"variants": {"-a": {}}, "seeds": [1]}, "letters, digits"),
        ({"variants": {"loda": {}, "LoDA": {}}, "seeds": [1]}, "different names"),
        ({"variants": [["loda"]], "seeds": [1]}, "variants is"),
        ({"variants": ["loda"], "seeds": [1, 1]}, "different whole numbers"),
        ({"variants": ["loda"], "seeds": [-1]}, "different whole numbers"),
        ({"variants": ["loda"], "seeds": [True]}, "different whole numbers"),
        ({"variants": ["loda"], "seeds": [1], "settings": 3}, "settings is 3"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(content: object, message: str, write: Write) -> None:
    with pytest.raises(ValueError, match=message):
        read_sweep(write(content))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"method.nme": "loda"}, "variant v: .*nme"),
        ({"method.name": "nothing"}, "variant v: .*loda, seq_lora"),
        ({"train.lr": "fast"}, "variant v: .*lr"),
        ({"seed": 7}, "variant v: --seed=7.*own to set"),
    ],
)
def test_wrong_settings_are_found_before_anything_runs(
    own: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        plan(Sweep({"v": own}, [0]), tmp_path)


def test_plain_names_are_methods(write: Write) -> None:
    sweep = read_sweep(write({"variants": ["frozen"], "seeds": [1]}))
    assert sweep.variants == {"frozen": {"method.name": "frozen"}}


@pytest.mark.parametrize("name", packaged_sweeps())
def test_packaged_sweeps_are_sound(name: str, tmp_path: Path) -> None:
    jobs = plan(
        read_sweep(name),
        tmp_path,
        ["--data.root=x", "--backbone.weights=y"][: 2 * (name != "digits")],
    )
    assert len({job.folder for job in jobs}) == len(jobs) >= 10
    assert all(isinstance(job, Job) for job in jobs)


def test_an_unknown_sweep_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="caltech101, digits"):
        read_sweep("nothing")
