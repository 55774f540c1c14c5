"""Sweeps of small runs."""

from pathlib import Path

import yaml
from small_runs import flags, tiny


def settings(root: Path) -> list[str]:
    """The settings of `tiny`, for runs whose folders a sweep chooses."""
    return [flag for flag in flags(tiny(root, "x")) if not flag.startswith("--out")]


def short(root: Path) -> list[str]:
    """Settings of runs of about a second."""
    return [*settings(root), "--data.tasks=1"]


def sweep_file(folder: Path, content: object) -> Path:
    """A file that holds a sweep, or what is none."""
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
