"""The wheel: built, installed into a second environment, and used from there."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from training.yaml_files import packaged_configs

ROOT = Path(__file__).parents[1]
PACKAGES = ("loda_math", "backends", "training")
TREE = (*PACKAGES, "pyproject.toml", "README.md", "LICENSE")

WALK = """
import importlib, json, pkgutil, sys
found = {}
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    found[name] = package.__file__
    for module in pkgutil.walk_packages(package.__path__, f'{name}.'):
        if not any(part.startswith('_') for part in module.name.split('.')):
            found[module.name] = importlib.import_module(module.name).__file__
from training.config import load_experiment
from training.yaml_files import packaged_configs
from training.backbones import build_backbone
build_backbone(load_experiment([]).backbone)
print(json.dumps({'modules': found, 'configs': packaged_configs(), 'path': sys.path}))
"""

pytestmark = [pytest.mark.slow, pytest.mark.gate]


def call(*command: object, cwd: Path) -> str:
    """Standard output of a command that runs outside the repository, and must succeed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=skip)
        else:
            shutil.copy(source, folder / name)
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", folder, cwd=folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="session")
def second(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Environment with the wheel, and the first one's dependencies without its loda."""
    folder = tmp_path_factory.mktemp("second") / "environment"
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = Path(
        call(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
        ).strip()
    )
    # A plain path in a .pth file: the .pth files of that folder, which lead to the source tree
    # of an editable install, are not read.
    first = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (site / "first.pth").write_text("".join(f"{path}\n" for path in sorted(first)))
    install = ["-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    # What is visible in the first environment must not count as installed in the second.
    call(sys.executable, *install, "--ignore-installed", "--quiet", wheel, cwd=folder)
    return folder


def test_the_wheel_holds_code_and_package_data_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {n for n in names if not n.partition("/")[0].endswith(".dist-info")}
    assert {n.partition("/")[0] for n in shipped} == set(PACKAGES)
    own = {
        str(path.relative_to(ROOT))
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped == own
    expected = {
        "training/weights/glyphs_vit.safetensors",
        "training/weights/cifar_vit.safetensors",
        "training/configs/digits.yaml",
        "training/configs/paper/_protocol.yaml",
        "training/configs/sweeps/digits.yaml",
        "training/report/page.html",
    }
    assert expected <= shipped
    markers = {n for n in shipped if n.endswith("py.typed")}
    assert {n.partition("/")[0] for n in markers} == set(PACKAGES)
    assert sum(n.endswith("LICENSE") for n in names) == 1


def test_the_base_install_needs_no_heavy_library(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    lines = archive.read(name).decode().splitlines()
    needed = [x for x in lines if x.startswith("Requires-Dist:") and "extra ==" not in x]
    assert [x.split()[1].partition(">")[0] for x in needed] == ["array-api-compat"]


def test_every_public_module_comes_from_the_second_environment(
    second: Path, tmp_path: Path
) -> None:
    result = json.loads(
        call(second / "bin" / "python", "-W", "error", "-c", WALK, *PACKAGES, cwd=tmp_path)
    )
    assert str(ROOT) not in result["path"]
    strangers = {n: f for n, f in result["modules"].items() if not Path(f).is_relative_to(second)}
    assert not strangers
    expected = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for name in PACKAGES
        for path in (ROOT / name).rglob("*.py")
    }
    expected = {n for n in expected if not any(p.startswith("_") for p in n.split("."))}
    assert set(result["modules"]) == expected
    assert result["configs"] == packaged_configs()
    assert len(result["configs"]) > 20


def test_the_command_works_from_the_second_environment(second: Path, tmp_path: Path) -> None:
    loda = second / "bin" / "loda"
    assert "COMMAND" in call(loda, "--help", cwd=tmp_path)
    small = ["--data.tasks=1", "--train.epochs=0", "--head.readout=nearest_mean", "--device=cpu"]
    printed = call(loda, "train", "--out", tmp_path / "run", *small, cwd=tmp_path)
    assert f"results: {tmp_path / 'run'}" in printed
