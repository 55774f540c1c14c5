"""What commands load: modules are counted, not seconds, which depend on the machine."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "docs" / "records" / "caltech101.jsonl"
HEAVY = {"torch", "torchvision", "timm", "sklearn", "accelerate", "transformers", "datasets"}
ARRAYS = {"numpy", "scipy", "pandas", "matplotlib"}
# Python itself loads some 30 modules, argparse and the names of all commands come to 150.
FEW, SOME = 250, 500


def loaded(arguments: list[str], folder: Path) -> tuple[set[str], int]:
    """Top-level names of what a command has loaded at its end, and the number of modules."""
    listing = folder / "modules.txt"
    code = (
        "import sys\n"
        "from training.cli import main\n"
        "try:\n"
        "    status = main(sys.argv[2:])\n"
        "except SystemExit as left:\n"
        "    status = left.code\n"
        "names = sorted(sys.modules)\n"
        "open(sys.argv[1], 'w').write('\\n'.join(names))\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(listing), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    names = listing.read_text().splitlines()
    return {name.partition(".")[0] for name in names}, len(names)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["report", "--help"], ["sweep", "--help"], ["eval", "--help"]],
    ids=" ".join,
)
def test_help_loads_next_to_nothing(arguments: list[str], tmp_path: Path) -> None:
    names, number = loaded(arguments, tmp_path)
    assert not names & (HEAVY | ARRAYS)
    assert number <= FEW


@pytest.mark.parametrize(
    "arguments", [["train", "--help"], ["train", "--print_config"]], ids=" ".join
)
def test_settings_are_read_without_what_trains(arguments: list[str], tmp_path: Path) -> None:
    names, number = loaded(arguments, tmp_path)
    assert not names & HEAVY
    assert number <= SOME


def test_reports_load_nothing_that_trains(tmp_path: Path) -> None:
    names, _ = loaded(["report", str(RECORDS)], tmp_path)
    assert not names & HEAVY


def test_plans_of_sweeps_load_nothing_that_trains(tmp_path: Path) -> None:
    names, _ = loaded(["sweep", "digits", f"--out={tmp_path / 'out'}", "--dry-run"], tmp_path)
    assert not names & HEAVY


@pytest.mark.slow
@pytest.mark.gate
def test_what_starts_runs_loads_nothing_that_trains(tmp_path: Path) -> None:
    sweep, out = tmp_path / "sweep.yaml", tmp_path / "out"
    variants = {"frozen": {"method.name": "frozen", "data.tasks": 1, "train.epochs": 1}}
    sweep.write_text(yaml.safe_dump({"seeds": [1], "variants": variants}))
    names, _ = loaded(["sweep", str(sweep), f"--out={out}", "--device=cpu"], tmp_path)
    assert not names & HEAVY
    assert (out / "frozen" / "seed1" / "summary.json").is_file()
