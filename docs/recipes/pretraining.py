"""What the recipes share: the start of a small vision transformer, the flags, and the file."""

import argparse
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from training.run_dir import write_atomically

# timm starts a ViT for 196 patches of 768 values. Here the wider start of its "jax" scheme and
# positions as large as the patch embeddings save most of the plateau before the loss falls.
WEIGHT_INIT = "jax"
POSITION_GAIN = 15.0


def untrained(name: str, **options: Any) -> nn.Module:
    """Create a vision transformer of timm with a wide start, from torch's global generator."""
    model: nn.Module = timm.create_model(name, pretrained=False, weight_init=WEIGHT_INIT, **options)
    with torch.no_grad():
        model.get_parameter("pos_embed").mul_(POSITION_GAIN)
    return model


def add_settings(parser: argparse.ArgumentParser, recipe: type[Any]) -> None:
    """Give the parser a flag for every field of a recipe's dataclass, and ``--overwrite``."""
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    for field in fields(recipe):
        flag, kind = f"--{field.name.replace('_', '-')}", type(field.default)
        parser.add_argument(flag, type=kind, default=field.default, help="default: %(default)s")


def require_new(parser: argparse.ArgumentParser, out: Path, *, overwrite: bool) -> None:
    """Leave with status 2 where the file exists and may not be replaced."""
    if out.exists() and not overwrite:
        parser.error(f"{out} exists: give another --out, or --overwrite to replace it")


def command_line(program: str, recipe: Any) -> str:
    """Return the command line that trains by ``recipe``, all settings spelt out."""
    words = [f"--{name.replace('_', '-')} {value}" for name, value in asdict(recipe).items()]
    return " ".join([program, *words])


def write_weights(out: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write weights and what they are, as safetensors, in one move."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda path: save_file(tensors, path, metadata=metadata))


def say(text: str) -> None:
    """Write a line at once, also where the output is a file."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
