"""Classifier alignment: its loss, its two schedules, and statistics that are hardly any."""

from dataclasses import replace

import pytest
import torch
from made_up_features import SIZES, accuracy, by_task, gathered, made_up, seeded

from backends.torch.readouts import (
    AlignmentSettings,
    ClassStatistics,
    align_heads,
    alignment,
    alignment_loss,
    heads,
    nearest_mean,
)


def test_alignment_loss_is_the_definition() -> None:
    cosines = torch.randn(5, 6, generator=seeded(), dtype=torch.float64)
    labels = torch.tensor([0, 5, 2, 3, 1])
    total = 0.0
    for row, label in zip(cosines, labels.tolist(), strict=True):
        norm = (row[:2].norm() + row[2:5].norm() + row[5:].norm()) / 3
        logits = row / norm / 0.2
        total -= (logits[label] - logits.logsumexp(0)).item() / 5
    loss = alignment_loss(cosines, labels, SIZES, 0.2)
    assert loss.item() == pytest.approx(total, rel=1e-6)
    # Only the direction of the logits counts.
    assert alignment_loss(7 * cosines, labels, SIZES, 0.2).item() == pytest.approx(total, rel=1e-5)


def test_converged_alignment_is_much_better_than_nearest_mean() -> None:
    statistics = gathered(*made_up())
    x, y = made_up(images=300, seed=1)
    aligned = alignment(statistics, generator=seeded())
    # Oracle: the best rule for these classes, which share one covariance, is linear; it has a
    # bias, which cosines lack.
    covariance = statistics.covariance.double().mean(0)
    mean = statistics.mean.double()
    w = torch.linalg.solve(covariance, mean.T)
    best = (x.double() @ w - (mean.T * w).sum(0) / 2).argmax(1)
    best_accuracy = (best == y).float().mean().item()
    assert accuracy(aligned, x, y) > accuracy(nearest_mean(statistics), x, y) + 0.15
    assert accuracy(aligned, x, y) > best_accuracy - 0.05


def test_converged_alignment_depends_on_statistics_and_generator_alone() -> None:
    statistics = gathered(*made_up())
    weight = align_heads(statistics, generator=seeded())
    assert torch.equal(weight, align_heads(statistics, generator=seeded()))
    start = torch.randn(6, 12, generator=seeded(4))
    assert torch.equal(weight, align_heads(statistics, generator=seeded(), weight=start))
    other = align_heads(statistics, generator=seeded(1))
    assert not torch.equal(weight, other)
    # Another draw converges to the same rule.
    x, _ = made_up(images=100, seed=1)
    agree = heads(weight).logits(x).argmax(1) == heads(other).logits(x).argmax(1)
    assert agree.float().mean() > 0.95


def test_the_published_schedule() -> None:
    """A second, plain implementation of the table row, with the same draws."""
    statistics = gathered(*made_up(), torch.float64)
    settings = AlignmentSettings(epochs=5, temperature=0.2)
    start = torch.randn(6, 12, generator=seeded(7), dtype=torch.float64)
    weight = align_heads(statistics, settings, generator=seeded(), weight=start)

    g = seeded()
    w = start.clone().requires_grad_()
    momentum = torch.zeros_like(w)
    task_of = [0, 0, 1, 1, 1, 2]
    for epoch in range(5):
        noise = torch.randn(6, 256, 12, generator=g, dtype=torch.float64)
        samples = []
        for c in range(6):
            factor = torch.linalg.cholesky(
                statistics.covariance[c] + 1e-3 * torch.eye(12, dtype=torch.float64)
            )
            mean = statistics.mean[c] * (0.9 + 0.1 * (task_of[c] + 1) / 3)
            samples.append(mean + noise[c] @ factor.T)
        order = torch.randperm(6 * 256, generator=g)
        x, y = torch.cat(samples)[order], (order // 256)
        lr = 0.01 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * epoch / 5)).item())
        for step in range(6):
            rows = slice(256 * step, 256 * (step + 1))
            unit = x[rows] / x[rows].norm(dim=1, keepdim=True)
            cosines = unit @ (w / w.norm(dim=1, keepdim=True)).T
            norms = (
                cosines[:, :2].norm(dim=1) + cosines[:, 2:5].norm(dim=1) + cosines[:, 5].abs()
            ) / 3
            loss = torch.nn.functional.cross_entropy(cosines / norms[:, None] / 0.2, y[rows])
            (grad,) = torch.autograd.grad(loss, w)
            with torch.no_grad():
                momentum = 0.9 * momentum + grad + 5e-4 * w
                w -= lr * momentum
    torch.testing.assert_close(weight, w.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weight, start, atol=1e-3)


def test_the_published_schedule_leaves_the_first_task_alone() -> None:
    x, y = made_up()
    statistics = ClassStatistics()
    statistics.add_task(*by_task(x, y)[0])
    start = torch.randn(2, 12, generator=seeded())
    weight = align_heads(statistics, AlignmentSettings(epochs=5), generator=seeded(), weight=start)
    assert torch.equal(weight, start)


@pytest.mark.parametrize("epochs", [None, 5])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_alignment_never_fails_on_singular_covariances(
    epochs: int | None, relative: bool, scale: float
) -> None:
    # One class of a single image, one of two, one constant: ranks 0, 1 and 0 in 8 dimensions.
    x = scale * torch.randn(5, 8, generator=seeded())
    x[4] = x[3]
    statistics = ClassStatistics()
    statistics.add_task(x[:3], torch.tensor([0, 1, 1]))
    statistics.add_task(x[3:], torch.tensor([2, 2]))
    for amount in (0.0, 1e-3):
        settings = AlignmentSettings(
            epochs=epochs, ridge=amount, relative=relative, shrinkage=0.0, max_steps=100
        )
        for shrinkage in (0.0, 0.3):
            weight = align_heads(
                statistics,
                replace(settings, shrinkage=shrinkage),
                generator=seeded(),
                weight=statistics.mean,
            )
            assert weight.isfinite().all()
            # An absolute ridge far above the features rightly drowns them.
            if epochs is None and (relative or amount == 0 or scale >= 1):
                assert heads(weight).logits(x).argmax(1).tolist() == [0, 1, 1, 2, 2]


def test_one_class_alone() -> None:
    statistics = ClassStatistics()
    statistics.add_task(torch.ones(1, 3), torch.tensor([0]))
    readout = alignment(statistics, generator=seeded())
    assert readout.logits(torch.ones(2, 3)).argmax(1).tolist() == [0, 0]


@pytest.mark.parametrize(
    "settings",
    [{"epochs": 0}, {"temperature": 0.0}, {"ridge": -1.0}, {"shrinkage": float("nan")}],
)
def test_alignment_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        AlignmentSettings(**settings)  # type: ignore[arg-type]
