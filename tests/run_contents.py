"""What lies in a run folder, for the tests of run folders."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

FILES = {
    "accuracy.png",
    "classes.json",
    "config.yaml",
    "environment.json",
    "manifest.json",
    "metrics.jsonl",
    "model.safetensors",
    "readouts.safetensors",
    "state.safetensors",
    "summary.json",
}
"""Files of a finished run that keeps nothing more."""


def below(folder: Path) -> set[str]:
    """Paths of everything in a folder."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file in a folder, by path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def resealed(run: Path) -> Path:
    """The run, as if it had written its files as they are now: with a manifest of all of them."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents(run).items()}
    hashes.pop("manifest.json", None)
    (run / "manifest.json").write_text(json.dumps({"files": hashes}), "utf-8")
    return run


def events(run: Path) -> list[dict[str, Any]]:
    """The lines of the metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what differs from run to run: times and memory."""
    return {key: value for key, value in record.items() if key not in ("seconds", "memory")}


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether names and bits are the same."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def same_model(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same weights."""
    return same_tensors(load_file(a / "model.safetensors"), load_file(b / "model.safetensors"))


def set_in_config(run: Path, section: str, **values: object) -> None:
    """Other settings in the configuration of a run."""
    path = run / "config.yaml"
    content = yaml.safe_load(path.read_text("utf-8"))
    content[section].update(values)
    path.write_text(yaml.safe_dump(content), "utf-8")
