"""Models of a few weights for LoDA over whole models, their tasks, and what is read off them.

A task's images and draws depend on its number alone, so two runs of one task can be compared.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from backends.torch import LoDA, TaskRecord, collect_moments


def mlp(seed: int = 0) -> nn.Sequential:
    """Two target widths (6 and 10), in float64 so that oracles are tight."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 6), nn.Linear(6, 4)
    ).double()


MLP = {"target": ("0", "2", "4"), "rank": 3}
WIDTHS = {"0": 6, "2": 10, "4": 10}


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=2, num_classes=4
    )


def inputs(task: int, model: nn.Module) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + task)
    size = (24, 3, 8, 8) if isinstance(model, VisionTransformer) else (24, 6)
    dtype = next(model.parameters()).dtype
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    # Every task lives in directions of its own scale, as real tasks do.
    scale = torch.rand(size[1:], generator=generator, dtype=torch.float64) ** 3 * 3
    return (x * scale).to(dtype), torch.arange(24) % 4


def batches(task: int, model: nn.Module) -> list[Tensor]:
    return list(inputs(task, model)[0].split(10))


def fit(
    loda: LoDA, task: int, optimizer: torch.optim.Optimizer | None = None, *, steps: int = 3
) -> torch.optim.Optimizer:
    """A few gradient-aligned steps in an open task; draws depend on the task alone."""
    x, y = inputs(task, loda.model)
    optimizer = optimizer or torch.optim.SGD(loda.trainable_parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(task)
    for _ in range(steps):
        loda.step(
            lambda rows: F.cross_entropy(loda.model(x[rows]), y[rows]),
            y, optimizer, radius=0.3, generator=generator,
        )  # fmt: skip
    return optimizer


def learn(loda: LoDA, task: int) -> TaskRecord:
    loda.begin_task(batches(task, loda.model))
    fit(loda, task)
    return loda.end_task(batches(task, loda.model))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def totals(loda: LoDA) -> dict[str, Tensor]:
    """The history by layer, as it enters the solvers."""
    return {name: past.total for name, past in loda.history.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def means(model: nn.Module, task: int, target: Any) -> dict[str, Tensor]:
    found = collect_moments(copy.deepcopy(model), batches(task, model), target)
    return {name: m.mean for name, m in found.items()}


def breaking(good: list[Tensor], failure: BaseException, on_walk: int = 1) -> Any:
    class Breaking:
        walks = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.walks += 1
            yield good[0]
            if self.walks >= on_walk:
                raise failure
            yield from good[1:]

    return Breaking()
