"""Pretrain the small vision transformer of the Caltech-101 experiment on CIFAR-10.

``python -m training.pretrain.cifar10 --data FOLDER --out FILE`` trains the model of
:mod:`training.backbones.conv_vit` and writes its weights. One thread of a processor does it in
about an hour. The same settings give the same weights on the same machine.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from training.backbones.conv_vit import NAME, fold
from training.backbones.weight_files import tensors_sha256
from training.pretrain.cifar_images import Images, epoch, read, scaled, split_off
from training.pretrain.recipes import add_settings, command_line, say
from training.run_dir import write_atomically

PROGRAM = "python -m training.pretrain.cifar10"
VERSION = 1
OPTIONS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 192,
    "depth": 6,
    "num_heads": 6,
    "mlp_ratio": 2.0,
    "widths": [64, 128],
    "num_classes": 10,
}
# As in training.pretrain.train: timm's own start is for many more and much larger patches.
WEIGHT_INIT = "jax"
POSITION_GAIN = 15.0


@dataclass(frozen=True)
class Recipe:
    """Everything the weights depend on, beside the images and the constants of this package."""

    seed: int = 0
    epochs: int = 12
    batch_size: int = 128
    lr: float = 1e-3
    warmup: float = 0.15  # share of the steps in which the rate rises, then a cosine to zero
    weight_decay: float = 0.05
    stem_weight: float = 0.5  # of the loss of a second classifier, on the stem's tokens
    erase: int = 8  # side, in pixels, of the square that each training image loses
    threads: int = 1  # the order of float sums, hence the bits, depends on it


@dataclass(frozen=True)
class Result:
    """Trained weights as they are stored, losses by epoch, and the accuracy in [0, 1]."""

    tensors: dict[str, Tensor]
    losses: list[float]
    accuracy: float


def build(options: dict[str, Any] = OPTIONS) -> nn.Module:
    """Return the untrained model, with batch normalisation in its stem."""
    model: nn.Module = timm.create_model(NAME, folded=False, weight_init=WEIGHT_INIT, **options)
    with torch.no_grad():
        model.get_parameter("pos_embed").mul_(POSITION_GAIN)
    return model


def load(tensors: dict[str, Tensor], options: dict[str, Any] = OPTIONS) -> nn.Module:
    """Return the trained model with its classifier, for evaluation, from stored weights."""
    with torch.random.fork_rng(devices=[]):  # the start that the weights replace is random
        model: nn.Module = timm.create_model(NAME, **options)
    model.load_state_dict(tensors)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, batch_size: int = 250) -> float:
    """Return the share of images that the model labels rightly."""
    hits = 0
    for start in range(0, len(images.labels), batch_size):
        part = slice(start, start + batch_size)
        guess = model(scaled(images.pixels[part])).argmax(dim=1)
        hits += int((guess == images.labels[part]).sum())
    return hits / len(images.labels)


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights as they are stored: float16, batch normalisation folded in."""
    model.eval()
    fold(model)
    return {name: value.half().contiguous() for name, value in model.state_dict().items()}


def digest(tensors: dict[str, Tensor], options: dict[str, Any] = OPTIONS) -> str:
    """Return the hash that runs record of this backbone: read as float32, without classifier."""
    features = {key: value for key, value in tensors.items() if not key.startswith("head.")}
    return tensors_sha256(load(features, {**options, "num_classes": 0}))


def train(
    recipe: Recipe,
    images: Images,
    test: Images,
    log: Callable[[str], None] = say,
    *,
    options: dict[str, Any] = OPTIONS,
) -> Result:
    """Train by ``recipe`` on ``images``; ``test`` is read once, after the last step.

    The caller's random state is left as it was. The number of threads is the caller's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build(options).to(memory_format=torch.channels_last)
        # The stem learns sooner from a classifier of its own than through untrained blocks.
        helper = nn.Linear(options["embed_dim"], options["num_classes"])
    tokens: list[Tensor] = []
    model.get_submodule("patch_embed").register_forward_hook(lambda *io: tokens.append(io[-1]))
    blocks: Any = model.get_submodule("blocks")
    for block in blocks:
        block.attn.fused_attn = False  # on a processor its backward pass in bfloat16 is very slow
    # Weight decay is for matrices and kernels: norms, biases and tokens go without.
    heavy = [p for p in (*model.parameters(), *helper.parameters()) if p.ndim in (2, 4)]
    light = [p for p in (*model.parameters(), *helper.parameters()) if p.ndim not in (2, 4)]
    groups: list[dict[str, Any]] = [{"params": heavy}, {"params": light, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps = recipe.epochs * (len(images.labels) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=steps, pct_start=recipe.warmup, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    losses = []
    model.train()
    start = time.process_time()
    for number in range(1, recipe.epochs + 1):
        total, batches = torch.zeros(()), 0
        for x, labels in epoch(images, recipe.batch_size, recipe.erase, generator):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(x)
                early = helper(torch.relu(tokens.pop()).mean(dim=1))
            loss = cross_entropy(logits.float(), labels)
            joint = loss + recipe.stem_weight * cross_entropy(early.float(), labels)
            optimizer.zero_grad()
            torch.autograd.backward(joint)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total, batches = total + loss.detach(), batches + 1
        losses.append(float(total) / batches)
        seconds = time.process_time() - start
        log(f"epoch {number}/{recipe.epochs}  loss {losses[-1]:.4f}  {seconds:.0f} s of processor")
    tensors = stored(model)
    return Result(tensors, losses, accuracy(load(tensors, options), test))


def command(recipe: Recipe) -> str:
    """Return the command line that trains by ``recipe``, all settings spelt out."""
    return command_line(PROGRAM, recipe)


def save(result: Result, recipe: Recipe, out: Path) -> None:
    """Write the weights and what they are, as safetensors, in one move."""
    metadata = {
        "timm_model": NAME,
        "timm_options": json.dumps(OPTIONS),
        "recipe_version": str(VERSION),
        "recipe": command(recipe),
        "seed": str(recipe.seed),
        "pixels": "(x/255 - 0.5) / 0.5",
        "test_accuracy": f"{result.accuracy:.4f}",
        "tensors_sha256": digest(result.tensors),
        "versions": f"torch {torch.__version__}, timm {timm.__version__}",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda path: save_file(result.tensors, path, metadata=metadata))


def main(arguments: list[str] | None = None) -> None:
    """Run the recipe from the command line."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with SPLIT_CLASS.webp")
    parser.add_argument("--out", type=Path, help="safetensors file to write; must not exist")
    parser.add_argument(
        "--trial",
        action="store_true",
        help="train on nine tenths of the training images, print the accuracy on the others, write "
        "nothing and never open the test images",
    )
    add_settings(parser, Recipe)
    options = vars(parser.parse_args(arguments))
    data, out, trial = (options.pop(name) for name in ("data", "out", "trial"))
    if trial == (out is not None):
        parser.error("give either --out FILE, to make the weights, or --trial")
    if out is not None and out.exists():
        parser.error(f"{out} exists: give another --out, or move it away")
    recipe = Recipe(**options)
    torch.set_num_threads(recipe.threads)
    images = read(data, "train")
    images, test = split_off(images, 10) if trial else (images, read(data, "test"))
    start = time.process_time()
    result = train(recipe, images, test)
    if not trial:
        save(result, recipe, out)
    count = sum(value.numel() for value in result.tensors.values())
    say(f"{count} weights, {time.process_time() - start:.0f} s of processor time")
    say(f"SHA-256 of the backbone's tensors: {digest(result.tensors)}")
    say(f"accuracy on {'held-out training' if trial else 'test'} images: {result.accuracy:.4f}")


if __name__ == "__main__":
    main()
