"""Small experiments that take well under a second, and finished runs of them made once a process.

A finished run is shared: a test that changes one works on a copy.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from training.config import Experiment, experiment_of, experiment_values
from training.train import train

COLOURS = {
    "blue": (30, 40, 220),
    "green": (20, 200, 60),
    "grey": (128, 128, 128),
    "pink": (240, 120, 180),
    "red": (220, 30, 20),
    "white": (250, 250, 250),
}
READOUTS = ("nearest_mean", "heads", "alignment", "compensated", "ridge")
KEPT = ("branches", "moments", "heads", "statistics")
PIXELS = {
    "image_size": 16,
    "resize": 16,
    "train_crop": "pad",
    "pad": 2,
    "flip": True,
    "mean": 0.0,
    "std": 1.0,
}
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}

_trees: dict[str, Path] = {}
_runs: dict[str, Path] = {}


def small_vit() -> nn.Module:
    """The network of small runs, always with the same random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
    return made


def squares(folder: Path, *, train: int = 6, test: int = 3, seed: int = 0) -> Path:
    """Folder tree of noisy coloured squares of 16 by 16 pixels: six classes."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("test", test)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                noise = rng.integers(-40, 40, size=(16, 16, 3))
                pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


def tree(factory: pytest.TempPathFactory) -> Path:
    """The squares that all finished runs were trained on."""
    if "squares" not in _trees:
        _trees["squares"] = squares(factory.mktemp("squares"))
    return _trees["squares"]


def tiny(root: Path, out: Path | str | None, **changes: Any) -> Experiment:
    """Three tasks of two colours on a tiny transformer with random weights.

    Keywords name a section with a dict of its settings, or a setting of the experiment itself.
    """
    base = {
        "data": {"name": "folder", "root": str(root), **PIXELS},
        "backbone": {"name": "vit_tiny_patch16_224", "options": VIT, "pretrained": False},
        "method": {"rank": 4},
        "train": {"epochs": 2, "batch_size": 5, "lr": 0.05, "eval_batch_size": 16},
        # Options of a read-out that is not chosen in the end are dropped.
        "head": {"readout": "ridge", "ridge": {"features": 32}},
        "keep": {"figure": False},  # drawing one takes longer than training
        "device": "cpu",
        "out": None if out is None else str(out),
    }
    return experiment_of(base, {"head": {"readout": "nearest_mean"}}, changes)


def changed(experiment: Experiment, **changes: Any) -> Experiment:
    """The experiment with other settings, checked anew."""
    return experiment_of(experiment_values(experiment), changes)


def flags(experiment: Experiment) -> list[str]:
    """The command line that gives the settings of `tiny`."""
    return [
        "--data=folder",
        f"--data.root={experiment.data.options['root']}",
        *(f"--data.{key}={value}" for key, value in PIXELS.items()),
        "--backbone=vit_tiny_patch16_224",
        f"--backbone.options={VIT}",
        "--backbone.pretrained=false",
        "--method.rank=4",
        "--train.epochs=2",
        "--train.batch_size=5",
        "--train.lr=0.05",
        "--train.eval_batch_size=16",
        "--head.readout=nearest_mean",
        "--keep.figure=false",
        "--device=cpu",
        f"--out={experiment.out}",
    ]


def finished(factory: pytest.TempPathFactory, method: str = "loda", **changes: Any) -> Path:
    """A finished run of a method with all read-outs, a figure, and all that can be kept."""
    key = f"{method} {changes}"
    if key not in _runs:
        out = factory.mktemp("runs") / method
        settings = {
            "method": {"name": method},
            # One epoch of the published alignment, which is trained on from task to task.
            "head": {
                "also": list(READOUTS[1:]),
                "alignment.epochs": 1,
                "compensated.epochs": 1,
            },
            "keep": dict.fromkeys((*KEPT, "figure"), True),
            **changes,
        }
        _runs[key] = train(tiny(tree(factory), out, **settings), quiet=True)
    return _runs[key]


def plain(factory: pytest.TempPathFactory, **changes: Any) -> Path:
    """A finished run of `tiny` with these changes, which keeps nothing more."""
    key = f"plain {changes}"
    if key not in _runs:
        _runs[key] = train(
            tiny(tree(factory), factory.mktemp("runs") / "run", **changes), quiet=True
        )
    return _runs[key]
