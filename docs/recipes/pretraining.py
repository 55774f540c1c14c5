"""What the recipes share: the start of a small vision transformer, the flags, and the file."""

import argparse
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

from training.run_dir import write_atomically

R = TypeVar("R")

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


def adamw(recipe: Any, decayed: list[nn.Parameter], others: list[nn.Parameter]) -> AdamW:
    """Create the optimiser, with weight decay on the first parameters alone."""
    plain: dict[str, Any] = {"params": others, "weight_decay": 0.0}
    return AdamW([{"params": decayed}, plain], lr=recipe.lr, weight_decay=recipe.weight_decay)


def descend(loss: Tensor, model: nn.Module, optimizer: AdamW, schedule: LRScheduler) -> None:
    """Take a step down the loss, with the model's gradient clipped to length 1."""
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()


def parse(
    parser: argparse.ArgumentParser, recipe: type[R], arguments: list[str] | None
) -> tuple[argparse.Namespace, R]:
    """Parse with a flag for every field of the recipe's dataclass, and ``--overwrite``.

    Where the file ``--out`` exists and may not be replaced, the program ends with status 2. The
    recipe's number of threads is set.
    """
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    names = {field.name: field.default for field in fields(recipe)}  # type: ignore[arg-type]
    for name, default in names.items():
        flag, kind = f"--{name.replace('_', '-')}", type(default)
        parser.add_argument(flag, type=kind, default=default, help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.out is not None and options.out.exists() and not options.overwrite:
        parser.error(f"{options.out} exists: give another --out, or --overwrite to replace it")
    torch.set_num_threads(options.threads)
    return options, recipe(**{name: getattr(options, name) for name in names})


def command_line(program: str, recipe: Any) -> str:
    """Return the command line that trains by ``recipe``, all settings spelt out."""
    words = [f"--{name.replace('_', '-')} {value}" for name, value in asdict(recipe).items()]
    return " ".join([program, *words])


def write_weights(
    out: Path,
    tensors: dict[str, Tensor],
    *,
    program: str,
    recipe: Any,
    model: str,
    options: dict[str, Any],
    **facts: str,
) -> None:
    """Write weights and what they are, as safetensors, in one move."""
    metadata = {
        "timm_model": model,
        "timm_options": json.dumps(options),
        "recipe": command_line(program, recipe),
        "seed": str(recipe.seed),
        **facts,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda path: save_file(tensors, path, metadata=metadata))


def say(text: str) -> None:
    """Write a line at once, also where the output is a file."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
