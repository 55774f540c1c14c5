"""A method from another package, found by its entry point: the example of the documentation."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_runs import squares, tiny

from training.config import MethodConfig
from training.train import train
from training.train import prepare

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example as an installed package would be: a module, and metadata that names it."""
    site = tmp_path / "site"
    info = site / "norm_tuning-1.0.dist-info"
    info.mkdir(parents=True)
    (code,) = blocks("python")
    (site / "norm_tuning.py").write_text(code, encoding="utf-8")
    (project,) = blocks("toml")
    points = tomllib.loads(project)["project"]["entry-points"]["loda.methods"]
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (info / "entry_points.txt").write_text(f"[loda.methods]\n{lines}")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: norm-tuning\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()


@pytest.mark.usefixtures("installed")
def test_the_example_of_the_page_trains(tmp_path: Path) -> None:
    root = squares(tmp_path / "data")
    experiment = tiny(root, tmp_path / "run", method={"name": "norm_tuning"})
    start = prepare(tiny(root, tmp_path / "start")).state.model.state_dict()
    found = load_file(train(experiment, quiet=True) / "model.safetensors")
    moved = {name for name in found if not bool((found[name] == start[name]).all())}
    assert moved
    assert all("norm" in name and name.endswith("weight") for name in moved)


def test_without_the_package_the_name_is_refused() -> None:
    with pytest.raises(ValueError, match="norm_tuning"):
        MethodConfig(name="norm_tuning")
