"""What lies in a run folder, for the tests of run folders."""

from pathlib import Path

FILES = {
    "accuracy.png",
    "classes.json",
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "model.safetensors",
    "readouts.safetensors",
    "summary.json",
}
"""Files of a finished run that keeps nothing more."""


def below(folder: Path) -> set[str]:
    """Paths of everything in a folder."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file in a folder, by path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
