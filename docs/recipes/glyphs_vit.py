"""Pretrain the small vision transformer of the digits experiment on random glyphs.

``python docs/recipes/glyphs_vit.py --out FILE`` draws glyph classes, trains a timm
VisionTransformer to tell them apart and writes its weights: 15 minutes on one core. No digit takes
part: see ``digit_rejection.py``. The same settings give the same weights on the same machine.
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digit_rejection import glyph_classes
from numpy.typing import NDArray
from pretraining import adamw, descend, parse, say, untrained, write_weights
from torch import Tensor, nn
from torch.nn import functional

from training.data.glyphs import BITMAP, Glyphs, bend, draw, fit

PROGRAM = "python docs/recipes/glyphs_vit.py"
TIMM_MODEL = "vit_tiny_patch16_224"
TIMM_OPTIONS: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 4,
    "num_classes": 0,
}
# Streams of random numbers that share the seed: training samples, held-out samples, episodes.
TRAIN, HELD_OUT, EPISODES = 1, 2, 3
BLOCK = 4
SIZE = BITMAP // BLOCK
LEVELS = BLOCK * BLOCK
PEN_RADIUS = (1.5, 2.9)
WAYS, SHOTS = 10, 5
FEW_SHOT_EPISODES = 200


@dataclass(frozen=True)
class Recipe:
    """Everything the weights depend on, beside the constants of these files."""

    seed: int = 0
    classes: int = 1000  # glyph classes trained on
    unseen: int = 200  # glyph classes kept for the few-shot check
    steps: int = 3000
    batch_size: int = 128
    lr: float = 2e-3
    warmup: int = 200  # steps of linear warm-up, then a cosine to zero
    weight_decay: float = 0.05
    smoothing: float = 0.1
    scale: float = 20.0  # of the cosine classifier's logits
    threads: int = 1  # the order of float sums, hence the bits, depends on it


@dataclass(frozen=True)
class Result:
    """A trained backbone and how well it does: losses by step and accuracies in [0, 1]."""

    model: nn.Module
    losses: list[float]
    held_out: float
    few_shot: float


def build() -> nn.Module:
    """Return the untrained backbone: (N, 1, 8, 8) pixels in [0, 1] to (N, 96) class tokens."""
    return untrained(TIMM_MODEL, **TIMM_OPTIONS)


def block_counts(bitmaps: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Count the ink of each 4 x 4 block: (N, 32, 32) to (N, 8, 8), values 0 to 16."""
    blocks = bitmaps.reshape(-1, SIZE, BLOCK, SIZE, BLOCK)
    counts: NDArray[np.uint8] = blocks.sum(axis=(2, 4), dtype=np.uint8)
    return counts


def handwrite(glyphs: Glyphs, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one random instance of every glyph: block counts (N, 8, 8), values 0 to 16.

    Vertices are jittered, the plane is bent by slow waves, turned, sheared and stretched, and the
    pen's width, the size and the position vary, as between writers.

    Examples
    --------
    >>> from training.data.glyphs import pack
    >>> bar = pack([[np.array([[0.5, 0.0], [0.5, 0.5], [0.5, 1.0]])]])
    >>> handwrite(bar, np.random.default_rng(0)).shape
    (1, 8, 8)
    """
    dots = bend(glyphs, rng)
    count = len(dots)
    radius = rng.uniform(*PEN_RADIUS, size=count)
    extent = rng.uniform(27, 32, size=(count, 2)) - 2 * radius[:, None]
    centre = BITMAP / 2 + rng.normal(0, 0.8, size=(count, 2))
    return block_counts(draw(fit(dots, extent, centre), radius))


def write(glyphs: Glyphs, labels: np.ndarray[Any, Any], rng: np.random.Generator) -> Tensor:
    """Draw an instance of the class of each label: (N, 1, 8, 8) float32 pixels in [0, 1]."""
    counts = handwrite(glyphs.take(labels), rng)
    return torch.from_numpy(counts).unsqueeze(1).float() / LEVELS


def batches(glyphs: Glyphs, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``steps`` batches of fresh samples and their labels."""
    for step in range(recipe.steps):
        rng = np.random.default_rng([recipe.seed, TRAIN, step])
        labels = rng.integers(len(glyphs.points), size=recipe.batch_size)
        yield write(glyphs, labels, rng), torch.from_numpy(labels)


def rate(step: int, recipe: Recipe) -> float:
    """Return the share of the learning rate at ``step``: linear warm-up, cosine to zero."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def embed(model: nn.Module, images: Tensor) -> Tensor:
    """Return unit-length class tokens (N, 96) of images (N, 1, 8, 8), in evaluation mode."""
    model.eval()
    return torch.cat([functional.normalize(model(part)) for part in torch.split(images, 500)])


def few_shot_accuracy(model: nn.Module, glyphs: Glyphs, seed: int, *, episodes: int) -> float:
    """Return the nearest-class-mean accuracy over episodes of ten of the glyph classes.

    Each class of an episode gives 5 samples for its mean feature and 10 to classify, all new, by
    the cosine of the angle to the mean.

    Raises
    ------
    ValueError
        If there are fewer classes.
    """
    if len(glyphs.points) < WAYS:
        msg = f"{WAYS}-way episodes need {WAYS} classes, got {len(glyphs.points)}: draw more"
        raise ValueError(msg)
    truth = torch.arange(WAYS).repeat_interleave(10)
    hits = 0.0
    for episode in range(episodes):
        rng = np.random.default_rng([seed, EPISODES, episode])
        chosen = rng.choice(len(glyphs.points), size=WAYS, replace=False)
        tokens = embed(model, write(glyphs, np.repeat(chosen, SHOTS + 10), rng))
        tokens = tokens.reshape(WAYS, SHOTS + 10, -1)
        means = functional.normalize(tokens[:, :SHOTS].mean(dim=1))
        guess = (tokens[:, SHOTS:].flatten(0, 1) @ means.T).argmax(dim=1)
        hits += (guess == truth).float().mean().item()
    return hits / episodes


def train(recipe: Recipe, *, episodes: int) -> Result:
    """Train a backbone by ``recipe``, with a cosine classifier that is thrown away.

    The caller's random state is left as it was. The number of threads is the caller's.
    """
    glyphs = glyph_classes(recipe.classes + recipe.unseen, recipe.seed)
    known, unseen = glyphs.take(slice(recipe.classes)), glyphs.take(slice(recipe.classes, None))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build()
        heads = nn.Parameter(torch.randn(recipe.classes, TIMM_OPTIONS["embed_dim"]) * 0.1)
    # Weight decay is for matrices: norms, biases, tokens and the scale-free heads go without.
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = adamw(recipe, matrices, [*others, heads])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, recipe))
    losses = []
    model.train()
    for step, (images, labels) in enumerate(batches(known, recipe), start=1):
        tokens = functional.normalize(model(images))
        logits = recipe.scale * tokens @ functional.normalize(heads).T
        loss = functional.cross_entropy(logits, labels, label_smoothing=recipe.smoothing)
        descend(loss, model, optimizer, schedule)
        losses.append(loss.item())
        if step % 250 == 0:
            say(f"step {step}/{recipe.steps}  loss {np.mean(losses[-250:]):.3f}")
    rng = np.random.default_rng([recipe.seed, HELD_OUT])
    truth = np.repeat(np.arange(recipe.classes), 10)
    tokens = embed(model, write(known, truth, rng))
    guess = (tokens @ functional.normalize(heads.detach()).T).argmax(dim=1)
    held_out = (guess == torch.from_numpy(truth)).float().mean().item()
    few_shot = few_shot_accuracy(model, unseen, recipe.seed, episodes=episodes)
    return Result(model, losses, held_out, few_shot)


def save(result: Result, recipe: Recipe, out: Path) -> None:
    """Write the backbone's parameters and what they are."""
    write_weights(
        out,
        result.model.state_dict(),
        program=PROGRAM,
        recipe=recipe,
        model=TIMM_MODEL,
        options=TIMM_OPTIONS,
        pixels="[0,1]",
        held_out_accuracy=f"{result.held_out:.4f}",
        few_shot_accuracy=f"{result.few_shot:.4f}",
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the recipe from the command line."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument(
        "--episodes", type=int, default=FEW_SHOT_EPISODES, help="few-shot episodes to measure"
    )
    options, recipe = parse(parser, Recipe, arguments)
    start = time.perf_counter()
    result = train(recipe, episodes=options.episodes)
    save(result, recipe, options.out)
    count = sum(p.numel() for p in result.model.parameters())
    say(f"{count} parameters, {time.perf_counter() - start:.0f} s, {options.out}")
    say(f"held-out samples of {recipe.classes} glyph classes: {result.held_out:.4f}")
    say(f"unseen glyph classes, 10 ways, 5 shots, nearest mean: {result.few_shot:.4f}")


if __name__ == "__main__":
    main()
