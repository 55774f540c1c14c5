"""What commands load: modules are counted, not seconds, which depend on the machine."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "torchvision", "timm", "sklearn", "accelerate", "transformers", "datasets"}
ARRAYS = {"numpy", "scipy", "pandas", "matplotlib"}
# Python itself loads some 30 modules, argparse and the names of all commands come to 150.
FEW, SOME = 250, 500

LISTED = """
import sys
from training.cli import main
try:
    status = main(sys.argv[2:])
except SystemExit as left:
    status = left.code
names = sorted(sys.modules)
open(sys.argv[1], "w").write("\\n".join(names))
sys.exit(status)
"""


def loaded(arguments: list[str], folder: Path) -> tuple[set[str], int]:
    """Top-level names of what a command has loaded at its end, and the number of modules."""
    listing = folder / "modules.txt"
    done = subprocess.run(
        [sys.executable, "-c", LISTED, str(listing), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    names = listing.read_text().splitlines()
    return {name.partition(".")[0] for name in names}, len(names)


@pytest.mark.parametrize(
    "command",
    ["--help", "--version", "report --help", "sweep --help", "eval --help"],
)
def test_help_loads_next_to_nothing(command: str, tmp_path: Path) -> None:
    names, number = loaded(command.split(), tmp_path)
    assert not names & (HEAVY | ARRAYS)
    assert number <= FEW


@pytest.mark.parametrize(
    ("command", "most"),
    [
        ("train --help", SOME),
        ("train --print-config", SOME),
        ("report docs/records/caltech101.jsonl", None),
        ("sweep digits --out={out} --dry-run", None),
    ],
)
def test_settings_reports_and_plans_load_nothing_that_trains(
    command: str, most: int | None, tmp_path: Path
) -> None:
    names, number = loaded(command.format(out=tmp_path / "out").split(), tmp_path)
    assert not names & HEAVY
    assert most is None or number <= most


@pytest.mark.slow
@pytest.mark.gate
def test_what_starts_runs_loads_nothing_that_trains(tmp_path: Path) -> None:
    sweep, out = tmp_path / "sweep.yaml", tmp_path / "out"
    variants = {"frozen": {"method.name": "frozen", "data.tasks": 1, "train.epochs": 1}}
    sweep.write_text(yaml.safe_dump({"seeds": [1], "variants": variants}))
    names, _ = loaded(["sweep", str(sweep), f"--out={out}", "--device=cpu"], tmp_path)
    assert not names & HEAVY
    assert (out / "frozen" / "seed1" / "summary.json").is_file()
