"""What a sweep plans: every variant with every seed, checked before anything runs."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from small_sweeps import short

from training.sweeps import Sweep, plan

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
        {"a": {}, "b": {"train.lr": 0.5, "method.options": {"directions": "random"}}},
        [0],
        ["digits"],
        {"train": {"lr": 0.3, "epochs": 4}},
    )
    a, b = plan(sweep, tmp_path, ["--train.lr=0.4"])
    assert (a.experiment.train.lr, b.experiment.train.lr) == (0.4, 0.5)
    assert a.experiment.train.epochs == 4
    assert b.experiment.method.options == {"directions": "random"}


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


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"method.options": {"alpha": "big"}}, "method.options has alpha 'big'.*a finite number"),
        ({"method.options": {"penalty": None}}, "penalty None"),
        ({"method.options": {"start": 1.0}}, r"has \['start'\], which o_lora does not know"),
        ({"method": {"name": "sd_lora", "options": {"start": "high"}}}, "start 'high'"),
        ({"method.name": "sd_lora", "method.options": {"parts": "qqq"}}, "all, q, k"),
        ({"method.name": "frozen", "method.gao": True}, "method.gao is true, but frozen trains no"),
        ({"tracker": date(2020, 1, 2)}, "tracker is .*2020.*put in quotes"),
    ],
)
def test_options_of_methods_are_checked_before_anything_runs(
    own: dict[str, Any], said: str, tmp_path: Path
) -> None:
    sweep = Sweep({"fine": {}, "v": own}, [0], settings={"method.name": "o_lora"})
    with pytest.raises(ValueError, match=f"variant v: .*{said}"):
        plan(sweep, tmp_path)
