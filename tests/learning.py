"""A method on a tiny transformer, task by task, outside the training loop."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.methods import Context, Method, MethodConfig

LABELS = torch.arange(12) % 3
QKV = "*.attn.qkv"


def made(name: str, model: nn.Module, *, tasks: int = 3, seed: int = 0, **options: Any) -> Method:
    """A method with rank 3, if it has one, attached to a model."""
    config = MethodConfig(name)
    options = {"rank": 3, **options} if "rank" in config.options else options
    method: Method = MethodConfig(name, options).build()
    method.start(model, Context(seed, tasks))
    return method


def images(task: int) -> Tensor:
    """Twelve images of three classes."""
    return torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(task))


def batches(task: int) -> list[tuple[Tensor, Tensor]]:
    """The images of a task as a loader gives them."""
    pixels = images(task)
    return [(pixels[:8], LABELS[:8]), (pixels[8:], LABELS[8:])]


def learn(
    method: Method, model: nn.Module, task: int, *, steps: int = 3, lr: float = 0.1
) -> dict[str, Tensor]:
    """One task of full-batch steps with a fixed random head; the weights after it."""
    generator = torch.Generator().manual_seed(task)
    head = torch.randn(3, 16, generator=generator).requires_grad_()
    pixels = images(task)
    method.begin_task(batches(task))
    optimizer = torch.optim.SGD([*method.parameters(), head], lr=lr, momentum=0.9)
    model.train()

    def loss(rows: Tensor) -> Tensor:
        return functional.cross_entropy(model(pixels[rows]) @ head.mT, LABELS[rows])

    for _ in range(steps):
        method.step(loss, LABELS, optimizer, generator=generator, backward=torch.Tensor.backward)
    method.end_task(batches(task))
    return weights(model)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
