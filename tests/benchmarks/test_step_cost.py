"""What LoDA adds to a forward pass, to a step and to a pass over the images: ``make bench``.

On timm's ViT-S at 224 px with a batch of 8 and both branches beside the frozen weights. Every
ratio is between routes that take turns on one thread, in processor time.
"""

import statistics
from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from turns import in_turn, ratio

from backends.torch import LoDA, LoDASettings, collect_moments, plain_step
from backends.torch.moments import collect_halves

BATCH, CLASSES, RANK, ROUNDS = 8, 4, 16, 5
IMAGES = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(BATCH) % CLASSES  # halves of equal size


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def vit() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=CLASSES)
    return model.requires_grad_(requires_grad=False)


def second_task() -> LoDA:
    """A task with both branches, whose up-projections are no longer zero."""
    loda = LoDA(vit(), LoDASettings(rank=RANK), trainable=["head.*"])
    for _ in range(2):
        loda.begin_task([IMAGES])
        if loda.tasks == 0:
            loda.end_task([IMAGES])
    with torch.no_grad():
        for parameter in loda.lora_parameters():
            parameter.normal_(std=1e-3)
    return loda


def show(capsys: pytest.CaptureFixture[str], times: Mapping[str, list[float]]) -> None:
    with capsys.disabled():
        print()
        for name, found in times.items():
            print(f"  {name:32} {1e3 * statistics.median(found):8.0f} ms")


def report(capsys: pytest.CaptureFixture[str], text: str, found: float, goal: float) -> None:
    with capsys.disabled():
        print(f"  {text}: {found:.3f} (goal {goal})")
    assert found <= goal


def test_a_gradient_aligned_step_costs_two_plain_ones(
    benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    loda = second_task()
    parameters = loda.trainable_parameters()
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
    generator = torch.Generator().manual_seed(0)

    def loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(loda.model(IMAGES[rows]), LABELS[rows])

    def plain() -> None:
        torch.autograd.grad(F.cross_entropy(loda.model(IMAGES), LABELS), parameters)

    def aligned() -> None:
        loda.step(loss, LABELS, optimizer, radius=0.1, draw=0.5, generator=generator)

    loda.model.train()
    times = in_turn({"forward and backward": plain, "aligned step": aligned}, rounds=ROUNDS)
    benchmark.pedantic(aligned, rounds=1)
    show(capsys, times)
    found = ratio(times, "aligned step", "forward and backward")
    report(capsys, "one aligned mini-batch to one forward and backward", found, 2.15)


class Operators(TorchDispatchMode):
    """Counts the operators that run inside it."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_an_aligned_step_runs_the_operators_of_its_four_passes(
    benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each half goes through the model for its source and for its target: four passes."""
    loda = second_task()
    optimizer = torch.optim.SGD(loda.trainable_parameters(), lr=1e-4, momentum=0.9)

    def loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(loda.model(IMAGES[rows]), LABELS[rows])

    def plain() -> None:
        plain_step(loss, LABELS, optimizer)

    def plain_halves() -> None:
        for half in (LABELS < CLASSES // 2, LABELS >= CLASSES // 2):
            own = half.nonzero().flatten()
            plain_step(lambda rows, own=own: loss(own[rows]), LABELS[own], optimizer)

    def aligned() -> None:
        loda.step(loss, LABELS, optimizer, radius=0.1, draw=0.5)

    counts = []
    for route in (plain, plain_halves, aligned):
        route()  # the first finds no momentum
        with Operators() as operators:
            route()
        counts.append(operators.count)
    benchmark.pedantic(aligned, rounds=1)
    with capsys.disabled():
        print("\n  operators of a plain step, of two on the halves, of an aligned one:", *counts)
    report(capsys, "operators of an aligned mini-batch to a plain one", counts[2] / counts[0], 4.1)
    report(capsys, "and to plain steps on both halves", counts[2] / counts[1], 2.05)


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "training"])
def test_branches_beside_the_weights_cost_little(
    benchmark: Any, capsys: pytest.CaptureFixture[str], gradients: bool
) -> None:
    bare, adapted = vit().train(gradients), second_task().model.train(gradients)
    if gradients:  # the graph begins where that of the adapted model does
        bare.get_submodule("blocks.0.attn.qkv").requires_grad_()

    def run(model: nn.Module) -> None:
        with torch.set_grad_enabled(gradients):
            model(IMAGES)

    routes = {"bare forward": lambda: run(bare), "adapted forward": lambda: run(adapted)}
    times = in_turn(routes, rounds=ROUNDS)
    benchmark.pedantic(routes["adapted forward"], rounds=1)
    show(capsys, times)
    found = ratio(times, "adapted forward", "bare forward")
    report(capsys, "adapted forward to bare forward", found, 1.10)


def test_moments_cost_little_beside_the_forward_pass(
    benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = vit().eval()

    def bare() -> None:
        with torch.no_grad():
            model(IMAGES)

    routes = {
        "bare forward": bare,
        "with moments": lambda: collect_moments(model, [IMAGES]),
        "with moments of the halves too": lambda: collect_halves(model, [IMAGES]),
    }
    times = in_turn(routes, rounds=ROUNDS)
    benchmark.pedantic(routes["with moments"], rounds=1)
    show(capsys, times)
    halves = ratio(times, "with moments of the halves too", "bare forward")
    report(capsys, "with moments of the halves too (no goal)", halves, float("inf"))
    report(capsys, "with moments", ratio(times, "with moments", "bare forward"), 1.15)
