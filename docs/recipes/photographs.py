"""Pretrain a small vision transformer with a convolutional stem on photographs of 32 x 32 pixels.

This is what the recipes of ``cifar_vit.py`` and ``tiny_imagenet_vit.py`` share: a source of
photographs says how its images are read and which model is trained on them.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from pretraining import adamw, descend, parse, say, untrained, write_weights
from torch import Tensor, nn
from torch.nn import functional

from training.backbones.conv_vit import NAME, fold
from training.backbones.weights import tensors_sha256

SIDE = 32
PAD = 4


@dataclass(frozen=True)
class Recipe:
    """Everything the weights depend on, beside the images and the constants of these files."""

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


class Images(NamedTuple):
    """Pixels (N, 32, 32, 3), uint8, and labels (N,), int64: numbers of the sorted class names."""

    pixels: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> "Images":
        """Return the images at ``index``."""
        return Images(self.pixels[index], self.labels[index])


@dataclass(frozen=True)
class Source:
    """A source of photographs and the model that is pretrained on them."""

    program: str  # the command of the recipe
    version: int  # of the recipe, raised when it gives other weights
    options: dict[str, Any]  # of the model, as timm takes them
    folder: str  # what the folder of the images holds, for the help
    read: Callable[[Path, str], Images]  # reads the "train" or "test" images of the folder


def split_off(images: Images, every: int) -> tuple[Images, Images]:
    """Hold out each ``every``-th image: the others, and those held out."""
    held = torch.arange(len(images.labels)) % every == every - 1
    return images.take(~held), images.take(held)


def scaled(pixels: Tensor) -> Tensor:
    """Map bytes (N, H, W, 3) to floats (N, 3, H, W) in [-1, 1], as ``data.mean 0.5`` and ``std``.

    Examples
    --------
    >>> scaled(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)).flatten()
    tensor([-1.,  1.])
    """
    return pixels.permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.5)


def epoch(
    images: Images, batch_size: int, erase: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one pass in random order, as (N, 3, 32, 32) floats and labels; a rest is left out.

    Each image is mirrored at its borders by 4 pixels and cut at random, flipped left to right
    with probability 0.5, and loses a square of ``erase`` pixels, which becomes grey.
    """
    count = len(images.labels)
    order = torch.randperm(count, generator=generator)
    for index in torch.split(order[: count - count % batch_size], batch_size):
        chosen = images.take(index)
        yield _vary(scaled(chosen.pixels), erase, generator), chosen.labels


def _vary(x: Tensor, erase: int, generator: torch.Generator) -> Tensor:
    def draw(high: int) -> Tensor:
        return torch.randint(high, (len(x), 1), generator=generator)

    line = torch.arange(SIDE)
    rows, columns = line + draw(2 * PAD + 1), line + draw(2 * PAD + 1)
    columns = torch.where(draw(2) == 1, columns.flip(1), columns)
    padded = functional.pad(x, (PAD,) * 4, mode="reflect").permute(0, 2, 3, 1)
    cut = padded[torch.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]]
    # The square may hang over the border: then less is lost.
    top, left = draw(SIDE) - erase // 2, draw(SIDE) - erase // 2
    hit_rows = (line >= top) & (line < top + erase)
    hit_columns = (line >= left) & (line < left + erase)
    gone = hit_rows[:, :, None] & hit_columns[:, None, :]
    return cut.masked_fill_(gone[..., None], 0.0).permute(0, 3, 1, 2)


def build(options: dict[str, Any]) -> nn.Module:
    """Return the untrained model, with batch normalisation in its stem."""
    return untrained(NAME, folded=False, **options)


def load(tensors: dict[str, Tensor], options: dict[str, Any]) -> nn.Module:
    """Return the trained model with its classifier, for evaluation, from stored weights."""
    with torch.random.fork_rng(devices=[]):  # the start that the weights replace is random
        model: nn.Module = timm.create_model(NAME, **options)
    model.load_state_dict(tensors)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Return the share of images that the model labels rightly."""
    parts = torch.split(images.pixels, 250)
    guess = torch.cat([model(scaled(part)).argmax(dim=1) for part in parts])
    return int((guess == images.labels).sum()) / len(guess)


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights as they are stored: float16, batch normalisation folded in."""
    model.eval()
    fold(model)
    return {name: value.half().contiguous() for name, value in model.state_dict().items()}


def digest(tensors: dict[str, Tensor], options: dict[str, Any]) -> str:
    """Return the hash that runs record of this backbone: read as float32, without classifier."""
    features = {key: value for key, value in tensors.items() if not key.startswith("head.")}
    return tensors_sha256(load(features, {**options, "num_classes": 0}))


def train(recipe: Recipe, images: Images, test: Images, *, options: dict[str, Any]) -> Result:
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
    optimizer = adamw(recipe, heavy, light)
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
            loss = functional.cross_entropy(logits.float(), labels)
            joint = loss + recipe.stem_weight * functional.cross_entropy(early.float(), labels)
            descend(joint, model, optimizer, schedule)
            total, batches = total + loss.detach(), batches + 1
        losses.append(float(total) / batches)
        seconds = time.process_time() - start
        say(f"epoch {number}/{recipe.epochs}  loss {losses[-1]:.4f}  {seconds:.0f} s of processor")
    tensors = stored(model)
    return Result(tensors, losses, accuracy(load(tensors, options), test))


def run(source: Source, description: str | None, arguments: list[str] | None) -> None:
    """Run the recipe of a source of photographs from the command line."""
    parser = argparse.ArgumentParser(prog=source.program, description=description)
    parser.add_argument("--data", type=Path, required=True, help=source.folder)
    parser.add_argument("--out", type=Path, help="safetensors file to write")
    parser.add_argument(
        "--trial",
        action="store_true",
        help="train on nine tenths of the training images, print the accuracy on the others, write "
        "nothing and never open the test images",
    )
    options, recipe = parse(parser, Recipe, arguments)
    data, out, trial = options.data, options.out, options.trial
    if trial == (out is not None):
        parser.error("give either --out FILE, to make the weights, or --trial")

    def read(split: str) -> Images:
        found, classes = source.read(data, split), source.options["num_classes"]
        if (given := len({*found.labels.tolist()})) != classes:  # labels would shift unnoticed
            parser.error(f"{data} must hold {classes} classes of {split} images, got {given}")
        return found

    images = read("train")
    images, test = split_off(images, 10) if trial else (images, read("test"))
    start = time.process_time()
    result = train(recipe, images, test, options=source.options)
    seconds, sha256 = time.process_time() - start, digest(result.tensors, source.options)
    if not trial:
        write_weights(
            out,
            result.tensors,
            program=source.program,
            recipe=recipe,
            model=NAME,
            options=source.options,
            recipe_version=str(source.version),
            pixels="(x/255 - 0.5) / 0.5",
            test_accuracy=f"{result.accuracy:.4f}",
            tensors_sha256=sha256,
            versions=f"torch {torch.__version__}, timm {timm.__version__}",
        )
    count = sum(value.numel() for value in result.tensors.values())
    say(f"{count} weights, {seconds:.0f} s of processor time")
    say(f"SHA-256 of the backbone's tensors: {sha256}")
    say(f"accuracy on {'held-out training' if trial else 'test'} images: {result.accuracy:.4f}")
