"""Runs that released versions wrote stay readable: tests/written_runs has one of each version.

A run of the version in work is replaced when its format changes; one of a release never is.
"""

import shutil
from pathlib import Path

import pytest

from training import cli, extend, load
from training.analysis.evaluate import evaluate_run
from training.run_dir import changed_files, is_finished, read_json

RUNS = sorted(path for path in Path(__file__).with_name("written_runs").iterdir() if path.is_dir())


@pytest.fixture(params=RUNS, ids=lambda path: path.name)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A run of a version, in a folder that may be written to."""
    copy: Path = shutil.copytree(request.param, tmp_path / "run")
    return copy


def test_it_is_whole_and_finished(run: Path) -> None:
    assert is_finished(run)
    assert not changed_files(run)


def test_it_is_measured_as_it_was(run: Path) -> None:
    recorded = read_json(run / "summary.json")["readouts"]
    measured = evaluate_run(run)
    assert set(measured) == set(recorded)
    for readout, evaluation in measured.items():
        # Other processors round otherwise: a tie may go the other way.
        assert evaluation.accuracy == pytest.approx(recorded[readout]["last"], abs=0.03)


def test_it_predicts_and_is_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load(run).classes
    assert cli.main(["report", str(run)]) == 0
    assert cli.main(["verify", str(run)]) == 0
    assert "loda" in capsys.readouterr().out


def test_it_learns_another_task(run: Path) -> None:
    more = extend(run, tasks=1, out=run.parent / "more")
    assert len(load(more).classes) > len(load(run).classes)
