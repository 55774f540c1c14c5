"""The page about components of one's own: its files work, and its commands run."""

import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from training import cli
from training.methods import MethodConfig
from training.run_dir import read_json

PAGE = Path(__file__).parents[1].joinpath("docs", "components.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = [shlex.split(line)[1:] for line in re.findall(r"^    (loda .*)$", PAGE, re.MULTILINE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with the files of the page."""
    folder = tmp_path_factory.mktemp("page")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        importlib.invalidate_caches()
        yield folder
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.fixture(scope="module")
def printed(folder: Path) -> dict[str, str]:
    """What the commands of the page say, by the command."""
    return {}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words)[:40])
def test_every_command_works(
    command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--help" in command:
        assert cli.main(command) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "--data.angles N Number of classes." in shown
        assert "--head.LDA.shrinkage X Weight of the identity" in shown
        return
    assert cli.main([*command, "--device=cpu"] if command[0] == "train" else command) == 0
    capsys.readouterr()


def test_the_classes_did_what_they_say(folder: Path) -> None:
    bars, pooled = folder / "runs" / "bars", folder / "runs" / "pooled"
    summary = read_json(bars / "summary.json")
    assert summary["readout"] == "lda"
    assert summary["readouts"]["lda"]["last"] > 0.5
    assert read_json(bars / "classes.json")["class_names"][0].endswith("degrees")
    # Two normalisation layers have moved, and what they are made of is all that has.
    from training.backbones import BackboneConfig, build_backbone

    start = build_backbone(BackboneConfig()).module.state_dict()
    found = load_file(bars / "model.safetensors")
    moved = [name for name in start if not bool((found[name] == start[name]).all())]
    assert len(moved) == 2
    assert all("norm" in name and name.endswith("weight") for name in moved)
    assert load_file(pooled / "model.safetensors")["mix.weight"].shape == (16, 16)


def test_a_class_is_not_imported_for_a_run_unasked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", "runs/pooled"]) == 2
    assert "--allow" in capsys.readouterr().err


def test_an_installed_package_names_its_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="norm_tuning"):
        MethodConfig("norm_tuning")
    info = tmp_path / "norm_tuning-1.0.dist-info"
    info.mkdir()
    (tmp_path / "norm_tuning.py").write_text(FILES["norm_tuning.py"], encoding="utf-8")
    (project,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    points = tomllib.loads(project)["project"]["entry-points"]["loda.methods"]
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (info / "entry_points.txt").write_text(f"[loda.methods]\n{lines}")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: norm-tuning\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("norm_tuning", None)
    importlib.invalidate_caches()
    assert MethodConfig("norm_tuning", {"layers": 3}).build().layers == 3
