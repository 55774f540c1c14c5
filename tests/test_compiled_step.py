"""A step through a model compiled by ``torch.compile`` is the step without it, to rounding."""

import shutil
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tiny_models import MLP, inputs, mlp
from torch import Tensor, nn

from backends.torch import LoDA, LoDASettings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(shutil.which(name) for name in ("c++", "g++", "clang++")),
        reason="torch.compile needs a C++ compiler, and there is none here",
    ),
    # What torch's own compiler warns of is not ours.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def second_task() -> LoDA:
    model = mlp()
    loda = LoDA(model, LoDASettings(**MLP))
    for task in range(2):
        loda.begin_task([inputs(task, model)[0]])
        if task == 0:
            loda.end_task([inputs(task, model)[0]])
    return loda


def steps(loda: LoDA, model: nn.Module) -> list[Tensor]:
    """Two aligned steps that call ``model``; the losses and the trained tensors after them."""
    pixels, labels = inputs(1, loda.model)
    optimizer = torch.optim.SGD(loda.trainable_parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    found = [
        loda.step(
            lambda rows: F.cross_entropy(model(pixels[rows]), labels[rows]),
            labels,
            optimizer,
            radius=0.3,
            generator=generator,
        ).loss
        for _ in range(2)
    ]
    return [*found, *(p.detach() for p in loda.lora_parameters())]


def test_a_compiled_step_is_the_step() -> None:
    plain, compiled = second_task(), second_task()
    model = torch.compile(compiled.model, fullgraph=True, dynamic=False)
    expected, found = steps(plain, plain.model), steps(compiled, model)
    assert len(expected) == len(found) > 6
    for a, b in zip(expected, found, strict=True):
        assert torch.linalg.vector_norm(a) > 0
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
