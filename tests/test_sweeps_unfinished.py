"""Sweeps that meet what others began and did not finish: nothing of it is thrown away."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from interrupted import stopped
from run_contents import contents
from small_runs import flags, squares, tiny

from training import cli, sweeps
from training.sweeps import Job, Outcome, Sweep, plan, run_job
from training.sweeps.children import Children
from training.sweeps.jobs import can_go_on


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """What would be run, were there processes."""
    found: list[Sequence[str]] = []

    def run(_: Children, command: Sequence[str], *__: Any, **___: Any) -> int:
        found.append(command[5:])
        return 0

    monkeypatch.setattr("training.sweeps.run.Children.run", run)
    return found


def planned(root: Path, out: Path, **settings: Any) -> Job:
    given = [f for f in flags(tiny(root, "x")) if not f.startswith("--out")]
    return plan(Sweep({"loda": {"checkpoint.steps": 2, **settings}}, [0]), out, given)[0]


def test_an_unfinished_run_of_other_settings_is_not_replaced(
    tmp_path: Path, commands: list[Sequence[str]]
) -> None:
    root, out = squares(tmp_path / "data"), tmp_path / "out"
    run = stopped(planned(root, out).experiment, 5)
    before = contents(run)
    moved = squares(tmp_path / "moved")
    for settings in ({"train.lr": 0.7}, {"device": "auto"}, {"data.root": str(moved)}):
        outcome = run_job(planned(root, out, **settings), out)
        assert outcome.status == "failed"
        assert f"holds an unfinished run with other settings ({next(iter(settings))} differ)" in (
            outcome.reason
        )
    (run / "config.yaml").write_text("method: {", "utf-8")
    outcome = run_job(planned(root, out), out)
    assert outcome.status == "failed"
    assert "holds an unfinished run that cannot be read" in outcome.reason
    assert not commands
    assert contents(run) == {**before, "config.yaml": b"method: {"}
    # Nothing can go on from these: they are replaced.
    for state in (run / "checkpoints").rglob("state.safetensors"):
        state.unlink()
    assert run_job(planned(root, out), out).status == "finished"
    assert commands == [["--config", str(out / "logs" / "loda-seed0.yaml")]]


def test_settings_that_decide_nothing_let_it_go_on(
    tmp_path: Path, commands: list[Sequence[str]]
) -> None:
    root, out = squares(tmp_path / "data"), tmp_path / "out"
    stopped(planned(root, out).experiment, 5)
    job = planned(root, out, **{"data.workers": 2, "checkpoint.steps": 9})
    assert can_go_on(job)
    assert run_job(job, out).status == "finished"
    assert commands == [["--resume", str(job.folder)]]


def test_a_job_that_a_cluster_stopped_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_sweep(jobs: Sequence[Job], *_: Any, **__: Any) -> list[Outcome]:
        first, second = jobs
        log = tmp_path / "log"
        return [Outcome(first, "finished", log), Outcome(second, "stopped", log)]

    monkeypatch.setattr(sweeps, "run_sweep", run_sweep)
    file = tmp_path / "sweep.yaml"
    file.write_text("variants: [loda, frozen]\nseeds: [1]\n", "utf-8")
    assert cli.main(["sweep", str(file), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert said.out == "1 of 2 runs are done\n"
    assert said.err == "stopped: frozen, seed 1\n"
