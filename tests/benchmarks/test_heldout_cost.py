"""What the held-out diagnostic costs at the start of a task, on a ViT-B: ``make bench``.

The pass over the images forms half a Gram matrix more a layer; the solves choose directions on two
halves beside the whole. Both are measured apart, since the one grows with the number of images and
the other does not, with one thread and in turn, in processor time.
"""

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from threadpoolctl import threadpool_limits
from turns import in_turn

from backends.torch import LoDASettings, collect_moments
from backends.torch.moments import collect_halves
from backends.torch.solve import solve_bases, solve_heldout
from loda_math import remember, rounding_unit

IMAGES, ROUNDS = 8, 3
TARGET = "*.attn.qkv"
EPS = rounding_unit()


def medians(*routes: Callable[[], Any]) -> list[float]:
    times = in_turn({str(number): route for number, route in enumerate(routes)}, rounds=ROUNDS)
    return [statistics.median(found) for found in times.values()]


def test_heldout_ratios_are_cheap_beside_the_pass_and_the_training(
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0)
    settings = LoDASettings(rank=32)
    images = [torch.randn(IMAGES, 3, 224, 224)]
    with threadpool_limits(1):
        plain, both = medians(
            lambda: collect_moments(model, images, TARGET),
            lambda: collect_halves(model, images, TARGET),
        )
        before = collect_moments(model, images, TARGET)
        old = {name: remember(None, m.mean) for name, m in before.items()}
        moments, halves = collect_halves(model, [torch.randn(IMAGES, 3, 224, 224)], TARGET)
        new = {n: m.mean for n, m in moments.items()}
        solve, measure = medians(
            lambda: solve_bases(settings, new, old, EPS),
            lambda: solve_heldout(settings, halves, old, EPS),
        )
    memory = sum(2 * half.nbytes for half, _ in halves.values()) / 2**20
    with capsys.disabled():
        print(
            f"\nViT-B, {len(old)} layers, rank 32, one thread:\n"
            f"  pass    {1e3 * plain / IMAGES:7.0f} ms an image, with halves "
            f"{1e3 * both / IMAGES:7.0f} ({100 * (both / plain - 1):+.0f} %)\n"
            f"  solves  {solve:7.2f} s a task, held-out ratios {measure:7.2f} s more\n"
            f"  memory  {memory:7.0f} MiB more while a task begins"
        )
    assert both < 1.25 * plain
    assert measure < 4 * solve
