"""LoDA's settings: what is refused, the rules that are said once, and an import without torch."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backends.torch
import backends.torch.readouts
from backends.torch import LoDASettings
from backends.torch.readouts import READOUTS
from backends.torch.settings import matching

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": ()}, {"target": " "}, {"target": ["0", ""]}, {"rank": 0}, {"rank": 2.0},
        {"rank": True}, {"gamma": -1.0}, {"gamma": True}, {"ridge": float("nan")},
        {"general_weight": float("inf")}, {"isolated_weight": -0.5}, {"down_scale": -0.1},
        {"down_scale": 0.0}, {"branches": "none"}, {"isolated": "pca"}, {"history": "all"},
        {"recalibration": "exact"}, {"energy_floor": 1.5, "isolated": "trace_ratio"},
        {"energy_floor": 0.5}, {"energy_floor": 0.5, "isolated": "null"},
        {"joint": True, "recalibration": "none"}, {"joint": None}, {"heldout": 1},
        {"history_decay": -0.1}, {"history_decay": float("nan")}, {"history_decay": None},
        {"history_weight": -1.0}, {"history_weight": "sum"}, {"exclude": ("0", " ")},
        {"rank_pattern": {"0": 0}}, {"rank_pattern": {"0": 1.5}}, {"weight_pattern": {"0": -1.0}},
        {"weight_pattern": {"0": float("inf")}}, {"untie": 1}, {"master": "no"},
        {"ridge_scale": "median"},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_are_refused_under_their_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be"):
        LoDASettings(**wrong)


def test_an_integer_of_numpy_becomes_one_of_python() -> None:
    assert type(LoDASettings(rank=np.int64(3)).rank) is int  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("branches", "first", "later", "weights"),
    [
        ("both", ("general",), ("general", "isolated"), (0.25, 0.5)),
        ("general", ("general",), ("general",), (0.5, 1.0)),
        ("isolated", ("general",), ("isolated",), (0.5, 1.0)),
    ],
)
def test_weights_are_halved_where_both_branches_are_configured(
    branches: Any, first: tuple[str, ...], later: tuple[str, ...], weights: tuple[float, float]
) -> None:
    settings = LoDASettings(branches=branches)
    assert (settings.names(first_task=True), settings.names(first_task=False)) == (first, later)
    assert (settings.weight("general"), settings.weight("isolated")) == weights


def test_settings_of_one_layer_have_its_rank_and_its_weights() -> None:
    settings = LoDASettings(
        rank_pattern={"b": 4, "*": 2}, weight_pattern={"a.?": 2.0}, branches="general"
    )
    own = settings.by_layer(["a.a", "a.b", "c"])
    assert {name: x.rank for name, x in own.items()} == {"a.a": 2, "a.b": 4, "c": 2}
    assert {name: x.weight("general") for name, x in own.items()} == {
        "a.a": 1.0, "a.b": 1.0, "c": 0.5,
    }  # fmt: skip
    assert all(x.by_layer(["a.a"])["a.a"] == x for x in own.values())
    with pytest.raises(ValueError, match="rank_pattern"):
        settings.by_layer(["c"])


def test_lists_of_a_file_are_the_same_settings_as_tuples() -> None:
    lists = LoDASettings(target=["a", "b"], exclude=["c"])
    assert lists == LoDASettings(target=("a", "b"), exclude=("c",))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.q", ["a.q"]),
        ("q", ["a.q", "b.a.q"]),
        ("a.?", ["a.q", "a.k"]),
        ("*q", ["a.q", "b.a.q", "aq"]),
        ("nothing", []),
    ],
)
def test_a_pattern_means_a_name_or_a_suffix_or_what_its_wildcards_fit(
    pattern: str, expected: list[str]
) -> None:
    assert matching(pattern, ["a.q", "a.k", "b.a.q", "aq"]) == expected


def test_every_setting_is_explained_and_so_is_every_option_of_a_read_out() -> None:
    for settings in (LoDASettings, *READOUTS.values()):
        explained = "".join(str(kind.__doc__) for kind in settings.__mro__)
        for field in fields(settings):  # type: ignore[arg-type]
            assert f"\n    {field.name} : " in explained, (settings, field.name)


@pytest.mark.parametrize(
    "code",
    [
        "from backends.torch.settings import LoDASettings; LoDASettings(rank=3)",
        "from backends.torch import LoDASettings; dir(__import__('backends').torch)",
        "from backends.torch.readouts import READOUTS, Alignment; Alignment(epochs=5)",
    ],
)
def test_settings_and_options_load_no_torch(code: str) -> None:
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert not set(done.stdout.split()) & {"torch", "numpy", "loda_math"}


@pytest.mark.parametrize("package", [backends.torch, backends.torch.readouts])
def test_every_public_name_is_found_where_it_is_used(package: Any) -> None:
    assert dir(package) == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
        # A submodule of the same name would take the place of the object.
        assert type(getattr(package, name)) is not type(sys)
    with pytest.raises(AttributeError, match="nothing"):
        package.nothing  # noqa: B018
