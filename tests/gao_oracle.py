"""A small problem and the gradient-aligned step written out by hand, for the tests."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from backends.torch import AlignedStep, gradient_aligned_step

CLASSES = 4
BROKEN = "it broke on purpose"
Make = Callable[[list[nn.Parameter]], Optimizer]


def sgd(parameters: list[nn.Parameter]) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)


def adamw(parameters: list[nn.Parameter]) -> Optimizer:
    return AdamW(parameters, lr=0.05, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)


class Problem:
    """Two LoRA-like tensors and a head, in float64; ``spare`` takes part in no loss."""

    def __init__(self, seed: int = 0, *, spare: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed % 2**31)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.x, self.up, self.down = draw(16, 5), nn.Parameter(draw(6, 2)), nn.Parameter(draw(2, 5))
        self.head, self.spare = nn.Parameter(draw(CLASSES, 6)), nn.Parameter(draw(3))
        self.y = (torch.arange(16) % 5).clamp(max=CLASSES - 1)  # halves of unequal size
        self.perturbed = [self.up, self.down] + ([self.spare] if spare else [])
        self.parameters = [*self.perturbed, self.head]
        self.permutation = torch.randperm(CLASSES, generator=generator)

    def loss(self, rows: Tensor) -> Tensor:
        hidden = (self.x[rows] @ self.down.T @ self.up.T).tanh()
        return F.cross_entropy(hidden @ self.head.T, self.y[rows])

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    def halves(self) -> tuple[Tensor, Tensor]:
        first = torch.isin(self.y, self.permutation[: CLASSES // 2])
        return first.nonzero().flatten(), (~first).nonzero().flatten()

    def step(self, optimizer: Optimizer, radius: float = 0.3, **keywords: Any) -> AlignedStep:
        return gradient_aligned_step(
            keywords.pop("loss", self.loss),
            keywords.pop("labels", self.y),
            optimizer,
            self.perturbed,
            radius=radius,
            permutation=keywords.pop("permutation", self.permutation),
            **keywords,
        )


class PlainSGD:
    """Momentum and coupled weight decay, written out."""

    def __init__(self) -> None:
        self.buffers: dict[int, Tensor] = {}

    def __call__(self, values: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        out = []
        for i, (p, g) in enumerate(zip(values, gradients, strict=True)):
            g = g + 0.1 * p
            self.buffers[i] = 0.9 * self.buffers[i] + g if i in self.buffers else g
            out.append(p - 0.05 * self.buffers[i])
        return out


class PlainAdamW:
    """Decoupled weight decay, written out."""

    def __init__(self) -> None:
        self.m: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}
        self.t = 0

    def __call__(self, values: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        self.t += 1
        out = []
        for i, (p, g) in enumerate(zip(values, gradients, strict=True)):
            self.m[i] = 0.8 * self.m.get(i, torch.zeros_like(p)) + 0.2 * g
            self.v[i] = 0.9 * self.v.get(i, torch.zeros_like(p)) + 0.1 * g * g
            m, v = self.m[i] / (1 - 0.8**self.t), self.v[i] / (1 - 0.9**self.t)
            out.append(p - 0.05 * 0.1 * p - 0.05 * m / (v.sqrt() + 1e-6))
        return out


def by_hand(
    p: Problem,
    values: list[Tensor],
    update: Callable[[list[Tensor], list[Tensor]], list[Tensor]],
    radius: float,
    *,
    restore_first: bool = False,
) -> tuple[list[Tensor], float]:
    """Both half steps of method and paper, on copies; head last and never perturbed."""

    def gradients(at: list[Tensor], rows: Tensor) -> tuple[list[Tensor], float]:
        leaves = [v.clone().requires_grad_() for v in at]
        up, down, head = leaves
        logits = (p.x[rows] @ down.T @ up.T).tanh() @ head.T
        loss = F.cross_entropy(logits, p.y[rows])
        return list(torch.autograd.grad(loss, leaves)), float(loss.detach())

    first, second = p.halves()
    total = 0.0
    for source, goal in ((first, second), (second, first)):
        g, _ = gradients(values, source)
        shift = [radius * x / x.norm() for x in g[:2]] + [torch.zeros_like(values[2])]
        moved = [v - s for v, s in zip(values, shift, strict=True)]
        g, loss = gradients(moved, goal)
        if restore_first:
            values = update(values, g)
        else:
            values = [v + s for v, s in zip(update(moved, g), shift, strict=True)]
        total += loss * len(goal) / len(p.y)
    return values, total
