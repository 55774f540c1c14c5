"""Layers with random branches, and the dense weight that they stand for."""

import torch
from torch import Tensor, nn

from backends.torch import LoRALinear

D, O, R = 6, 9, 2  # noqa: E741 - the shapes of the method: inputs, outputs, rank


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def linear(seed: int = 0, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(D, O, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(random(O, D, seed=seed))
        if bias:
            layer.bias.copy_(random(O, seed=seed + 1))
    return layer


def two_branches(dtype: torch.dtype = torch.float32) -> LoRALinear:
    layer = LoRALinear(linear(dtype=dtype))
    layer.add_branch("general", random(R, D, seed=2), up=random(O, R, seed=3), scale=0.25)
    layer.add_branch("isolated", random(3, D, seed=4), up=random(O, 3, seed=5), scale=0.5)
    return layer


def dense(layer: LoRALinear) -> Tensor:
    """W + Σ w B A in float64, rows placed by hand."""
    weight = layer.base.weight.detach().double().clone()
    for name in layer.branches:
        branch = layer.branch(name)
        first, last = branch.rows or (0, O)
        update = branch.up.detach().double() @ branch.down.detach().double()
        weight[first:last] += branch.scale * update
    return weight
