"""Files in and around a run folder that the run did not leave there as it should."""

from pathlib import Path

import pytest
from fake_runs import fake_run
from interrupted import stopped
from small_runs import squares, tiny

from training import cli
from training.train import resume


def test_what_a_killed_process_had_half_written_is_removed_when_the_run_goes_on(
    tmp_path: Path,
) -> None:
    run = stopped(tiny(squares(tmp_path / "data"), tmp_path / "run"), 9)
    (run / "tasks" / "000").mkdir(parents=True)
    half = [run / ".model.safetensors.12.tmp", run / "tasks" / "000" / ".heads.safetensors.12.tmp"]
    mine = run / ".mine.tmp"
    for path in (*half, mine):
        path.write_bytes(b"half a file")
    resume(run, quiet=True)
    assert not any(path.exists() for path in half)
    assert mine.exists()


def test_groups_are_those_of_a_sweep_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_run(tmp_path / "runs" / "mine")
    sweep = fake_run(tmp_path / "loda" / "seed1", seed=1)
    groups = tmp_path / "groups.json"
    groups.write_text('["of somebody else"]', "utf-8")
    assert cli.main(["report", str(tmp_path / "runs" / "mine")]) == 0
    assert cli.main(["report", str(sweep)]) == 2
    assert f"{groups}: it is ['of somebody else']" in capsys.readouterr().err
