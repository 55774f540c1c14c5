"""``loda analyse``: what it writes beside a run, what it keeps, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
from small_runs import finished

from training import cli
from training.analysis.analyse import analyse
from training.analysis.saved_tasks import task_file
from training.analysis.subspace_energy import subspace_energies
from training.run_dir import RunFolder


def test_the_second_the_middle_and_the_last_task_by_default(copy: Path) -> None:
    path, notes = analyse(copy, points=2)
    assert path == copy / "analysis.json"
    assert notes == []
    content = json.loads(path.read_text())
    assert [(task["task"], task["step"]) for task in content["losses"]] == [
        (2, [0.0, 1.5]),
        (3, [0.0, 1.5]),
    ]
    assert content["subspaces"] == subspace_energies(copy)


def test_what_a_run_lacks_is_said(copy: Path) -> None:
    task_file(copy, 2, "heads").unlink()
    path, notes = analyse(copy)
    assert notes == [f"losses left out: {copy} was trained without --keep.heads true"]
    content = json.loads(path.read_text())
    assert content["losses"] is None
    assert len(content["subspaces"]) == 2
    shutil.rmtree(copy / "tasks")
    with pytest.raises(FileNotFoundError, match=r"--keep\.branches true --keep\.moments true; los"):
        analyse(copy)
    RunFolder(copy, overwrite=True)  # a new run in the folder
    assert not path.exists()


def test_a_direction_that_is_not_there_is_said(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copy = shutil.copytree(finished(tmp_path_factory, "null_lora"), tmp_path / "run")
    _, notes = analyse(copy)
    assert len(notes) == 1
    assert "no general branch" in notes[0]
    with pytest.raises(ValueError, match="no general branch"):
        analyse(copy, parts=["losses"])


def test_runs_that_cannot_be_analysed(run: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run folder"):
        analyse(tmp_path)
    with pytest.raises(ValueError, match=r"from 2 .* to 3, got"):
        analyse(run, tasks=[1])
    with pytest.raises(ValueError, match="points must be at least 2"):
        analyse(run, points=1)
    (copy / "summary.json").unlink()
    with pytest.raises(FileNotFoundError, match="no finished run"):
        analyse(copy)


def test_a_later_analysis_leaves_what_an_earlier_one_wrote(copy: Path) -> None:
    path, _ = analyse(copy, parts=["losses"], points=2, tasks=[2])
    first = json.loads(path.read_text())
    assert first["subspaces"] is None
    analyse(copy, parts=["subspaces"])
    second = json.loads(path.read_text())
    assert second["losses"] == first["losses"]
    assert len(second["subspaces"]) == 2
    analyse(copy, parts=["losses"], points=3, tasks=[3])
    third = json.loads(path.read_text())
    assert third["subspaces"] == second["subspaces"]
    assert third["losses"][0] == first["losses"][0]
    assert [(task["task"], len(task["step"])) for task in third["losses"]] == [(2, 2), (3, 3)]
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"analysis\.json"):
        analyse(copy, parts=["subspaces"])


def test_from_a_run_to_its_figures(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    task_file(copy, 2, "heads").unlink()
    assert cli.main(["analyse", str(copy)]) == 0
    said = capsys.readouterr()
    assert said.out == f"analysis: {copy / 'analysis.json'}\n"
    assert said.err.startswith("loda analyse: losses left out")
    assert cli.main(["report", str(copy), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"report: {out / 'report.html'}\n"
    assert {"ratio-loda.svg", "energy-loda.png"} <= {p.name for p in (out / "figures").iterdir()}
    assert cli.main(["report", str(copy), "--out", str(out)]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert cli.main(["report", str(copy), "--figure", str(tmp_path / "a.svg")]) == 0
    assert (tmp_path / "a.svg").is_file()
    # A run's log names the memory that the report shows.
    costs = capsys.readouterr().out.partition("### Costs")[2]
    row = next(line for line in costs.splitlines() if line.startswith("| loda |"))
    assert float(row.split(" | ")[-2]) > 50
