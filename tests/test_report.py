"""Tables over runs: seeds are grouped, everything that matters tells groups apart."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from training.config import Experiment, HeadConfig, KeepConfig, MethodConfig, dump_experiment
from training.report import comparison_curves, comparison_table


def run(folder: Path, last: float, **settings: Any) -> Path:
    """What `loda report` reads of a finished run."""
    folder.mkdir(parents=True)
    experiment = Experiment(**settings)
    metrics = {"last": last, "average": 0.5, "forgetting": 0.25, "curve": [1.0, last]}
    kinds = [experiment.head.readout, *experiment.head.also]
    (folder / "config.yaml").write_text(dump_experiment(experiment))
    (folder / "summary.json").write_text(json.dumps({"readouts": dict.fromkeys(kinds, metrics)}))
    return folder


def rows(table: str) -> list[list[str]]:
    return [re.split(r"\s*\|\s*", line.strip("| ")) for line in table.splitlines()[2:]]


def test_mean_and_sample_deviation_over_seeds(tmp_path: Path) -> None:
    paths = [run(tmp_path / str(s), x, seed=s) for s, x in ((3, 0.5), (1, 0.7), (2, 0.9))]
    assert rows(comparison_table(paths)) == [
        ["loda", "alignment", "70.00 ± 20.00", "50.00 ± 0.00", "25.00 ± 0.00", "1, 2, 3"]
    ]
    assert comparison_curves(paths) == {"loda": [[1.0, 0.5], [1.0, 0.7], [1.0, 0.9]]}


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    assert rows(comparison_table([run(tmp_path / "a", 0.5)]))[0][2] == "50.00"


def test_settings_that_matter_tell_groups_apart(tmp_path: Path) -> None:
    paths = [
        run(tmp_path / "a", 0.5),
        run(tmp_path / "b", 0.6, method=MethodConfig(gao=False)),
        run(tmp_path / "c", 0.7, method=MethodConfig(name="frozen")),
    ]
    labels = [row[0] for row in rows(comparison_table(paths))]
    assert labels == ["loda (method.gao True)", "loda (method.gao False)", "frozen"]


def test_what_is_kept_or_read_out_besides_does_not_split_seeds(tmp_path: Path) -> None:
    paths = [
        run(tmp_path / "a", 0.5, seed=1, keep=KeepConfig(moments=True)),
        run(tmp_path / "b", 0.7, seed=2, head=HeadConfig(also=["ridge"]), out="elsewhere"),
    ]
    assert [row[:3] for row in rows(comparison_table(paths))] == [
        ["loda", "alignment", "60.00 ± 14.14"]
    ]


def test_a_seed_counts_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not all seeds differ"):
        comparison_table([run(tmp_path / "a", 0.5), run(tmp_path / "b", 0.6)])


def test_an_unfinished_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no finished run: config\.yaml"):
        comparison_table([tmp_path])
