"""Sweeps: what is run, what goes on, what is left alone."""

import os
import shutil
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from interrupted import at_step, stopped
from safetensors.torch import save_file
from small_runs import small_vit, squares
from small_sweeps import short, sweep_file

from training import cli, fit
from training.config import read_experiment
from training.distributed import usable_cpus
from training.run_dir import read_json
from training.train import resume, train
from training.sweeps import Sweep, finished, plan, run_job, run_sweep, standing
from training.sweeps.children import Children
from training.sweeps.jobs import can_go_on


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, no_figure: None) -> None:
    """Train in this process: a fresh one spends seconds on imports. One test below does it."""

    def run(_: Children, command: Sequence[str], *__: Any, **___: Any) -> int:
        try:
            if "--resume" in command:
                resume(Path(command[-1]), quiet=True)
            else:
                train(read_experiment(command[-1]), quiet=True)
        except ValueError:
            return 2
        return 0

    monkeypatch.setattr("training.sweeps.run.Children.run", run)


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
def test_runs_of_one_seed_see_the_same_classes_and_mini_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = squares(tmp_path / "data"), tmp_path / "out"
    digest, seen, make = sha256(), dict[str, str](), fit._loss

    def noted(run: Any, forward: Any, pixels: Any, targets: Any, *rest: Any) -> Any:
        digest.update(pixels.numpy().tobytes() + targets.numpy().tobytes())
        seen[run.experiment.method.name] = digest.hexdigest()
        return make(run, forward, pixels, targets, *rest)

    monkeypatch.setattr(fit, "_loss", noted)
    names = ["loda", "frozen", "seq_lora", "inflora"]
    for name in names:
        digest = sha256()
        sweep = Sweep({name: {"method.name": name}}, [5])
        run_sweep(plan(sweep, out, short(root)), out, tell=lambda _: None)
    found = [read_json(out / name / "seed5" / "classes.json") for name in names]
    assert all(classes == found[0] for classes in found)
    assert list(seen) == names
    assert len(set(seen.values())) == 1


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


@pytest.mark.usefixtures("in_process")
def test_a_finished_run_that_cannot_be_read_stops_no_other(tmp_path: Path) -> None:
    root, out = squares(tmp_path / "data"), tmp_path / "out"
    sweep = Sweep({"broken": {}, "frozen": {"method.name": "frozen"}}, [0])
    jobs = plan(sweep, out, short(root))
    jobs[0].folder.mkdir(parents=True)
    (jobs[0].folder / "config.yaml").write_text("method: {", "utf-8")
    (jobs[0].folder / "summary.json").write_text("{}", "utf-8")
    jobs = plan(sweep, out, short(root))
    assert [standing(job) for job in jobs] == ["unreadable", "to do"]
    said: list[str] = []
    found = run_sweep(jobs, out, tell=said.append)
    assert [o.status for o in found] == ["unreadable", "finished"]
    assert f"{jobs[0].folder} holds a finished run that cannot be read" in said[0]
    assert (jobs[0].folder / "config.yaml").read_text("utf-8") == "method: {"


@pytest.mark.usefixtures("in_process")
def test_weights_and_data_by_another_path_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = squares(tmp_path / "data"), tmp_path / "out"
    weights = tmp_path / "weights.safetensors"
    model = small_vit()
    save_file(model.state_dict(), weights)
    settings = [*short(root), "--method.name=frozen", "--backbone.pretrained=true"]
    sweep = Sweep({"a": {}}, [0])
    (job,) = plan(sweep, out, [*settings, f"--backbone.weights={weights}"])
    assert run_job(job, out).status == "finished"

    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    (tmp_path / "link").symlink_to(weights)
    copy = shutil.copy(weights, tmp_path / "copy.safetensors")
    for path in ("../weights.safetensors", "../link", copy):
        found = plan(sweep, out, [*settings, "--data.root=../data", f"--backbone.weights={path}"])
        assert finished(found[0])
    save_file({k: v + 1 for k, v in model.state_dict().items()}, copy)
    with pytest.raises(ValueError, match=r"other settings \(backbone.weights differ\)"):
        plan(sweep, out, [*settings, f"--backbone.weights={copy}"])


def test_an_unfinished_run_goes_on_with_data_by_another_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = squares(tmp_path / "data"), tmp_path / "out"
    (job,) = plan(Sweep({"loda": {"checkpoint.steps": 2}}, [0]), out, short(root))
    stopped(job.experiment, 5)
    monkeypatch.chdir(tmp_path)
    again = [*short(root), "--data.root=./data/../data"]
    assert can_go_on(plan(Sweep({"loda": {"checkpoint.steps": 2}}, [0]), out, again)[0])


def test_the_last_line_that_says_anything_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: Children, __: Sequence[str], log: Path, *___: Any, **____: Any) -> int:
        log.write_bytes(b"first\nno space left on \xff device  \n\n   \n")
        return 1

    monkeypatch.setattr("training.sweeps.run.Children.run", run)
    said: list[str] = []
    run_sweep(plan(Sweep({"loda": {}}, [0]), tmp_path), tmp_path, tell=said.append)
    assert said[0].startswith("loda, seed 0: failed (no space left on \ufffd device; log: ")


def test_a_sweep_without_a_cluster_ends_with_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("training.sweeps.run.shutil.which", lambda _: None)
    sweep = {"variants": ["loda"], "seeds": [1]}
    arguments = ["sweep", str(sweep_file(tmp_path, sweep)), "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--engine", "slurm"]) == 2
    assert "no srun here" in capsys.readouterr().err
    for wrong in ({"timeout": 3}, {"timeout_min": "long"}):
        sweep_file(tmp_path, {**sweep, "slurm": wrong})
        assert cli.main([*arguments, "--engine", "local"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("loda sweep: slurm is {'timeout")
        assert len(said.splitlines()) == 1


def test_the_processors_that_may_be_used_are_shared_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []

    def run(_: Children, __: object, ___: Path, environment: dict[str, str], **____: Any) -> int:
        given.append(environment["OMP_NUM_THREADS"])
        return 0

    monkeypatch.setattr("training.sweeps.run.Children.run", run)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(os, "process_cpu_count", lambda: 6, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert usable_cpus() == 6
    jobs = plan(Sweep({"loda": {}}, [0]), tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run_sweep(jobs, tmp_path, workers=2, tell=lambda _: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # what is inherited wins
    run_sweep(jobs, tmp_path, workers=2, tell=lambda _: None)
    assert given == ["3", "5"]
