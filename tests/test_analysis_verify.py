"""Verifying what a run left on disk: a run of our own, and the recorded one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from run_contents import resealed
from small_runs import finished
from torch import nn

from backends.torch import LoDA, LoDASettings
from loda_math.verify import verification_table, verify_archive
from training.analysis.saved_tasks import task_file
from training.analysis.verify import export_run, verify
from training.config import Experiment, MethodConfig, dump_experiment
from training.run_dir import write_tensors, write_text

LAYERS = ("0", "2")


def configure(folder: Path, **options: Any) -> None:
    experiment = Experiment(method=MethodConfig("loda", options))
    write_text(folder / "config.yaml", dump_experiment(experiment))


def write_run(folder: Path, **options: Any) -> Path:
    """A stream of three tasks through a small network, with the files that training writes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 5))
    options = {"target": "[02]", "rank": 3, "history": "both"} | options
    loda = LoDA(model, LoDASettings(**options), record_moments=True)
    folder.mkdir(parents=True, exist_ok=True)
    configure(folder, **options)
    for task in range(1, 4):
        x = torch.randn(40, 8) * torch.rand(8) + torch.randn(8)
        y = torch.randint(5, (40,))
        loda.begin_task([x])
        optimizer = torch.optim.SGD(loda.trainable_parameters(), lr=0.1)
        for _ in range(3):
            loss = lambda rows, x=x, y=y: nn.functional.cross_entropy(model(x[rows]), y[rows])  # noqa: E731
            loda.step(loss, y, optimizer, radius=0.1)
        record = loda.end_task([x])
        task_file(folder, task, "moments").parent.mkdir(parents=True)
        write_tensors(task_file(folder, task, "moments"), record.moment_tensors())
        write_tensors(task_file(folder, task, "branches"), record.branch_tensors())
    return resealed(folder)


@pytest.mark.parametrize("history", ["merged", "trained", "both"])
@pytest.mark.parametrize("isolated", ["quotient", "null"])
def test_a_run_of_our_own_passes(tmp_path: Path, history: str, isolated: str) -> None:
    checks = verify(write_run(tmp_path / "run", history=history, isolated=isolated))
    assert all(check.passed for check in checks)
    name = "null" if isolated == "null" else "isolated"
    # On the first task the general A is trained, and nothing is recalibrated.
    expected = [
        (task, layer, what)
        for task in "23"
        for layer in LAYERS
        for what in ("general", name, "Λ full")
    ]
    assert [(c.task, c.layer, c.what) for c in checks] == expected
    for check in checks:
        assert check.gap is not None
        assert check.what.startswith("Λ") or check.gap < 1e-9
    table = verification_table(checks).splitlines()
    assert len(table) == len(checks) + 2
    assert table[-1] == "12 of 12 checks passed"
    assert len({len(line) for line in table[:-1]}) == 1


OPTIONS: dict[str, dict[str, Any]] = {
    "trace ratio": {"isolated": "trace_ratio"},
    "energy floor": {"isolated": "trace_ratio", "energy_floor": 0.8},
    "box": {"recalibration": "box"},
    "joint": {"joint": True},
    "joint box": {"joint": True, "recalibration": "box"},
    "joint, one branch": {"joint": True, "branches": "isolated"},
    "decay": {"history_decay": 0.4},
    "weight": {"history_weight": 3.0},
    "mean": {"history_weight": "mean", "history_decay": 0.4},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_run_under_other_settings_passes_as_what_it_is(tmp_path: Path, option: str) -> None:
    run = write_run(tmp_path / "run", **OPTIONS[option])
    checks = verify(run)
    assert all(check.passed for check in checks)
    assert sum(check.what.startswith("Λ") for check in checks) == 4
    # Read as a run under the default settings it is wrong, so the settings do enter the checks.
    configure(run, rank=3, target="[02]", history="both")
    if option == "joint, one branch":  # nothing of it is recalibrated by default
        assert len(verify(run)) == len(checks) - 4
    elif "joint" in option:
        with pytest.raises(ValueError, match="coefficients"):
            verify(run)
    else:
        assert not all(check.passed for check in verify(run))


def test_the_history_is_that_of_the_named_passes(tmp_path: Path) -> None:
    """Read with another history than the run had, the later tasks fail."""
    run = write_run(tmp_path / "run")
    configure(run, rank=3, target="[02]", history="merged")
    checks = verify(run)
    assert not all(check.passed for check in checks if check.what.startswith("Λ"))
    assert "OFF" in verification_table(checks)


def test_null_lora_is_verified_as_what_it_is(tmp_path_factory: pytest.TempPathFactory) -> None:
    checks = verify(finished(tmp_path_factory, "null_lora"))
    assert all(check.passed for check in checks)
    assert {check.what for check in checks} == {"null"}


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan"), float("inf")])
def test_a_wrong_tolerance_is_not_blamed_on_the_run(tmp_path: Path, tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance") as caught:
        verify(write_run(tmp_path / "run"), tolerance=tolerance)
    assert str(tmp_path) not in str(caught.value)


def test_a_file_that_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.npz"):
        verify(tmp_path / "text.npz")


def test_the_recorded_run(shared: Path) -> None:
    checks = verify(shared / "reference" / "trace.npz")
    assert len(checks) == 20
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("option", ["joint", "mean", "energy floor"])
def test_an_exported_run_is_verified_by_the_mathematics_alone(tmp_path: Path, option: str) -> None:
    run, file = write_run(tmp_path / "run", **OPTIONS[option]), tmp_path / "run.npz"
    export_run(run, file)
    ours, theirs = verify(run), verify_archive(file)
    assert [c[:2] + c[-2:] for c in ours] == [c[:2] + c[-2:] for c in theirs]
    assert all(check.passed for check in theirs)
