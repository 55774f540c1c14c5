"""Energies of the subspaces of a run are those that its moments give."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import finished

from training.analysis.saved_tasks import read_settings, task_file
from training.analysis.subspace_energy import subspace_energies
from training.analysis.verify import verify

LAYER = "blocks.1.attn.qkv"


def test_energies_are_those_that_verify_finds(run: Path) -> None:
    checks = {(c.task, c.layer, c.what): c for c in verify(run)}
    tasks = subspace_energies(run)
    assert [task["task"] for task in tasks] == [2, 3]
    for task in tasks:
        assert list(task["layers"]) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
        for layer, measures in task["layers"].items():
            for branch in ("general", "isolated"):
                check, energies = checks[str(task["task"]), layer, branch], measures[branch]
                assert energies["new_energy"] == pytest.approx(check.new, rel=1e-5)
                assert energies["old_energy"] == pytest.approx(check.old, rel=1e-5)
                ratio = energies["new_energy"] / energies["old_energy"]
                assert energies["ratio"] == pytest.approx(ratio, rel=1e-6)


def test_the_null_space_is_that_of_the_history(run: Path) -> None:
    first, second = (load_file(task_file(run, task, "moments")) for task in (1, 2))
    old, new = first[f"merged/{LAYER}"], second[f"new/{LAYER}"]  # the history is of one task
    quiet = np.linalg.eigh(old)[1][:, : read_settings(run).rank]
    expected = np.trace(quiet.T @ new @ quiet)
    measures = subspace_energies(run)[0]["layers"][LAYER]["null"]
    assert measures["new_energy"] == pytest.approx(expected / np.trace(new), rel=1e-4)
    assert measures["new_magnitude"] == pytest.approx(np.sqrt(expected), rel=1e-4)


def test_null_lora_trains_in_the_null_space(tmp_path_factory: pytest.TempPathFactory) -> None:
    measures = subspace_energies(finished(tmp_path_factory, "null_lora"))[0]["layers"][LAYER]
    assert list(measures) == ["null", "isolated"]
    assert measures["isolated"]["old_energy"] == pytest.approx(measures["null"]["old_energy"])
