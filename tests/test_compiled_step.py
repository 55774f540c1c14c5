"""A step through a model compiled by ``torch.compile`` is the step without it, to rounding."""

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tiny_models import inputs
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
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    loda = LoDA(model, LoDASettings(target="0", rank=2))
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
    tensors = [
        loda.step(
            lambda rows: F.cross_entropy(model(pixels[rows]), labels[rows]),
            labels,
            optimizer,
            radius=0.3,
            generator=generator,
        ).loss
        for _ in range(2)
    ]
    return [*tensors, *(p.detach() for p in loda.lora_parameters())]


def test_a_compiled_step_is_the_step() -> None:
    plain, compiled = second_task(), second_task()
    model = torch.compile(compiled.model, fullgraph=True, dynamic=False)
    expected, actual = steps(plain, plain.model), steps(compiled, model)
    assert len(expected) == len(actual) == 2 + 2
    for a, b in zip(expected, actual, strict=True):
        assert torch.linalg.vector_norm(a) > 0
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_later_tasks_find_the_second_compiled() -> None:
    loda, graphs = second_task(), []

    def counted(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    model = torch.compile(loda.model, backend=counted, fullgraph=True, dynamic=False)
    for task in range(1, 5):
        steps(loda, model)
        loda.end_task([inputs(task, loda.model)[0]])
        loda.begin_task([inputs(task + 1, loda.model)[0]])
    assert len(graphs) == 1
